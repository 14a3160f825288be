"""What an evaluation is asked for, besides which models and which data."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

from finetune.errors import ConfigError
from finetune.evaluation.scores.added import ByModels
from finetune.evaluation.scoring import Scoring
from finetune.evaluation.tasks.harness import check_harness
from finetune.generation.backends.choice import OURS, BackendChoice
from finetune.generation.settings import HERE, Placement, Sampling, Settings
from finetune.generation.structured import ANY_FORM, Form

GENERATING = ("torch", "transformers", "peft", "tokenizers")
"""Packages that decide a model's replies."""
SCORING = {
    "vllm": "vllm", "peft": "peft", "pyarrow": "pyarrow", "jieba": "jieba", "nltk": "nltk",
    "rouge_chinese": "rouge-chinese", "icu": "pyicu-wheels", "sacrebleu": "sacrebleu",
}  # fmt: skip
"""Modules that an evaluation needs in vLLM's environment, which has this package alone, and what brings them."""


@dataclass(frozen=True, slots=True)
class Options:
    """What an evaluation does besides asking the models for replies."""

    with_base: bool = False
    """Score the untuned model too."""
    predictions: tuple[str, ...] = ()
    """Files of replies made elsewhere."""
    scoring: Scoring = field(default_factory=Scoring)
    by_models: ByModels = field(default_factory=ByModels)
    """Scores that other models give."""
    general: tuple[str, ...] = ()
    """Files of a general set whose loss tells what was forgotten."""
    tasks: tuple[str, ...] = ()
    """Public tasks, as `finetune.evaluation.tasks.plan` spells them."""
    tasks_data: str | None = None
    """A folder with the data sets of tasks."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    seed: int = 0
    """Of sampled replies."""
    form: Form = ANY_FORM
    """What every reply must be."""
    overwrite: bool = False
    """Replace files in the output folder that this program did not write, too."""
    placement: Placement = HERE
    by: BackendChoice = OURS

    def check(self) -> None:
        """Raises ConfigError for what does not go together, and where a library is missing."""
        check_harness(self.tasks)
        self.by.check(
            restricted=self.form != ANY_FORM,
            sampled=self.temperature > 0,
            needs_weights=bool(self.tasks or self.general),
        )
        if self.by.backend == "vllm":
            _check_environment()

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature)

    @property
    def decoding(self) -> str:
        """How tokens are chosen and by whom, in words."""
        sampled = f"temperature {self.temperature}, seed {self.seed}"
        words = [sampled if self.temperature else "greedy", str(self.form), self.by.words]
        return ", ".join(filter(None, words))


def _check_environment() -> None:
    missing = [package for name, package in SCORING.items() if not _is_there(name)]
    if missing:
        raise ConfigError(
            f"--backend vllm: {sys.executable} does not have {', '.join(missing)}, which the scores need; "
            "install these packages beside vLLM, as docs/serving.md says under 'Batch inference with vLLM'"
        )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # it is being imported
        return True


def request(settings: Settings, options: Options) -> dict[str, Any]:
    """What decides the replies and losses of given weights."""
    section = settings.evaluation
    names = ("generate", "replies", "max_new_tokens", "max_samples", "batch_size")
    return {
        "data": [source.path for source in settings.sources],
        "decoding": options.decoding,
        **{name: getattr(section, name) for name in names},
        **asdict(settings.policy),
    }
