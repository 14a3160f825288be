"""How a checkpoint was evaluated while it was trained, so that it can be asked the same again."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from finetune.artifacts.names import BASE_RECORD, RUN_CONFIG
from finetune.config.load import load_config
from finetune.config.schema import DataSection, EvaluationSection
from finetune.data.examples.dataset import LengthPolicy
from finetune.data.reading.section import reading_of, validation_sources, with_rows
from finetune.data.reading.sources import Reading, SourceSpec
from finetune.errors import ConfigError

ROWS = ("columns", "format", "image_root", "options")
"""Options of the data section that say what rows are like; the others are evaluation's."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model's weights lie while it answers, and how wide they are."""

    device_map: Literal["auto"] | None = None
    """`auto`: shared out over all accelerators of this machine, layer by layer, and over its memory."""
    quantization: Literal["nf4"] | None = None
    """4 bits, whatever the run that saved it trained on."""


HERE = Placement()
"""On this process's accelerator, or its CPU; as wide as it was trained."""


REPETITION = (0.01, 10.0)
"""What `repetition_penalty` may be; 1 changes nothing, and beyond these logits are no numbers any more."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, where one setting holds for all replies; names as in `decoder.Decoding`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raises ConfigError for numbers that mean nothing."""
        for name, low, high in (
            ("temperature", 0.0, None), ("top_p", 0.0, 1.0), ("top_k", 0, None), ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0), ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", *REPETITION),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= (sys.float_info.max if high is None else high):  # NaN, too
                wanted = f"{low} or more" if high is None else f"from {low} to {high}"
                raise ConfigError(f"{name} is {value}; it must be {wanted}")

    @property
    def by_request_field(self) -> dict[str, float]:
        """What is not the default, by the names of OpenAI's fields."""
        plain = asdict(GREEDY)
        return {name: value for name, value in asdict(self).items() if value != plain[name]}


GREEDY = Sampling()
"""Always the likeliest token."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the scores of a model besides its weights."""

    data: DataSection
    evaluation: EvaluationSection
    dtype: str = "auto"
    attention: str = "auto"
    quantization: str | None = None
    kernels: str = "auto"
    loss_batch_size: int = 8
    """Examples per forward pass for the loss."""
    seed: int = 0

    def with_changes(
        self, data: Sequence[str], changes: Mapping[str, Any], *, needs_data: bool = True
    ) -> Settings:
        """These settings with `data` in the place of the held-out files, if given, and with changed options.

        Raises:
            ConfigError: an option cannot have that value, or there are no held-out files although
                there is nothing else to ask.
        """
        said = {name: value for name, value in changes.items() if value is not None}
        rows = {name: said.pop(name) for name in ROWS if name in said}
        try:
            evaluation = EvaluationSection(**{**self.evaluation.model_dump(), **said})
        except ValidationError as error:
            found = "; ".join(f"{one['loc'][0]}: {one['msg']}" for one in error.errors())
            raise ConfigError(f"evaluation options: {found}") from error
        section = with_rows(self.data, **rows)
        section = section.model_copy(update={"validation": list(data)} if data else {})
        if needs_data and not section.validation:
            raise ConfigError("there is nothing to evaluate on; give held-out files with --data")
        return replace(self, data=section, evaluation=evaluation)

    @property
    def sources(self) -> tuple[SourceSpec, ...]:
        """The held-out sources."""
        return validation_sources(self.data)

    @property
    def reading(self) -> Reading:
        """How their rows are read."""
        return reading_of(self.data)

    @property
    def policy(self) -> LengthPolicy:
        """How they become examples for the loss."""
        return LengthPolicy(self.data.max_length, self.data.train_on, self.data.on_too_long)


def settings_of(target: str | Path) -> Settings:
    """The settings of the run that saved `target`, or the defaults for a model from elsewhere."""
    folder = Path(target)
    if not (folder / BASE_RECORD).is_file() or not (folder / RUN_CONFIG).is_file():
        return Settings(DataSection(train=[]), EvaluationSection())
    config = load_config(folder / RUN_CONFIG)
    return Settings(
        data=config.data,
        evaluation=config.evaluation,
        dtype=config.model.dtype,
        attention=config.model.attention,
        quantization=config.model.quantization,
        kernels=config.model.kernels,
        loss_batch_size=config.training.batch_size,
        seed=config.training.seed,
    )
