"""Which examples each process gets in each forward pass.

The order comes from `data.order.EpochPlan`. This room deals a global batch out to the processes:
with batch size 2, accumulation 2 and 2 processes, the 8 examples of one optimizer step, longest
first, go to

    forward pass   process 0   process 1
    first          a, c        b, d
    second         e, g        f, h

The last global batch of an epoch may be incomplete. A process that is left without an example in a
forward pass gets a blank: a short example of which nothing is learned, so that every process runs
as often as the others and no example is seen twice.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Sampler

from finetune.data.examples.dataset import IGNORED, Example
from finetune.data.examples.order import EpochPlan
from finetune.distributed.signals import SIGNALS

Item: TypeAlias = "Example | Sequence[Example]"
Collate: TypeAlias = Callable[[Sequence[Item]], dict[str, torch.Tensor]]


class Items(Protocol):
    """Examples, or packed rows of examples, by index."""

    lengths: npt.NDArray[np.int32]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


class RankBatches(Sampler[list[int]]):
    """Micro-batches of one process: lists of indices, `~index` standing for a blank."""

    def __init__(
        self,
        plan: EpochPlan,
        *,
        blank: int,
        batch_size: int,
        accumulation: int,
        rank: int,
        world: int,
    ) -> None:
        self.plan = plan
        self.blank = blank
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world = world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration; the Trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Forward passes per epoch, the same in every process."""
        per_pass = self.batch_size * self.world
        in_last_step = per_pass * self.accumulation - self.plan.num_repeated
        return (self.plan.steps_per_epoch - 1) * self.accumulation + -(-in_last_step // per_pass)

    def __iter__(self) -> Iterator[list[int]]:
        for step in _without_repeats(self.plan.batches(self.epoch)):
            for first in range(0, len(step), self.batch_size * self.world):
                turn = step[first : first + self.batch_size * self.world]
                yield turn[self.rank :: self.world] or [self.blank]


class StepLoader(DataLoader[Item]):
    """A data loader that hands the epoch on to its sampler, as the Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]

    def __iter__(self) -> Any:
        """The batches of an epoch.

        Workers begin with the signals blocked: torch's own handler would end one that gets a signal
        before it ignores them.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """End the workers: they ignore the signal with which Python would at its own end, and wait."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._iterator = None


class WithBlanks(torch.utils.data.Dataset[Item]):
    """The items, and for `~index` item `index` with nothing to learn."""

    def __init__(self, items: Items) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index] if index >= 0 else blanked(self.items[~index])


def blanked(item: Item) -> Item:
    """`item` with every label ignored."""
    if not isinstance(item, Example):
        return [_blank_example(example) for example in item]
    return _blank_example(item)


def training_loader(
    items: Items,
    plan: EpochPlan,
    collate: Collate,
    *,
    workers: int,
    seconds: float,
    **place: Any,
) -> StepLoader:
    """The loader of one process's micro-batches; `place` goes to RankBatches.

    It has a generator of its own: loading must not draw from the stream that dropout draws from. A
    worker that gives nothing for `seconds` ends the run.
    """
    blank = ~int(np.argmin(items.lengths))
    return StepLoader(
        WithBlanks(items),
        batch_sampler=RankBatches(plan, blank=blank, **place),
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        timeout=seconds if workers > 0 else 0,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )


def _ignore_signals(worker: int) -> None:
    """A signal to the whole group is the trainer's affair, which needs the workers for its step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _without_repeats(batches: npt.NDArray[np.int64]) -> Iterator[list[int]]:
    """Steps of an epoch, with what the plan repeats to fill up the last one left out."""
    _, first_seen = np.unique(batches, return_index=True)
    is_first = np.zeros(batches.size, dtype=bool)
    is_first[first_seen] = True
    for step, keep in zip(batches, is_first.reshape(batches.shape), strict=True):
        yield step[keep].tolist()


def _blank_example(example: Example) -> Example:
    return replace(example, labels=np.full_like(example.labels, IGNORED), loss_weights=None)
