"""Examples -> the mean loss over their supervised tokens, in training and on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from finetune.data.examples.dataset import IGNORED, Example
from finetune.distributed.map_batches import Poll, longest_first, map_batches
from finetune.evaluation.scores.statistics import LossTable
from finetune.models.loss import supervised_loss


class Examples(Protocol):
    """A PreparedDataset, as far as it is needed here."""

    lengths: npt.NDArray[np.int32]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def validation_loss(
    model: Any,
    examples: Examples,
    collate: Callable[[Sequence[Example]], dict[str, Any]],
    *,
    batch_size: int,
    should_stop: Poll | None = None,
) -> LossTable:
    """The loss over all of `examples`; the same on every process, for any number of them.

    Args:
        model: one of `finetune.models`; PEFT or not, not wrapped by DDP or DeepSpeed.
        examples: the prepared held-out set, each example in a row of its own.
        collate: a Collator.
        batch_size: examples per batch.
        should_stop: polled by all processes together after every batch.

    Raises:
        EvaluationStoppedError: `should_stop` returned True on some process.
    """
    order = longest_first(examples.lengths.tolist())
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]

    def summed(batch: list[int]) -> list[tuple[int, float, float]]:
        inputs = collate([examples[index] for index in batch])
        inputs.pop("sample_ids")
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        losses = row_losses(model, inputs, num_rows=batch_size).tolist()
        return list(zip(batch, losses, _row_weights(inputs).tolist(), strict=False))

    parts = map_batches(model, batches, summed, label="validation loss", should_stop=should_stop)
    losses, weights = np.zeros(len(order)), np.zeros(len(order))
    for part in parts:
        for index, loss, weight in part:
            losses[index], weights[index] = loss, weight
    return LossTable(losses, weights)


def row_losses(model: Any, inputs: dict[str, Any], *, num_rows: int) -> torch.Tensor:
    """The loss of every row, summed over its supervised tokens by their weights [num_rows].

    Args:
        model: a causal language model, PEFT or not.
        inputs: what it takes, with `labels` [B, T] and perhaps `loss_weights` [B, T].
        num_rows: B or more; rows that are not there have a loss of 0. The head runs that often, for
            under ZeRO-3 every process must call it as often as the others.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    given = {
        name: value for name, value in inputs.items() if name not in ("labels", "loss_weights")
    }
    hidden: torch.Tensor = inner.base_model(**given, use_cache=False).last_hidden_state  # [B, T, D]
    head, labels, shares = (
        inner.get_output_embeddings(),
        inputs["labels"],
        inputs.get("loss_weights"),
    )
    return torch.stack(
        [
            supervised_loss(
                head,
                hidden[at],
                labels[at],
                loss_weights=None if shares is None else shares[at],
                num_items=1.0,
            )
            for at in (slice(row, row + 1) for row in range(num_rows))
        ]
    )


def _row_weights(inputs: dict[str, Any]) -> torch.Tensor:
    # The label at place t is predicted from place t - 1, so the first one never counts.
    supervised: torch.Tensor = (inputs["labels"][:, 1:] != IGNORED).double()
    if "loss_weights" in inputs:
        supervised = supervised * inputs["loss_weights"][:, 1:]
    return supervised.sum(dim=1)
