"""A list of prompts -> their replies: in groups, shared out over the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from finetune.distributed.map_batches import Poll, evaluating, longest_first, map_batches
from finetune.distributed.processes import is_sharded
from finetune.errors import DataError
from finetune.generation.batch import Prompt, SharedPrefix, head_size
from finetune.generation.decoder import Constraint, Decoding, Request, write_replies

BATCHES_PER_GROUP = 2
"""A group is the work of one process at a time: large enough for refilled rows to pay."""
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
class Sampling:
    """Tokens drawn by their probability; a reply depends on its prompt's number and the seed alone."""

    temperature: float
    """Above 0; small values stay near the likeliest token."""
    seed: int = 0
    first: int = 0
    """Number of the first prompt among all that are asked."""

    def decoding(self, max_new_tokens: int, number: int) -> Decoding:
        """That of prompt `number` of this call."""
        seed = (self.seed * 1_000_003 + self.first + number) % 2**63
        return Decoding(max_new_tokens, self.temperature, seed=seed)


class GroupLog(Protocol):
    """Keeps finished groups of one list of prompts, so that they are not generated again."""

    def known(self) -> dict[int, list[Reply]]:
        """Groups that are there already, by number; the same on every process."""

    def note(self, number: int, group: list[Reply]) -> None:
        """Keeps a group that this process finished."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What most callers of `generate` do without."""

    sampling: Sampling | None = None
    """Without it a reply is greedy."""
    log: GroupLog | None = None
    constraint_at: Callable[[int], Constraint | None] | None = None
    """What the reply to a prompt may be, by the prompt's number in the list."""

    def request(self, prompt: Prompt, number: int, max_new_tokens: int) -> Request:
        """What is asked of prompt `number`."""
        decoding = Decoding(max_new_tokens)
        if self.sampling is not None:
            decoding = self.sampling.decoding(max_new_tokens, number)
        constraint = self.constraint_at(number) if self.constraint_at is not None else None
        return Request(prompt, decoding, constraint=constraint)


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

    All processes call this together with the same arguments. Groups of prompts are dealt out to them;
    what a group is, and so every tensor, does not depend on the number of processes.

    Args:
        model: a causal language model, PEFT or not, not wrapped by DDP or DeepSpeed.
        template: gives the stop ids and the padding id.
        prompts: token ids, each ending where a reply begins.
        max_new_tokens: N; a reply that is cut here has not stopped.
        batch_size: prompts at once; fewer where their cache would take more than `CACHE_BYTES`.
        should_stop: polled at every new token and, by all processes together, after every group.
        extras: sampling, and a log of finished groups.

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens` in the model's context.
        EvaluationStoppedError: `should_stop` returned True on some process.
    """
    lengths = [len(prompt) for prompt in prompts]
    check_context(model, lengths, max_new_tokens)
    groups = plan_batches(lengths, batch_size * BATCHES_PER_GROUP)
    known = extras.log.known() if extras.log else {}
    numbers = {group[0]: number for number, group in enumerate(groups) if number not in known}
    with evaluating(model):
        prefix = SharedPrefix(model, prompts if numbers else [])

        def work(group: list[int]) -> list[Reply]:
            room = cache_tokens(model) // (lengths[group[0]] + max_new_tokens)
            rows = write_replies(
                model,
                template.stop_ids,
                [extras.request(prompts[index], index, max_new_tokens) for index in group],
                # Weights that are gathered layer by layer are gathered for as many rows as have room.
                slots=max(1, room if is_sharded(model) else min(batch_size, room)),
                prefix=prefix,
                should_stop=should_stop,
            )
            replies = [
                Reply(index, tuple(row.ids), row.stopped)
                for index, row in zip(group, rows, strict=False)
            ]
            if extras.log and len(replies) == len(group):
                extras.log.note(numbers[group[0]], replies)
            return replies

        missing = [groups[number] for number in numbers.values()]
        parts = map_batches(model, missing, work, label="replies", should_stop=should_stop)
    everything = [reply for part in (*known.values(), *parts) for reply in part]
    return sorted(everything, key=lambda reply: reply.index)


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of prompts batch by batch, longest first.

    So there is little padding, and what does not fit in memory fails at once, not after an hour.

    >>> plan_batches([3, 9, 5, 4], batch_size=2)
    [[1, 2], [3, 0]]
    """
    order = longest_first(lengths)
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def cache_tokens(model: Any) -> int:
    """Tokens whose keys and values fit into `CACHE_BYTES`."""
    config = model.config.get_text_config()
    heads = config.num_hidden_layers * config.num_key_value_heads
    return int(CACHE_BYTES // (2 * heads * head_size(config) * model.dtype.itemsize))


def check_context(
    model: Any,
    lengths: Sequence[int],
    max_new_tokens: int,
    names: Sequence[str] | None = None,
) -> None:
    """Raises DataError naming the prompts that leave no room for `max_new_tokens`."""
    limit = context_length(model)
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
    config = model.config
    for name in ("max_position_embeddings", "seq_length"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None
