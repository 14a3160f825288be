"""The kernels as operations of torch: with shapes for whoever only counts, with their own gradients.

Each is a `torch.library` operation, so that shape-only tensors pass through it (`planning.counting`
sees one kernel), and a function around it that torch can differentiate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PROGRAMS = 528
"""Programs that share the rows of a norm's backward pass: four for each of an H100's processors."""
WIDEST_BLOCK = 4096

library: Any = torch.library.Library("glm4_finetune", "DEF")  # type: ignore[no-untyped-call]
library.define("rms_norm(Tensor x, Tensor weight, float eps, bool first) -> (Tensor, Tensor)")
library.define("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, bool trained) -> (Tensor, Tensor)")  # fmt: skip
library.define("swiglu(Tensor x) -> Tensor")
library.define("swiglu_backward(Tensor grad, Tensor x) -> Tensor")
library.define("rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor")
library.define("cross_entropy_(Tensor(a!) logits, Tensor target) -> Tensor")


def _rms_norm_shape(x: Tensor, weight: Tensor, eps: float, first: bool) -> Any:
    return _contiguous_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _rms_norm_backward_shape(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, trained: bool
) -> Any:
    shares = PROGRAMS if trained else 0
    return _contiguous_like(x), x.new_empty(shares, x.shape[-1], dtype=torch.float32)


def _swiglu_shape(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _swiglu_backward_shape(grad: Tensor, x: Tensor) -> Tensor:
    return _contiguous_like(x)


def _rotate_shape(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return _by_token(x)


def _cross_entropy_shape(logits: Tensor, target: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _by_token(x: Tensor) -> Tensor:
    """Room for [B, H, T, C] that lies as [B, T, H, C], as attention kernels like it."""
    rows, heads, tokens, channels = x.shape
    return x.new_empty(rows, tokens, heads, channels).transpose(1, 2)


_shapes: dict[str, Any] = {
    "rms_norm": _rms_norm_shape,
    "rms_norm_backward": _rms_norm_backward_shape,
    "swiglu": _swiglu_shape,
    "swiglu_backward": _swiglu_backward_shape,
    "rotate": _rotate_shape,
    "cross_entropy_": _cross_entropy_shape,
}
for _name, _shape in _shapes.items():
    torch.library.register_fake(f"glm4_finetune::{_name}", _shape, lib=library)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, first: bool) -> tuple[Tensor, Tensor]:
    from finetune.models.kernels import programs

    x = x.contiguous()
    out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    width = x.shape[-1]
    programs.rms_forward[(scale.numel(),)](
        x, weight, out, scale, D=width, EPS=eps, FIRST=first, BLOCK=_power(width)
    )
    return out, scale


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, trained: bool
) -> tuple[Tensor, Tensor]:
    from finetune.models.kernels import programs

    grad, x = grad.contiguous(), x.contiguous()
    width, rows = x.shape[-1], scale.numel()
    out = torch.empty_like(x)
    number = min(PROGRAMS, rows) if trained else rows
    shares = x.new_zeros(PROGRAMS if trained else 0, width, dtype=torch.float32)
    programs.rms_backward[(number,)](
        grad, x, weight, scale, out, shares, rows,
        D=width, PROGRAMS=number, TRAINED=trained, BLOCK=_power(width),
    )  # fmt: skip
    return out, shares


def _swiglu(x: Tensor) -> Tensor:
    from finetune.models.kernels import programs

    x = x.contiguous()
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    block = min(WIDEST_BLOCK, _power(width))
    grid = (x.numel() // (2 * width), -(-width // block))
    programs.swiglu_forward[grid](x, out, F=width, BLOCK=block)
    return out


def _swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    from finetune.models.kernels import programs

    grad, x = grad.contiguous(), x.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty_like(x)
    block = min(WIDEST_BLOCK, _power(width))
    grid = (x.numel() // (2 * width), -(-width // block))
    programs.swiglu_backward[grid](grad, x, out, F=width, BLOCK=block)
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    from finetune.models.kernels import programs

    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, heads, tokens, channels = x.shape
    pairs = cos.shape[-1]
    cos, sin = cos.contiguous(), sin.contiguous()
    out = _by_token(x)
    programs.rotate[(tokens, rows)](
        x, cos, sin, out, tokens, x.stride(0), x.stride(1), x.stride(2),
        tokens * pairs if cos.shape[0] > 1 else 0,
        HEADS=heads, PAIRS=pairs, C=channels, BACK=back, BLOCK_HEADS=_power(heads),
        BLOCK_PAIRS=_power(pairs), BLOCK_REST=_power(max(1, channels - 2 * pairs)),
    )  # fmt: skip
    return out


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    from finetune.models.kernels import programs

    assert logits.is_contiguous()
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    width = logits.shape[1]
    block = min(WIDEST_BLOCK, _power(width))
    programs.cross_entropy[(logits.shape[0],)](logits, target, loss, V=width, BLOCK=block)
    return loss


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


for _name, _work in {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "rotate": _rotate,
    "cross_entropy_": _cross_entropy,
}.items():
    for _key in ("CUDA", "CPU"):  # on a CPU only in Triton's interpreter
        library.impl(_name, _work, _key)


_ops: Any = torch.ops.glm4_finetune


class RmsNorm(torch.autograd.Function):
    """`torch_forms.rms_norm` in two kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, first: bool) -> Tensor:
        """Compute, and keep the inputs."""
        out, scale = _ops.rms_norm(x, weight, eps, first)
        ctx.save_for_backward(x, weight, scale)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Gradients of the inputs."""
        x, weight, scale = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]
        out, shares = _ops.rms_norm_backward(grads[0], x, weight, scale, trained)
        return out, shares.sum(0).to(weight.dtype) if trained else None, None, None


class Swiglu(torch.autograd.Function):
    """`torch_forms.swiglu` in two kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Compute, and keep the inputs."""
        ctx.save_for_backward(x)
        out: Tensor = _ops.swiglu(x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Gradients of the inputs."""
        out: Tensor = _ops.swiglu_backward(grads[0], *ctx.saved_tensors)
        return out


class Rotate(torch.autograd.Function):
    """`torch_forms.rotate`; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Compute, and keep the inputs."""
        ctx.save_for_backward(cos, sin)
        out: Tensor = _ops.rotate(x, cos, sin, False)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Gradients of the inputs."""
        return _ops.rotate(grads[0], *ctx.saved_tensors, True), None, None
