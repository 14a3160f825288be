"""Which examples each process gets in each forward pass of an epoch, and how much padding that is.

The examples of an optimizer step are a function of (seed, epoch) and the global batch only, whatever
way that is split into processes, accumulation and batch size. A resume needs to know nothing but
(epoch, step). How a step is dealt out, with batch size 2, accumulation 2 and 2 processes: its eight
examples, longest first, are cut into four micro-batches of neighbours in length (no other cut pads
less), and the micro-batches of one forward pass are neighbours too (nobody waits long):

    forward pass   process 0   process 1
    first          a, b        c, d
    second         g, h        e, f

The direction changes with every pass and the first process with every step, so that all of them get
about as many tokens. The last step of an epoch may be incomplete: its last pass is shared out evenly,
and a process that is left without an example gets an empty list, no example twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Lengths = Sequence[int] | npt.NDArray[np.integer]
Indices = npt.NDArray[np.int64]

BLANK = -1
"""The index of an example of which nothing is learned, and the sample id of its document."""

_BATCHES_PER_POOL = 50
"""Global batches among which lengths are sorted: more means less padding and less mixing."""


def permutation(count: int, *seed: int) -> Indices:
    """A permutation of `range(count)` that the numbers of `seed` decide.

    Raw PCG64 output is sorted because NumPy promises that stream for ever, which it does not for
    `Generator.permutation`: a resume under another NumPy sees the same order.
    """
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(raw, kind="stable")


def grouped_order(lengths: Lengths, batch: int, seed: int, epoch: int) -> Indices:
    """A permutation whose successive `batch` examples have similar lengths, longest batch first.

    Pools of 50 batches of a seeded shuffle are sorted by length and cut into batches, and the
    batches are shuffled. The batch with the longest example comes first, so that memory that does
    not suffice shows at once. The incomplete batch, if any, is last and of mixed lengths.
    """
    lengths = np.asarray(lengths)
    count = len(lengths)
    order = _longest_into_a_full_batch(permutation(count, seed, epoch), lengths, batch)
    full = count - count % batch
    # Small sets get smaller pools, else every epoch would have the same batches.
    pool = batch * max(1, min(_BATCHES_PER_POOL, full // batch // 4))
    pool_number = np.arange(full) // pool
    by_length = np.lexsort((-lengths[order[:full]], pool_number))
    batches = order[by_length].reshape(-1, batch)
    batches = batches[permutation(len(batches), seed, epoch, 1)]
    return np.concatenate([_longest_first(batches, lengths).reshape(-1), order[full:]])


def shuffled_order(lengths: Lengths, batch: int, seed: int, epoch: int) -> Indices:
    """A plain seeded shuffle, except that the batch with the longest example comes first."""
    lengths = np.asarray(lengths)
    order = _longest_into_a_full_batch(permutation(len(lengths), seed, epoch), lengths, batch)
    full = len(lengths) - len(lengths) % batch
    batches = _longest_first(order[:full].reshape(-1, batch), lengths)
    return np.concatenate([batches.reshape(-1), order[full:]])


def _longest_into_a_full_batch(
    order: Indices, lengths: npt.NDArray[np.integer], batch: int
) -> Indices:
    """The longest example changes places with the first when it would be in the incomplete batch."""
    full = len(order) - len(order) % batch
    if full == 0:
        return order
    place = int(np.argmax(lengths[order]))
    if place >= full:
        order[[0, place]] = order[[place, 0]]
    return order


def _longest_first(batches: Indices, lengths: npt.NDArray[np.integer]) -> Indices:
    if len(batches) == 0:
        return batches
    first = int(np.argmax(lengths[batches].max(axis=1)))
    batches[[0, first]] = batches[[first, 0]]
    return batches


def deal(step: Indices, number: int, batch_size: int, world: int) -> Iterator[list[Indices]]:
    """The micro-batches of every forward pass of step `number`, by process.

    Args:
        step: The examples, longest first.
        number: Turns the first process, step by step.
        batch_size: Examples per process and forward pass.
        world: The number of processes.
    """
    per_pass = batch_size * world
    for turn, first in enumerate(range(0, len(step), per_pass)):
        # An incomplete pass in equal parts: with 5 for 2 processes 3 and 2, not 4 and 1.
        parts = np.array_split(step[first : first + per_pass], world)
        parts = parts if turn % 2 == 0 else parts[::-1]
        begin = number % world
        yield [*parts[-begin:], *parts[:-begin]] if begin else parts


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The batches of a run: who gets which examples when."""

    lengths: npt.NDArray[np.integer]
    """Tokens of every example, or of every packed row."""
    batch_size: int
    """Examples per process and forward pass."""
    accumulation: int = 1
    """Forward passes per optimizer step."""
    world_size: int = 1
    seed: int = 0
    group_by_length: bool = False

    def __post_init__(self) -> None:
        if len(self.lengths) == 0 or self.global_batch < 1:
            raise ValueError(f"{len(self.lengths)} examples in batches of {self.global_batch}")

    @property
    def global_batch(self) -> int:
        """Examples per optimizer step."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every example is seen once."""
        return -(-len(self.lengths) // self.global_batch)

    @property
    def passes_per_epoch(self) -> int:
        """Forward passes per epoch, the same in every process."""
        in_last_step = (len(self.lengths) - 1) % self.global_batch + 1
        last = -(-in_last_step // (self.batch_size * self.world_size))
        return (self.steps_per_epoch - 1) * self.accumulation + last

    def steps(self, epoch: int) -> Iterator[Indices]:
        """The examples of every optimizer step, longest first."""
        order = (grouped_order if self.group_by_length else shuffled_order)(
            self.lengths, self.global_batch, self.seed, epoch
        )
        for first in range(0, len(order), self.global_batch):
            step = order[first : first + self.global_batch]
            yield step[np.argsort(-self.lengths[step], kind="stable")]

    def dealt(self, epoch: int) -> Iterator[list[Indices]]:
        """The micro-batches of every forward pass, by process."""
        for number, step in enumerate(self.steps(epoch)):
            yield from deal(step, number, self.batch_size, self.world_size)

    def micro_batches(self, epoch: int, rank: int) -> Iterator[list[int]]:
        """What one process gets, forward pass after forward pass; empty where nothing is left for it."""
        for parts in self.dealt(epoch):
            yield parts[rank].tolist()

    def padding(self, epoch: int = 0) -> float:
        """Share of padding among all tokens of an epoch, of all processes, 0..1."""
        parts = [part for turn in self.dealt(epoch) for part in turn]
        sizes = np.array([len(part) for part in parts if len(part)])
        tokens = self.lengths[np.concatenate(parts)].astype(np.int64)
        widths = np.maximum.reduceat(tokens, np.cumsum(sizes) - sizes)
        return 1.0 - int(tokens.sum()) / int((widths * sizes).sum())
