"""Examples -> the mean loss over their supervised tokens, in training and on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from finetune.data.dataset import IGNORED, Example
from finetune.evaluation.turns import Poll, in_turns, longest_first


class Examples(Protocol):
    """A PreparedDataset, as far as it is needed here."""

    lengths: npt.NDArray[np.int32]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True, slots=True)
class ValidationLoss:
    """The loss on held-out examples."""

    loss: float
    """Weighted mean cross-entropy, natural logarithm."""
    weight: float
    """What the mean is over: supervised tokens, each with its weight."""


def validation_loss(
    model: Any,
    examples: Examples,
    collate: Callable[[Sequence[Example]], dict[str, Any]],
    *,
    batch_size: int,
    should_stop: Poll | None = None,
) -> ValidationLoss:
    """The loss over all of `examples`; the same on every process, for any number of them.

    Args:
        model: one of `finetune.models`, whose loss is a sum over `num_items_in_batch`; PEFT or not,
            not wrapped by DDP or DeepSpeed.
        examples: the prepared held-out set, each example in a row of its own.
        collate: a Collator.
        batch_size: examples per batch.
        should_stop: polled by all processes together after every batch.

    Raises:
        EvaluationStoppedError: `should_stop` returned True on some process.
    """
    order = longest_first(examples.lengths.tolist())
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]

    def summed(batch: list[int]) -> tuple[float, float]:
        inputs = collate([examples[index] for index in batch])
        inputs.pop("sample_ids")
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        output = model(**inputs, num_items_in_batch=1.0, use_cache=False)
        return float(output.loss), _weight(inputs)

    parts = in_turns(model, batches, summed, label="validation loss", should_stop=should_stop)
    weight = fsum(weight for _, weight in parts)
    return ValidationLoss(fsum(loss for loss, _ in parts) / (weight or 1.0), weight)


def _weight(inputs: dict[str, Any]) -> float:
    # The label at place t is predicted from place t - 1, so the first one never counts.
    supervised = inputs["labels"][:, 1:] != IGNORED
    if "loss_weights" not in inputs:
        return float(supervised.sum())
    return float(inputs["loss_weights"][:, 1:][supervised].double().sum())
