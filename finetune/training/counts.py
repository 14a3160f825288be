"""What one optimizer step consists of, counted over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from finetune.data.examples.dataset import IGNORED
from finetune.training.batches import BLANK


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Sums over the micro-batches of a step, or of several."""

    weight: float = 0.0
    """The loss's normaliser: supervised tokens, each with its weight."""
    supervised: float = 0.0
    tokens: float = 0.0
    """Without padding and blanks."""
    cells: float = 0.0
    """With padding and blanks: rows x width."""

    def __add__(self, other: StepCounts) -> StepCounts:
        return StepCounts(
            self.weight + other.weight,
            self.supervised + other.supervised,
            self.tokens + other.tokens,
            self.cells + other.cells,
        )

    @property
    def padding(self) -> float:
        """Share of padding, 0..1."""
        return 1.0 - self.tokens / self.cells if self.cells else 0.0


def count(
    batches: Sequence[dict[str, Tensor]],
    sample_ids: Sequence[npt.NDArray[np.int64]],
    lengths: npt.NDArray[np.int32],
) -> StepCounts:
    """The counts of some batches; `lengths` are the documents' by sample id."""
    total = StepCounts()
    for batch, samples in zip(batches, sample_ids, strict=True):
        weight, supervised = supervised_weight(batch)
        tokens = float(lengths[samples[samples != BLANK]].sum())
        total += StepCounts(weight, supervised, tokens, float(batch["input_ids"].numel()))
    return total


def supervised_weight(batch: dict[str, Tensor]) -> tuple[float, float]:
    """Sum of the weights of a batch's supervised tokens, and their number."""
    # The label at place t is predicted from place t - 1, so the first one never counts.
    is_supervised = batch["labels"][:, 1:] != IGNORED
    number = float(is_supervised.sum())
    if "loss_weights" not in batch:
        return number, number
    return float(batch["loss_weights"][:, 1:][is_supervised].double().sum()), number
