"""Batches shared out over the processes, so that none waits for another before the end.

Batches are made without looking at the number of processes. One process and eight therefore compute
the very same tensors, and an evaluation does not depend on where it ran. Each batch has an owner; who
has no batch of its own left takes those of the slowest. Two processes and six batches, of which the
first takes as long as five others:

    process 0     batch 0 . . . . . . . .    batch 2
    process 1     batch 1  batch 3  batch 5  batch 4
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from finetune import console
from finetune.distributed.processes import (
    any_rank,
    gather_objects,
    is_sharded,
    rank_and_world,
    shared_store,
)
from finetune.errors import FinetuneError

Poll = Callable[[], bool]
Batch = TypeVar("Batch")
Result = TypeVar("Result")


class EvaluationStoppedError(FinetuneError):
    """`should_stop` said so before everything was computed; what there was is dropped."""


class Deal(Generic[Batch]):
    """Which batches this process computes; all processes go through the same windows of them.

    Raises:
        EvaluationStoppedError: by `finish` in every process, when `should_stop` returned True on some.
    """

    def __init__(self, *, in_step: bool = False, should_stop: Poll | None = None) -> None:
        """Begins a deal; all processes wait for each other here.

        Args:
            in_step: every process computes as often as the others, as it must where each holds a
                part of the weights.
            should_stop: polled behind every batch.
        """
        self.rank, self.world = rank_and_world()
        self.stopped = any_rank(False)
        self._in_step = in_step
        self._should_stop = should_stop or (lambda: False)
        self._store = shared_store("batches")
        self._first = self._windows = 0

    def window(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
        """The batches of these that this process is to compute, and whether the result counts.

        It does not where a process that is left without a batch repeats another's to keep in step.
        Nothing comes once somebody was asked to stop.
        """
        for batch, counts in self._in_rounds(batches) if self._in_step else self._taken(batches):
            yield batch, counts
            stop = self._should_stop()
            if stop and self._store is not None:
                self._store.set("stopped", "")
            if self._in_step:
                self.stopped = any_rank(stop)
            else:
                self.stopped = stop or (self._store is not None and self._store.check(["stopped"]))
            if self.stopped:
                return
        self._first += len(batches)
        self._windows += 1

    def finish(self) -> None:
        """Waits for all processes."""
        if any_rank(self.stopped):
            raise EvaluationStoppedError("evaluation was stopped before its end")

    def _in_rounds(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
        for first in range(0, len(batches), self.world):
            turn = batches[first : first + self.world]
            counts = self.rank < len(turn)
            yield turn[self.rank if counts else 0], counts

    def _taken(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
        if self._store is None:
            yield from ((batch, True) for batch in batches)
            return
        # Batch n of all windows belongs to process n % world.
        shares = [
            batches[(rank - self._first) % self.world :: self.world] for rank in range(self.world)
        ]
        owner: int | None = self.rank
        while owner is not None:
            place = self._count(owner, 1) - 1
            if place < len(shares[owner]):
                yield shares[owner][place], True
            else:
                owner = self._slowest(shares)

    def _slowest(self, shares: Sequence[Sequence[Batch]]) -> int | None:
        """Whose batches to take: not the next one of a process that is at it in this window."""
        spare = {}
        for rank, share in enumerate(shares):
            taken = self._count(rank, 0) if rank != self.rank else len(share)
            spare[rank] = len(share) - taken - (1 if taken else 0)
        best = max(spare, key=lambda rank: spare[rank])
        return best if spare[best] > 0 else None

    def _count(self, rank: int, more: int) -> int:
        return int(self._store.add(f"{self._windows}/{rank}", more))


class Collected:
    """Results that processes put in, which rank 0 takes out while the others go on."""

    def __init__(self) -> None:
        self._rank = rank_and_world()[0]
        self._store = shared_store("results")
        self._here: dict[str, Any] = {}

    def put(self, number: int, result: Any) -> None:
        """Adds the result of a batch; what JSON can hold."""
        if self._rank == 0:
            self._here[str(number)] = [0, result]
        else:
            self._store.set(str(number), json.dumps([self._rank, result]))

    def take(self, number: int) -> tuple[int, Any] | None:
        """On rank 0, who computed the batch and its result; None while that is not there."""
        key = str(number)
        if self._store is not None and key not in self._here and self._store.check([key]):
            self._here[key] = json.loads(self._store.get(key))
            self._store.delete_key(key)
        found = self._here.pop(key, None)
        return None if found is None else (found[0], found[1])


def map_batches(
    model: Any,
    batches: Sequence[list[int]],
    work: Callable[[list[int]], Result],
    *,
    label: str,
    should_stop: Poll | None = None,
) -> list[Result]:
    """`work(batch)` of every batch, in the order of `batches`, on every process.

    All processes call this together.

    Raises:
        EvaluationStoppedError: `should_stop` returned True on some process.
    """
    done: list[tuple[int, Result]] = []
    deal: Deal[int] = Deal(in_step=is_sharded(model), should_stop=should_stop)
    mine = sum(map(len, batches)) // deal.world
    with evaluating(model), console.progress(mine, label) as bar:
        for number, counts in deal.window(range(len(batches))):
            result = work(batches[number])
            if counts:
                done.append((number, result))
                bar.advance(len(batches[number]))
        deal.finish()
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
