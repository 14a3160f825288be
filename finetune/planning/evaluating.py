"""What an evaluation during training takes, at most, and its share of a run's time: before the run.

    the loss        every held-out token goes through the model once
    prompts         so do those of the replies that are asked for
    replies         max_new_tokens rounds a batch, each of which reads all weights; batches go round the GPUs

Tokens are a third of the bytes of the held-out rows, which is more than GLM-4's tokenizer makes of Chinese,
English or JSON; a row of a model that sees images counts as `data.max_length`. Replies are mostly shorter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.plain_files import read_json
from finetune.artifacts.resolve import TOKENIZER_FILES, local_folder
from finetune.config.schema import DataSection, EvaluationSection, ModelSection
from finetune.data.reading.files import BadRow, expand, read_rows
from finetune.data.reading.section import validation_sources
from finetune.errors import DataError
from finetune.models.families import family_of
from finetune.planning.plan import Plan
from finetune.planning.roofline import Ceilings

BYTES_A_TOKEN = 3
KERNELS_A_LAYER = 25
"""Of one round of a reply: its launches take longer than reading a small model."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What is asked at every evaluation."""

    replies: int
    tokens: int
    """Of all held-out rows."""
    prompt_tokens: int
    """Of those whose replies are generated."""


@dataclass(frozen=True, slots=True)
class PlannedEvaluation:
    """The time of one evaluation, and how often it comes."""

    seconds: float
    between: float | None
    """Seconds of the steps from one to the next; None where the number of steps is not known."""

    @property
    def share(self) -> float | None:
        """Of a run's time."""
        return None if self.between is None else self.seconds / (self.seconds + self.between)

    def numbers(self) -> dict[str, object]:
        """For `--json`."""
        return {"evaluation_seconds": self.seconds, "evaluation_share": self.share}

    def rows(self) -> list[list[str]]:
        """For the table."""
        said = f"at most {self.seconds:.1f} s"
        if self.share is not None:
            said += f", {100 * self.share:.0f} % of the time"
        return [["an evaluation", said]]


def planned_evaluation(
    plan: Plan, model: ModelSection, data: DataSection, section: EvaluationSection
) -> PlannedEvaluation | None:
    """The evaluations of a run; None where the held-out data is not on this machine, or there is none."""
    found = _held_out(model, data, section)
    if found is None:
        return None
    gpu = plan.gpu
    reading = 2 * plan.active_parameters * (found.tokens + found.prompt_tokens)
    seconds = reading / (gpu.peak_flops * gpu.share * gpu.number)
    ceilings = Ceilings()
    memory = ceilings.memory * gpu.peak_flops / 989e12  # faster cards have faster memory
    launches = KERNELS_A_LAYER * plan.layers * ceilings.launch
    rows = 64 if section.batch_size == "auto" else section.batch_size
    rounds = math.ceil(math.ceil(found.replies / rows) / gpu.number) * section.max_new_tokens
    seconds += rounds * max(launches, plan.model_bytes / memory)
    steps = section.every_steps or plan.steps
    return PlannedEvaluation(seconds, None if steps is None else steps * plan.seconds_per_step)


def _held_out(model: ModelSection, data: DataSection, section: EvaluationSection) -> HeldOut | None:
    if data.validation is None:
        return None
    replies = tokens = rows = 0
    for source in validation_sources(data):
        if "://" in source.path:
            return None  # nothing is fetched for a plan
        share = source.part.share if source.part is not None else 1.0
        try:
            files = expand(source.path)
        except DataError:
            return None
        for file in files:
            asked = [_replies(row.value) for row in read_rows(file) if not isinstance(row, BadRow)]
            rows += math.ceil(share * len(asked))
            replies += math.ceil(share * sum(asked))
            tokens += math.ceil(share * file.stat().st_size / BYTES_A_TOKEN)
    length = data.max_length
    tokens = rows * length if _sees_images(model) else min(tokens, rows * length)
    wanted = replies if section.replies == "every_reply" else rows
    wanted = min(wanted, section.max_samples or wanted) if section.generate else 0
    return HeldOut(wanted, tokens, tokens * wanted // max(1, replies))


def _replies(row: Mapping[str, Any]) -> int:
    """Of a dialogue, those of the assistant; one of any other row."""
    listed = (row[name] for name in ("messages", "conversations") if name in row)
    turns: Any = next((one for one in listed if isinstance(one, list)), [])
    roles = [turn.get("role", turn.get("from")) for turn in turns if isinstance(turn, dict)]
    return max(1, sum(role in ("assistant", "gpt") for role in roles))


def _sees_images(section: ModelSection) -> bool:
    folder = local_folder(section.path, section.revision, files=TOKENIZER_FILES)
    values = read_json(folder / MODEL_CONFIG)
    return family_of(values).sees_images(values)
