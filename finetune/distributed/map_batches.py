"""Batches dealt out to the processes: every result once, in order, on every process.

Batches are made without looking at the number of processes. One process and eight therefore compute
the very same tensors, and an evaluation does not depend on where it ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from finetune import console
from finetune.distributed.processes import any_rank, gather_objects, is_sharded, rank_and_world
from finetune.errors import FinetuneError

Poll = Callable[[], bool]
Result = TypeVar("Result")


class EvaluationStoppedError(FinetuneError):
    """`should_stop` said so before everything was computed; what there was is dropped."""


def map_batches(
    model: Any,
    batches: Sequence[list[int]],
    work: Callable[[list[int]], Result],
    *,
    label: str,
    should_stop: Poll | None = None,
) -> list[Result]:
    """`work(batch)` of every batch, in the order of `batches`, on every process.

    All processes call this together. A turn is one batch for each of them; batches of similar work
    should therefore stand together.

    Raises:
        EvaluationStoppedError: `should_stop` returned True on some process.
    """
    rank, world = rank_and_world()
    everybody = is_sharded(model)
    done: list[tuple[int, Result]] = []
    with evaluating(model), console.progress(sum(map(len, batches)), label) as bar:
        for first in range(0, len(batches), world):
            turn = batches[first : first + world]
            # Every process must run every forward pass when each holds a part of the weights: one
            # without a batch in the last turn repeats another's and forgets the result.
            if rank < len(turn):
                done.append((first + rank, work(turn[rank])))
            elif everybody:
                work(turn[0])
            if any_rank(should_stop is not None and should_stop()):
                raise EvaluationStoppedError(
                    f"evaluation ({label}) was stopped after {first + len(turn)} of "
                    f"{len(batches)} batches"
                )
            bar.advance(sum(map(len, turn)))
    results = [pair for part in gather_objects(done) for pair in part]
    return [result for _, result in sorted(results, key=lambda pair: pair[0])]


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by falling length: little padding, and what is too large for the memory fails first."""
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; each module gets its own mode back afterwards.

    It ends dropout and activation checkpointing, and with the latter what forbids the cache.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
