"""Attention as one kernel, for counting: shapes, bytes and FLOPs of a flash-like kernel, no numbers.

Legend: B rows, T tokens, S keys, H heads, G key/value heads, C channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("finetune_planning::attention", mutates_args=())
def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    raise RuntimeError("this attention only has shapes")


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Any:
    rows, heads, tokens, _ = query.shape
    # Laid out [B, T, H, C], as flash attention does, so that turning it back copies nothing.
    out = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(rows, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("finetune_planning::attention_backward", mutates_args=())
def _backward(  # noqa: PLR0913 - what a backward kernel takes
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor,
    mask: Tensor | None, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    raise RuntimeError("this attention only has shapes")


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Any:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, is_causal = inputs
    ctx.save_for_backward(query, key, value, *output, mask)
    ctx.is_causal = is_causal


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, sums, mask = ctx.saved_tensors
    return *_backward(grad, query, key, value, out, sums, mask, ctx.is_causal), None, None


_attention.register_autograd(_gradients, setup_context=_remember)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor:
    """[B, H, T, C] of queries [B, H, T, C] and keys and values [B, G, S, C]."""
    out: Tensor = _attention(query, key, value, mask, is_causal)[0]
    return out


def _products(query: Tensor, key: Tensor, is_causal: bool) -> int:
    """Multiply-adds of scores and of their product with the values, twice: FLOPs of a forward pass."""
    rows, heads, tokens, channels = query.shape
    flops = 4 * rows * heads * tokens * key.shape[2] * channels
    return flops // 2 if is_causal else flops


def _forward_flops(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> int:
    return _products(query, key, is_causal)


def _backward_flops(grad: Tensor, query: Tensor, key: Tensor, *rest: Any) -> int:
    # Five products instead of two: the scores again, and the gradients of four operands.
    return _products(query, key, rest[-1]) * 5 // 2


def _documents_flops(query: Tensor, key: Tensor, documents: int, *, is_causal: bool) -> int:
    """Of `varlen_attn`, torch's kernel for documents: queries [tokens, H, C] and keys [keys, G, C], all of one length.

    Causal is that the last query sees the last key.
    """
    tokens, heads, channels = query.shape
    seen = tokens * key.shape[0] // documents
    if is_causal:
        seen -= tokens * tokens // (2 * documents)
    return 4 * heads * seen * channels


def _documents_forward_flops(query: Tensor, key: Tensor, _: Tensor, *rest: Any) -> int:
    """What follows the values: borders of queries and keys, the longest of each, whether it is causal."""
    return _documents_flops(query, key, len(rest[0]) - 1, is_causal=rest[4])


def _documents_backward_flops(_: Tensor, query: Tensor, key: Tensor, *rest: Any) -> int:
    return _documents_flops(query, key, len(rest[3]) - 1, is_causal=rest[7]) * 5 // 2


FLOPS: dict[str, Callable[..., int]] = {
    "attention": _forward_flops,
    "attention_backward": _backward_flops,
    "_varlen_attn": _documents_forward_flops,
    "_varlen_attn_backward": _documents_backward_flops,
}
"""By the operation's name, of its arguments."""
