"""Prompts -> replies: greedy, in batches, shared out over the processes. The one stop rule.

B prompts of a batch, T its longest prompt, N new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import GenerationConfig, StoppingCriteriaList

from finetune import console
from finetune.errors import DataError, FinetuneError

Poll = Callable[[], bool]


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


class GenerationStoppedError(FinetuneError):
    """`should_stop` said so before all replies were there; what was generated is dropped."""


def generate(
    model: Any,
    template: StopTokens,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    token_budget: int | None = None,
    should_stop: Poll | None = None,
) -> list[Reply]:
    """The greedy reply to every prompt, in the order of `prompts`, on every process.

    Batches depend on the prompts alone, never on the number of processes, so that one process and
    eight compute the same numbers. All processes call this together with the same arguments.

    Args:
        model: a causal language model, PEFT or not, not wrapped by DDP or DeepSpeed.
        template: gives the stop ids and the padding id.
        prompts: token ids, each ending where a reply begins.
        max_new_tokens: N; a reply that is cut here has not stopped.
        batch_size: prompts per batch.
        token_budget: bound on B x (T + N), to keep the cache of a batch in memory.
        should_stop: polled at every new token and, by all processes together, after every batch.

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens` in the model's context.
        GenerationStoppedError: `should_stop` returned True on some process.
    """
    lengths = [len(prompt) for prompt in prompts]
    check_context(model, lengths, max_new_tokens)
    batches = plan_batches(lengths, batch_size, max_new_tokens, token_budget)
    rank, world = _place()
    sharded = world > 1 and has_sharded_weights(model)
    replies: list[Reply] = []
    with _ready_to_generate(model), console.progress(len(prompts), "replies") as bar:
        for first in range(0, len(batches), world):
            turn = batches[first : first + world]
            # Every process must run every forward pass when each holds a part of the weights: one
            # without a batch in the last turn repeats another's and forgets the result.
            mine = turn[rank] if rank < len(turn) else []
            if mine or sharded:
                batch = [prompts[index] for index in mine or turn[0]]
                answers = _generate_batch(model, template, batch, max_new_tokens, should_stop)
                pairs = zip(mine, answers, strict=False)
                replies += [Reply(index, *answer) for index, answer in pairs]
            if _anywhere(model, should_stop is not None and should_stop()):
                raise GenerationStoppedError(
                    f"generation was stopped after {first + len(turn)} of {len(batches)} batches"
                )
            bar.advance(sum(len(batch) for batch in turn))
    return sorted(_gather(replies), key=lambda reply: reply.index)


def plan_batches(
    lengths: Sequence[int], batch_size: int, max_new_tokens: int, token_budget: int | None = None
) -> list[list[int]]:
    """Indices of prompts batch by batch, longest first.

    So there is little padding, and what does not fit in memory fails at once, not after an hour.

    >>> plan_batches([3, 9, 5, 4], batch_size=2, max_new_tokens=8)
    [[1, 2], [3, 0]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches:
            rows, width = len(batches[-1]) + 1, lengths[batches[-1][0]] + max_new_tokens
            if rows <= batch_size and (token_budget is None or rows * width <= token_budget):
                batches[-1].append(index)
                continue
        batches.append([index])
    return batches


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


def has_sharded_weights(model: Any) -> bool:
    """True under ZeRO-3, where a forward pass is an affair of all processes."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _generate_batch(
    model: Any,
    template: StopTokens,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    should_stop: Poll | None,
) -> list[tuple[tuple[int, ...], bool]]:
    """New tokens before the stop, and whether there was one, for every prompt of a batch."""
    inputs = _left_padded(prompts, template.pad_id, model.device)  # [B, T]
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(template.stop_ids),
        pad_token_id=template.pad_id,
        use_cache=True,
    )

    def interrupted(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        stop = should_stop is not None and should_stop()
        return torch.full((ids.shape[0],), stop, dtype=torch.bool, device=ids.device)

    output = model.generate(
        **inputs,
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([interrupted]),
        synced_gpus=_place()[1] > 1 and has_sharded_weights(model),
    )
    new = output[:, inputs["input_ids"].shape[1] :].tolist()  # [B, <= N]
    return [_until_stop(row, template.stop_ids) for row in new]


def _until_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    return tuple(ids[:end]), end is not None


def _left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    rows = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


@contextmanager
def _ready_to_generate(model: Any) -> Iterator[None]:
    """Evaluation mode without the checkpoint's own sampling settings; all of it restored after.

    Evaluation mode ends dropout and activation checkpointing (and so brings the cache back).
    transformers fills what our GenerationConfig leaves open from the model's, which comes from
    generation_config.json (temperature, repetition penalty, max_length).
    """
    modes = [(module, module.training) for module in model.modules()]
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    owners = [owner for owner in (inside, model) if "generation_config" in vars(owner)]
    configs = [owner.generation_config for owner in owners]
    model.eval()
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in zip(owners, configs, strict=True):
            owner.generation_config = config
        for module, training in modes:
            module.training = training


def _place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _anywhere(model: Any, here: bool) -> bool:
    """Whether `here` is true on any process; keeps the processes within one batch of each other."""
    if _place()[1] == 1:
        return here
    flag = torch.tensor(float(here), device=model.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _gather(replies: list[Reply]) -> list[Reply]:
    """The replies of all processes."""
    world = _place()[1]
    if world == 1:
        return replies
    parts: list[list[Reply]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, replies)
    return [reply for part in parts for reply in part]
