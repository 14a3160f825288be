"""Prompts -> tokens, each handed over when it is there; every prompt with settings of its own.

What chat and the endpoint use: one batch may hold greedy and sampled replies of different lengths.
A greedy reply is that of `finetune.generation.generate`, whatever stands beside it in its batch; a
sampled one depends on its own seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from finetune.distributed.map_batches import evaluating
from finetune.generation.generate import (
    Prompt,
    StopTokens,
    left_padded,
    pixel_values,
    without_sampling_settings,
)


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the tokens of one reply are chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that have this probability together are drawn from."""
    seed: int | None = None
    """Equal seeds draw equal replies; None: another one each time."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt, and who gets its tokens."""

    prompt: Prompt
    decoding: Decoding
    take: Callable[[int], bool]
    """Called with every new token, a stop token too; True ends this reply."""


def decode(model: Any, template: StopTokens, asks: Sequence[Ask]) -> None:
    """Writes the replies to all prompts together, until each has stopped or is long enough."""
    device = model.device
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(ask.decoding.max_new_tokens for ask in asks),
        eos_token_id=list(template.stop_ids),
        pad_token_id=template.pad_id,
        use_cache=True,
    )
    prompts = [ask.prompt for ask in asks]
    with without_sampling_settings(model), evaluating(model):
        model.generate(
            **left_padded(prompts, template.pad_id, device),
            **pixel_values(prompts, device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_choosing(asks, device)]),
            stopping_criteria=StoppingCriteriaList([_handing_over(asks, template.stop_ids)]),
        )


def _handing_over(asks: Sequence[Ask], stop_ids: Sequence[int]) -> Callable[..., torch.Tensor]:
    """A stopping criterion [B, T] -> bool [B] that gives every new token to who asked for it."""
    over = [False] * len(asks)
    lengths = [0] * len(asks)

    def criterion(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        for row, token in enumerate(ids[:, -1].tolist()):
            if over[row]:
                continue
            lengths[row] += 1
            full = lengths[row] >= asks[row].decoding.max_new_tokens
            over[row] = asks[row].take(token) or full or token in stop_ids
        return torch.tensor(over, device=ids.device)

    return criterion


class _Choice:
    """The next token of a sampled reply."""

    def __init__(self, decoding: Decoding, device: torch.device) -> None:
        self._temperature = decoding.temperature
        self._nucleus = TopPLogitsWarper(decoding.top_p) if decoding.top_p < 1 else None
        self._random = torch.Generator(device)
        if decoding.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(decoding.seed)

    def token(self, scores: torch.Tensor) -> torch.Tensor:
        """A token [1] drawn by its scores [V]."""
        warm = ((scores - scores.max()) / self._temperature)[None]
        if self._nucleus is not None:
            warm = self._nucleus(torch.empty(0), warm)
        return torch.multinomial(warm[0].softmax(-1), 1, generator=self._random)


def _choosing(asks: Sequence[Ask], device: torch.device) -> Callable[..., torch.Tensor]:
    """A logits processor [B, V] that leaves a sampled row only the token that was drawn for it."""
    drawn = {
        row: _Choice(ask.decoding, device)
        for row, ask in enumerate(asks)
        if ask.decoding.temperature > 0 and ask.decoding.top_p > 0
    }

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, choice in drawn.items():
            token = choice.token(scores[row])
            scores[row] = float("-inf")
            scores[row, token] = 0.0
        return scores

    return processor
