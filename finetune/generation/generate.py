"""Prompts -> replies: in batches, shared out over the processes. The one stop rule.

B prompts of a batch, T its longest prompt, N new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from finetune.data.chat.image import ImagePrompt
from finetune.distributed.map_batches import Poll, evaluating, longest_first, map_batches
from finetune.distributed.processes import is_sharded
from finetune.errors import DataError
from finetune.generation.batch import Beginning, Choose, Done, Refill

BATCHES_PER_GROUP = 2
"""A group is the work of one process at a time: large enough for refilled rows to pay."""
IMAGES_AT_ONCE = 16
CACHE_BYTES = 4 << 30
"""Keys and values that a batch may hold."""

Prompt: TypeAlias = "Sequence[int] | npt.NDArray[np.int32]"


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


@dataclass(frozen=True, slots=True)
class _Task:
    """One call of `generate`."""

    model: Any
    template: StopTokens
    prompts: Sequence[Prompt]
    max_new_tokens: int
    batch_size: int
    choose: Choose
    should_stop: Poll | None


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
    choose = _chooser(extras.sampling)
    task = _Task(model, template, prompts, max_new_tokens, batch_size, choose, should_stop)
    # One way for all groups of a call, since processes that share weights must go the same way.
    if any(isinstance(prompt, ImagePrompt) for prompt in prompts):
        way, size, budget = _with_images, min(batch_size, IMAGES_AT_ONCE), cache_tokens(model)
    else:
        way, size, budget = _refilling, batch_size * BATCHES_PER_GROUP, None
    groups = plan_batches(lengths, size, max_new_tokens, budget)
    known = extras.log.known() if extras.log else {}
    numbers = {group[0]: number for number, group in enumerate(groups) if number not in known}
    with evaluating(model), without_sampling_settings(model):
        answer = way(task)

        def work(group: list[int]) -> list[Reply]:
            found = [Reply(place, *one) for place, one in zip(group, answer(group), strict=False)]
            if extras.log and len(found) == len(group):
                extras.log.note(numbers[group[0]], found)
            return found

        missing = [groups[number] for number in numbers.values()]
        parts = map_batches(model, missing, work, label="replies", should_stop=should_stop)
    everything = [reply for part in (*known.values(), *parts) for reply in part]
    return sorted(everything, key=lambda reply: reply.index)


def plan_batches(
    lengths: Sequence[int], batch_size: int, max_new_tokens: int, token_budget: int | None = None
) -> list[list[int]]:
    """Indices of prompts batch by batch, longest first.

    So there is little padding, and what does not fit in memory fails at once, not after an hour.

    >>> plan_batches([3, 9, 5, 4], batch_size=2, max_new_tokens=8)
    [[1, 2], [3, 0]]
    """
    batches: list[list[int]] = []
    for index in longest_first(lengths):
        if batches:
            rows, width = len(batches[-1]) + 1, lengths[batches[-1][0]] + max_new_tokens
            if rows <= batch_size and (token_budget is None or rows * width <= token_budget):
                batches[-1].append(index)
                continue
        batches.append([index])
    return batches


def cache_tokens(model: Any) -> int:
    """Tokens whose keys and values fit into `CACHE_BYTES`."""
    config = model.config.get_text_config()
    heads = config.num_hidden_layers * config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(CACHE_BYTES // (2 * heads * size * model.dtype.itemsize))


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


def _refilling(task: _Task) -> Callable[[list[int]], list[Done]]:
    """Texts: finished rows make room at once, and what all prompts begin with is computed once."""
    prompts: Sequence[Any] = task.prompts
    beginning = Beginning(task.model, prompts)

    def answer(group: list[int]) -> list[Done]:
        room = cache_tokens(task.model) // (len(prompts[group[0]]) + task.max_new_tokens)
        batch = Refill(
            task.model,
            stop_ids=task.template.stop_ids,
            max_new_tokens=task.max_new_tokens,
            slots=max(1, min(task.batch_size, room)),
            choose=task.choose,
            beginning=beginning,
        )
        return batch.run([prompts[place] for place in group], group, task.should_stop)

    return answer


def _with_images(task: _Task) -> Callable[[list[int]], list[Done]]:
    """Images: transformers' own loop, which asks the model for their positions."""
    stop_ids, device = task.template.stop_ids, task.model.device
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=task.max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=task.template.pad_id,
        use_cache=True,
    )

    def interrupted(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        stop = task.should_stop is not None and task.should_stop()
        return torch.full((ids.shape[0],), stop, dtype=torch.bool, device=device)

    def answer(group: list[int]) -> list[Done]:
        rows = [task.prompts[place] for place in group]
        inputs = left_padded(rows, task.template.pad_id, device)  # [B, T]

        def chosen(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            tokens = torch.tensor(task.choose(scores, group), device=device)[:, None]
            return torch.full_like(scores, float("-inf")).scatter(1, tokens, 0.0)

        output = task.model.generate(
            **inputs,
            **pixel_values(rows, device),
            generation_config=config,
            logits_processor=LogitsProcessorList([chosen]),
            stopping_criteria=StoppingCriteriaList([interrupted]),
            synced_gpus=is_sharded(task.model),
        )
        new = output[:, inputs["input_ids"].shape[1] :].tolist()  # [B, <= N]
        return [_until_stop(row, stop_ids) for row in new]

    return answer


def _chooser(sampling: Sampling | None) -> Choose:
    """The likeliest tokens, or tokens drawn for each prompt by a generator of its own."""
    if sampling is None:
        return lambda logits, numbers: logits.argmax(dim=-1).tolist()
    generators: dict[int, torch.Generator] = {}

    def drawn(logits: torch.Tensor, numbers: Sequence[int]) -> list[int]:
        likely = (logits.cpu().double() / sampling.temperature).softmax(dim=-1)
        tokens = []
        for row, number in zip(likely, numbers, strict=True):
            if number not in generators:
                seed = (sampling.seed * 1_000_003 + sampling.first + number) % 2**63
                generators[number] = torch.Generator().manual_seed(seed)
            tokens.append(int(torch.multinomial(row, 1, generator=generators[number])))
        return tokens

    return drawn


def _until_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    return tuple(ids[:end]), end is not None


def left_padded(
    prompts: Sequence[Prompt], pad_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` [B, T] of prompts of unlike lengths."""
    width = max(len(prompt) for prompt in prompts)
    rows = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def pixel_values(prompts: Sequence[Prompt], device: torch.device) -> dict[str, torch.Tensor]:
    """`pixel_values` and the like of the prompts that show an image; nothing when none does."""
    shown = [prompt for prompt in prompts if isinstance(prompt, ImagePrompt)]
    if not shown:
        return {}
    arrays = shown[0].spec.arrays([(prompt.path, "a prompt") for prompt in shown])
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


@contextmanager
def without_sampling_settings(model: Any) -> Iterator[None]:
    """Takes the checkpoint's own generation settings away for a while.

    transformers fills what our GenerationConfig leaves open from the model's, which comes from
    generation_config.json (temperature, repetition penalty, max_length).
    """
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    owners = [owner for owner in (inside, model) if "generation_config" in vars(owner)]
    configs = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in zip(owners, configs, strict=True):
            owner.generation_config = config
