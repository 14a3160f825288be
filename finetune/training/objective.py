"""What a step minimises: the seam between the loop and a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from finetune.data.examples.batch_plan import BLANK
from finetune.data.examples.dataset import IGNORED
from finetune.models.loss import supervised_loss

Batch: TypeAlias = dict[str, Tensor]
OF_THE_LOSS = ("labels", "loss_weights", "supervised")
"""What the model itself does not see of a batch."""


class Objective(Protocol):
    """A loss that is a mean over the whole global batch, taken micro-batch by micro-batch."""

    def normaliser(self, batch: Batch) -> float:
        """What `batch` adds to `total`, by which the sum of all losses is divided."""

    def loss(self, model: nn.Module, batch: Batch, total: Tensor | float | None) -> Tensor:
        """This micro-batch's share of the mean: its summed loss / `total`."""


class SupervisedTokens:
    """Fine-tuning on replies: cross-entropy over supervised tokens, each with its weight.

    The output layer runs in chunks inside the model's own forward pass, where DDP and ZeRO expect
    every use of a weight.
    """

    def normaliser(self, batch: Batch) -> float:
        """The sum of the weights of the supervised tokens."""
        supervised = _is_supervised(batch)
        if "loss_weights" not in batch:
            return float(supervised.sum())
        return float(batch["loss_weights"][:, 1:][supervised].double().sum())

    def loss(self, model: nn.Module, batch: Batch, total: Tensor | float | None) -> Tensor:
        """sum(weight · cross-entropy) / `total`."""
        head_loss = partial(
            supervised_loss,
            labels=batch["labels"],
            loss_weights=batch.get("loss_weights"),
            num_items=total,
            supervised=batch.get("supervised"),
        )
        inputs = {k: v for k, v in batch.items() if k not in OF_THE_LOSS}
        loss: Tensor = model(**inputs, head_loss=head_loss, use_cache=False).loss
        return loss


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What a step consists of: sums over its micro-batches, or over those of several steps."""

    weight: float = 0.0
    """The loss's normaliser."""
    supervised: float = 0.0
    """Tokens that are learned."""
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
    batches: Sequence[Batch],
    sample_ids: Sequence[npt.NDArray[np.int64]],
    lengths: npt.NDArray[np.int32],
    objective: Objective,
) -> StepCounts:
    """The counts of some batches; `lengths` are the documents' by sample id."""
    total = StepCounts()
    for batch, samples in zip(batches, sample_ids, strict=True):
        total += StepCounts(
            objective.normaliser(batch),
            float(_is_supervised(batch).sum()),
            float(lengths[samples[samples != BLANK]].sum()),
            float(batch["input_ids"].numel()),
        )
    return total


def _is_supervised(batch: Batch) -> Tensor:
    # The label at place t is predicted from place t - 1, so the first one never counts.
    return batch["labels"][:, 1:] != IGNORED
