"""Windows of prompts -> their replies: in batches of like length, which the processes take in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from typing import Any, Literal, Protocol, TypeAlias

from finetune import console
from finetune.distributed.device import free_bytes
from finetune.distributed.map_batches import Collected, Deal, Poll, evaluating
from finetune.distributed.processes import (
    broadcast_from_rank0,
    is_rank0,
    is_sharded,
    rank_and_world,
    reduce_max,
)
from finetune.errors import DataError
from finetune.generation.batch import Prompt, SharedPrefix, beginnings, cached_sizes
from finetune.generation.decoder import Constraint, Decoding, Request, write_replies
from finetune.generation.prompts import window_size
from finetune.generation.settings import Sampling
from finetune.models.kernels.products import packed

Row: TypeAlias = "list[Any]"
"""A reply as JSON holds it: index, ids, whether it stopped."""

POSITIONS = ("max_position_embeddings", "seq_length")
"""What a config calls them."""
MOST_ROWS = 128
"""Of `evaluation.batch_size: auto`: more gain little, and leave processes without a batch."""
FULL_BATCH, LEAST_BATCHES = 32, 8
"""Smaller batches are dealt together up to so many prompts, while so many shares are left to deal."""
CACHE_BYTES = 4 << 30
"""Keys and values that a batch may hold."""


class StopTokens(Protocol):
    """The part of a ChatTemplate that generation needs."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a reply."""

    @property
    def pad_id(self) -> int:
        """The id that fills the left of short prompts."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model answered to one prompt."""

    index: int
    """Place of the prompt in the list that was given."""
    ids: tuple[int, ...]
    """New tokens before the stop; neither stop nor padding is among them."""
    stopped: bool
    """A stop token came within `max_new_tokens`."""


@dataclass(frozen=True, slots=True)
class SeededSampling:
    """Tokens drawn by their probability; a reply depends on its prompt's number and the seed alone."""

    how: Sampling
    seed: int = 0
    first: int = 0
    """Number of the first prompt among all that are asked."""

    @classmethod
    def at(cls, temperature: float, seed: int = 0) -> SeededSampling:
        """With a temperature alone."""
        return cls(Sampling(temperature), seed)

    def decoding(self, max_new_tokens: int, number: int) -> Decoding:
        """That of prompt `number` of this call."""
        seed = (self.seed * 1_000_003 + self.first + number) % 2**63
        return Decoding(max_new_tokens, seed=seed, **asdict(self.how))


@dataclass(frozen=True, slots=True)
class Extras:
    """What most callers do without."""

    sampling: SeededSampling | None = None
    """Without it a reply is greedy."""
    constraint_at: Callable[[int], Constraint | None] | None = None
    """What the reply to a prompt may be, by the prompt's number in the list."""

    def behind(self, first: int) -> Extras:
        """The same for a list that begins with prompt `first` of this one's."""
        sampling, constraint_at = self.sampling, self.constraint_at
        if sampling is not None:
            sampling = replace(sampling, first=sampling.first + first)
        at = None if constraint_at is None else (lambda number: constraint_at(first + number))
        return Extras(sampling, at)

    def request(self, prompt: Prompt, number: int, max_new_tokens: int) -> Request:
        """What is asked of prompt `number`."""
        decoding = Decoding(max_new_tokens)
        if self.sampling is not None:
            decoding = self.sampling.decoding(max_new_tokens, number)
        constraint = self.constraint_at(number) if self.constraint_at is not None else None
        return Request(prompt, decoding, constraint=constraint)


@dataclass(frozen=True, slots=True)
class Window:
    """Prompts that are sorted by length together."""

    prompts: Sequence[Prompt]
    extras: Extras = Extras()
    known: Mapping[int, list[Row]] = field(default_factory=dict)
    """Batches whose replies are there already, by number."""


class Generator:
    """A model that answers windows of prompts, computed by all processes together.

    What a batch is, and so every tensor, does not depend on the number of processes.
    """

    def __init__(
        self,
        model: Any,
        template: StopTokens,
        *,
        max_new_tokens: int,
        batch_size: int,
        should_stop: Poll | None = None,
    ) -> None:
        self._model = model
        self._stop_ids = template.stop_ids
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size
        self._should_stop = should_stop
        self._bar = console.ProgressBar(None, "replies")
        self.prompts_per_rank = [0] * rank_and_world()[1]
        """How many prompts each process has answered; known on rank 0."""

    def replies(
        self,
        windows: Iterable[Window],
        *,
        note: Callable[[int, list[Row]], object] = lambda *_: None,
        total: int | None = None,
    ) -> Iterator[list[Reply]]:
        """The replies to each window's prompts, in their order; on rank 0, nothing elsewhere.

        All processes call this together, with equal windows, and go through it to the end.

        Args:
            windows: what is asked.
            note: told of every batch of the window that comes next, as soon as rank 0 has it.
            total: of prompts, if it is known.
        """
        done: list[Reply] = []
        with evaluating(self._model), packed(self._model), console.progress(total, "replies") as bar:  # fmt: skip
            self._bar = bar
            for batch, rows in self._answered(windows):
                if batch.known is None:
                    note(batch.number, rows)
                done += [Reply(index, tuple(ids), stopped) for index, ids, stopped in rows]
                bar.advance(len(rows))
                if batch.is_last:
                    yield sorted(done, key=lambda reply: reply.index)
                    done = []

    def _answered(self, windows: Iterable[Window]) -> Iterator[tuple[_Batch, list[Row]]]:
        """Every batch with its replies, in their order, on rank 0 as they come."""
        queue = _Queue(self.prompts_per_rank)
        deal: Deal[_Batch] = Deal(in_step=is_sharded(self._model), should_stop=self._should_stop)
        for batches in self._cut(windows):
            queue.expect(batches)
            for batch, counts in deal.window([one for one in batches if one.known is None]):
                rows = self._write(batch)
                if counts and len(rows) == len(batch.indices):
                    queue.put(batch, rows)
                yield from queue.arrived()
            if deal.stopped:
                break
        deal.finish()
        yield from queue.arrived()

    def _cut(self, windows: Iterable[Window]) -> Iterator[list[_Batch]]:
        keys = count()
        for window in windows:
            opened = _OpenWindow(window)
            plan = plan_batches(window.prompts, self._batch_size)
            yield [
                _Batch(opened, number, indices, next(keys), is_last=number == len(plan) - 1)
                for number, indices in enumerate(plan)
            ]

    def _write(self, batch: _Batch) -> list[Row]:
        """The replies of one batch; fewer when `should_stop` returned True."""
        prompts, extras = batch.window.of.prompts, batch.window.of.extras
        longest = max(len(prompts[index]) for index in batch.indices) + self._max_new_tokens
        rows = write_replies(
            self._model,
            self._stop_ids,
            [extras.request(prompts[i], i, self._max_new_tokens) for i in batch.indices],
            slots=max(1, min(self._batch_size, cache_tokens(self._model) // longest)),
            prefix=batch.window.prefix(self._model),
            should_stop=self._polled,
        )
        return [
            [index, row.ids, row.stopped] for index, row in zip(batch.indices, rows, strict=False)
        ]

    def _polled(self) -> bool:
        """Whether to stop; asked at every token, so that a long first batch shows a sign of life too."""
        self._bar.advance(0)
        return self._should_stop is not None and self._should_stop()


class _OpenWindow:
    """A window, and what its prompts begin with once that is computed."""

    def __init__(self, window: Window) -> None:
        self.of = window
        self._prefix: SharedPrefix | None = None

    def prefix(self, model: Any) -> SharedPrefix:
        if self._prefix is None:
            self._prefix = SharedPrefix(model, self.of.prompts)
        return self._prefix


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one process computes at a time."""

    window: _OpenWindow
    number: int
    """In its window."""
    indices: list[int]
    key: int
    """Number among the batches of all windows."""
    is_last: bool
    """Of its window."""

    @property
    def known(self) -> list[Row] | None:
        rows = self.window.of.known.get(self.number)
        # Another version of the program may have cut batches otherwise.
        return rows if rows is not None and {row[0] for row in rows} == {*self.indices} else None


class _Queue:
    """Batches on their way: rank 0 gets them with their replies, in their order."""

    def __init__(self, prompts_per_rank: list[int]) -> None:
        self._collected = Collected()
        self._prompts_per_rank = prompts_per_rank
        self._leads = is_rank0()
        self._waiting = deque[_Batch]()

    def expect(self, batches: Iterable[_Batch]) -> None:
        """What comes next."""
        if self._leads:
            self._waiting.extend(batches)

    def put(self, batch: _Batch, rows: list[Row]) -> None:
        """The replies of a batch that this process computed."""
        self._collected.put(batch.key, rows)

    def arrived(self) -> Iterator[tuple[_Batch, list[Row]]]:
        """On rank 0 the batches that come next and are there."""
        while self._waiting:
            batch = self._waiting[0]
            rows = batch.known
            if rows is None:
                found = self._collected.take(batch.key)
                if found is None:
                    return
                rank, rows = found
                self._prompts_per_rank[rank] += len(rows)
            yield self._waiting.popleft(), rows


def generate(
    model: Any,
    template: StopTokens,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    should_stop: Poll | None = None,
    extras: Extras = Extras(),
) -> list[Reply]:
    """The reply to every prompt, in the order of `prompts`, on every process.

    All processes call this together with the same arguments.

    Args:
        model: a causal language model, PEFT or not, not wrapped by DDP or DeepSpeed.
        template: gives the stop ids and the padding id.
        prompts: token ids, each ending where a reply begins.
        max_new_tokens: N; a reply that is cut here has not stopped.
        batch_size: prompts at once; fewer where their cache would take more than `CACHE_BYTES`.
        should_stop: polled at every new token and behind every batch.
        extras: sampling, and what replies may be.

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens` in the model's context.
        EvaluationStoppedError: `should_stop` returned True on some process.
    """
    check_context(context_length(model), [len(prompt) for prompt in prompts], max_new_tokens)
    size = window_size(batch_size)
    firsts = range(0, len(prompts), size)
    windows = (Window(prompts[first : first + size], extras.behind(first)) for first in firsts)
    generator = Generator(
        model, template,
        max_new_tokens=max_new_tokens, batch_size=batch_size, should_stop=should_stop,
    )  # fmt: skip
    answered = list(generator.replies(windows, total=len(prompts)))  # to its end, everywhere
    found = [
        replace(reply, index=first + reply.index)
        for first, replies in zip(firsts, answered, strict=False)
        for reply in replies
    ]
    return broadcast_from_rank0(lambda: found)


def plan_batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[int]]:
    """Indices of prompts batch by batch, longest first, each followed by those that it begins with.

    So there is little padding, and what does not fit in memory fails at once, not after an hour. Small
    batches are dealt several together, where there are many, so that a row that ends makes room for the next.

    >>> plan_batches([[1] * 3, [2] * 9, [2] * 5, [4] * 4], batch_size=2)
    [[1, 2], [3, 0]]
    """
    holders = beginnings(prompts)
    order = sorted(
        range(len(prompts)), key=lambda i: (-len(prompts[holders[i]]), holders[i], -len(prompts[i]))
    )
    together = min(FULL_BATCH // batch_size, len(prompts) // (LEAST_BATCHES * batch_size))
    size = batch_size * max(1, together)
    return [order[at : at + size] for at in range(0, len(order), size)]


def rows_at_once(model: Any, asked: int | Literal["auto"], longest: int) -> int:
    """`evaluation.batch_size` as a number, the same in every process.

    Args:
        model: on its device.
        asked: `auto` is a power of two whose rows take half of what is free where least is.
        longest: tokens of a prompt and its reply.
    """
    if asked != "auto":
        return asked
    free = -reduce_max([-free_bytes()])[0]
    rows = min(MOST_ROWS, cache_tokens(model, free // 2) // longest)
    return 1 << max(0, rows.bit_length() - 1)


def cache_tokens(model: Any, size: int | None = None) -> int:
    """Tokens whose keys and values fit into `size` bytes, by default `CACHE_BYTES`."""
    config = model.config.get_text_config()
    numbers = config.num_hidden_layers * sum(heads * each for heads, each in cached_sizes(config))
    return int((CACHE_BYTES if size is None else size) // (numbers * model.dtype.itemsize))


def check_context(
    limit: int | None,
    lengths: Sequence[int],
    max_new_tokens: int,
    names: Sequence[str] | None = None,
) -> None:
    """Raises DataError naming the prompts that leave no room for `max_new_tokens` in `limit` positions."""
    too_long = [i for i, length in enumerate(lengths) if limit and length + max_new_tokens > limit]
    if not too_long:
        return
    lines = [
        f"{names[i] if names else f'prompt {i}'}: {lengths[i]} tokens + {max_new_tokens} new ones"
        for i in too_long[:10]
    ]
    if len(too_long) > len(lines):
        lines.append(f"... and {len(too_long) - len(lines)} more")
    raise DataError(
        f"{len(too_long)} of {len(lengths)} prompts do not fit into the model's {limit} positions; "
        f"lower max_new_tokens or leave them out:\n  " + "\n  ".join(lines)
    )


def context_length(model: Any) -> int | None:
    """Positions that the model was made for, when its config says so."""
    found = (getattr(model.config, name, None) for name in POSITIONS)
    return next((value for value in found if isinstance(value, int)), None)
