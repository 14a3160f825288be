"""How fast a model reads prompts and writes replies, and what it holds in memory, by the prompt's length.

The prompt's tokens are drawn at random, so that no kept beginning saves anything, and the reply goes on
whatever stop comes. One row at a time: what a single user meets.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune import console
from finetune.errors import ConfigError
from finetune.generation.settings import HERE, Placement


@dataclass(frozen=True, slots=True)
class Speed:
    """One length."""

    length: int
    """Tokens of the prompt."""
    seconds_to_first: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    memory_gb: float
    """The most that the accelerator, or the process on a CPU, has held so far, weights included."""


def lengths_of(text: str) -> list[int]:
    """Lengths from `1k..128k`, which doubles, or `1k,3000`; ConfigError for anything else."""
    ends = text.split("..")
    if len(ends) == 2:
        low, high = map(_tokens, ends)
        return [low << n for n in range(64) if low << n <= high] or [low]
    return [_tokens(part) for part in text.split(",")]


def bench(
    target: str,
    lengths: Sequence[int],
    *,
    new_tokens: int = 64,
    base: str | None = None,
    placement: Placement = HERE,
) -> dict[str, Any]:
    """The speeds of a model by length, shown as they come and returned.

    A length that does not fit the model's context, or the memory, is named and left out with all longer ones.

    Raises:
        ModelError: `target` cannot be opened.
    """
    import torch

    from finetune.distributed.map_batches import evaluating
    from finetune.generation.generate import context_length
    from finetune.generation.load import open_model
    from finetune.models.kernels.products import packed

    opened = open_model(target, base=base, placement=placement)
    limit = context_length(opened.model)
    found: list[Speed] = []
    with evaluating(opened.model), packed(opened.model):
        _measure(opened.model, opened.template, 64, 8)  # what is made once is no length's cost
        for length in sorted(set(lengths)):
            if limit is not None and length + new_tokens > limit:
                console.say(f"{length:,} tokens and {new_tokens} new ones are over the context of {limit:,}; left out")  # fmt: skip
                break
            try:
                found.append(_measure(opened.model, opened.template, length, new_tokens))
            except torch.OutOfMemoryError:
                console.say(f"{length:,} tokens do not fit into memory; left out with longer ones")
                break
            console.say(_said(found[-1]))
    return {"model": target, "new_tokens": new_tokens, "lengths": [asdict(one) for one in found]}


def _measure(model: Any, template: Any, length: int, new_tokens: int) -> Speed:
    import torch

    from finetune.distributed import device as devices
    from finetune.generation.decoder import Decoder, Decoding, Request

    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(min(1000, template.tokenizer.vocab_size), (length,), generator=generator)
    decoder = Decoder(model, (), drafts=False)  # what is drafted depends on the text
    begun = _now()
    [row] = decoder.add([Request(prompt.tolist(), Decoding(new_tokens))])
    read = _now()
    while decoder.active:
        decoder.step()
    written = _now()
    if row.error is not None:
        raise row.error
    return Speed(
        length,
        read - begun,
        length / (read - begun),
        (len(row.ids) - 1) / (written - read),
        devices.memory_gb(),
    )


def _now() -> float:
    """The time when the device has done all that it was asked for."""
    from finetune.distributed import device as devices

    devices.synchronize()
    return time.perf_counter()


def _said(speed: Speed) -> str:
    return (
        f"{speed.length:>9,} tokens: read at {speed.prefill_tokens_per_second:,.0f} tokens/s, "
        f"first token after {speed.seconds_to_first:.2f} s, written at "
        f"{speed.decode_tokens_per_second:,.1f} tokens/s, {speed.memory_gb:.1f} GB"
    )


def _tokens(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+)\s*([kK]?)\s*", text)
    if not found or int(found[1]) == 0:
        raise ConfigError(f"--lengths {text!r}: write tokens such as 4000 or 4k, or a range such as 1k..128k")  # fmt: skip
    return int(found[1]) * (1024 if found[2] else 1)
