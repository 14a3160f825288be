"""Prompts -> replies: greedy, in batches, shared out over the processes. The one stop rule.

B prompts of a batch, T its longest prompt, N new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, StoppingCriteriaList

from finetune.data.image import ImagePrompt
from finetune.errors import DataError
from finetune.evaluation.turns import Poll, in_turns, longest_first, sharded

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


def generate(
    model: Any,
    template: StopTokens,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    token_budget: int | None = None,
    should_stop: Poll | None = None,
) -> list[Reply]:
    """The greedy reply to every prompt, in the order of `prompts`, on every process.

    All processes call this together with the same arguments.

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
        EvaluationStoppedError: `should_stop` returned True on some process.
    """
    lengths = [len(prompt) for prompt in prompts]
    check_context(model, lengths, max_new_tokens)
    batches = plan_batches(lengths, batch_size, max_new_tokens, token_budget)

    def answer(batch: list[int]) -> list[Reply]:
        rows = [prompts[index] for index in batch]
        answers = _generate_batch(model, template, rows, max_new_tokens, should_stop)
        return [Reply(index, *one) for index, one in zip(batch, answers, strict=True)]

    with without_sampling_settings(model):
        parts = in_turns(model, batches, answer, label="replies", should_stop=should_stop)
    return sorted((reply for part in parts for reply in part), key=lambda reply: reply.index)


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


def _generate_batch(
    model: Any,
    template: StopTokens,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    should_stop: Poll | None,
) -> list[tuple[tuple[int, ...], bool]]:
    """New tokens before the stop, and whether there was one, for every prompt of a batch."""
    inputs = left_padded(prompts, template.pad_id, model.device)  # [B, T]
    inputs |= pixel_values(prompts, model.device)
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
        synced_gpus=sharded(model),
    )
    new = output[:, inputs["input_ids"].shape[1] :].tolist()  # [B, <= N]
    return [_until_stop(row, template.stop_ids) for row in new]


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
    """`pixel_values` [N, 3, H, W] of the prompts that show an image; nothing when none does."""
    pixels = [prompt.pixels() for prompt in prompts if isinstance(prompt, ImagePrompt)]
    return {"pixel_values": torch.from_numpy(np.stack(pixels)).to(device)} if pixels else {}


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
