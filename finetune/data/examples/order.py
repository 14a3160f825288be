"""In which order examples are seen: a function of (seed, epoch) and the global batch only.

Whatever way a global batch is split into processes, accumulation steps and micro-batches, the
examples of one optimizer step are the same. A resume needs to know nothing but (epoch, step).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Lengths = Sequence[int] | npt.NDArray[np.integer]
Indices = npt.NDArray[np.int64]

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


class EpochPlan:
    """The sampler of a training run: yields example indices, global batch after global batch.

    `DataLoader(dataset, sampler=plan, batch_size=per_device)` cuts it into micro-batches, and
    accelerate deals these to the ranks in turn: with p ranks and accumulation a, optimizer step s
    gets the micro-batches [s*a*p, (s+1)*a*p), which is global batch s. Within a global batch
    lengths fall, so micro-batches of one moment are alike: less padding, ranks wait less.

    Every global batch is full: the last one is filled up with examples of the same epoch
    (`num_repeated` of them), otherwise its size would depend on how the ranks are dealt to.
    """

    def __init__(
        self, lengths: Lengths, global_batch: int, seed: int, *, group_by_length: bool
    ) -> None:
        if len(lengths) == 0 or global_batch < 1:
            raise ValueError(f"{len(lengths)} examples in global batches of {global_batch}")
        self._lengths = np.asarray(lengths)
        self._order = grouped_order if group_by_length else shuffled_order
        self._global_batch = global_batch
        self._seed = seed
        self._epoch = 0
        self.num_repeated = -len(lengths) % global_batch
        self.steps_per_epoch = -(-len(lengths) // global_batch)

    def __len__(self) -> int:
        return self.steps_per_epoch * self._global_batch

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches(self._epoch):
            yield from batch.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration; called by the Trainer's data loader."""
        self._epoch = epoch

    def batches(self, epoch: int) -> Indices:
        """Example indices of every optimizer step of an epoch, [steps, global batch]."""
        order = self._order(self._lengths, self._global_batch, self._seed, epoch)
        again = permutation(len(order), self._seed, epoch, 2)
        last = order[len(order) - len(order) % self._global_batch :]
        others = again[~np.isin(again, last)] if len(last) < len(order) else again
        order = np.concatenate([order, np.resize(others, self.num_repeated)])
        batches = order.reshape(self.steps_per_epoch, self._global_batch)
        falling = np.argsort(-self._lengths[batches], axis=1, kind="stable")
        return np.take_along_axis(batches, falling, axis=1)


def padding_share(lengths: Lengths, plan: EpochPlan, per_device: int) -> float:
    """Share of padding among all tokens of an epoch's micro-batches of `per_device`, 0..1."""
    micro_batches = np.asarray(lengths)[plan.batches(0)].reshape(-1, per_device)
    padded = int(micro_batches.max(axis=1).sum()) * per_device
    return 1.0 - int(micro_batches.sum()) / padded
