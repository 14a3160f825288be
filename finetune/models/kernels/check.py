"""Every kernel beside its torch form, forward and backward, on the device and in the format of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune.models import kernels
from finetune.models.kernels import torch_forms
from finetune.models.packed_attention import Documents, flash_arguments, varlen_attention

Parts = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values."""

# Largest relative deviation of an output or a gradient, as norms: some roundings of the format.
BANDS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Verdict:
    """What is used from now on, and why the others are not."""

    used: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


@cache
def compare(device: torch.device, dtype: torch.dtype) -> Verdict:
    """Which kernels are right here; compiles each once, seconds in all."""
    used, refused = [], {}
    for name, work in _cases(device, dtype).items():
        problem = _problem(work, BANDS[_format_of(name, dtype)])
        if problem is None:
            used.append(name)
        else:
            refused[name] = problem
    return Verdict(tuple(used), refused)


def _problem(work: Callable[[], list[float]], band: float) -> str | None:
    """Why something is not used; None where all it deviates by lies within the band."""
    try:
        worst = max(work())
    except Exception as error:  # whatever a compiler may raise: the run goes on without it
        first = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {first[:200]}"
    return None if worst <= band else f"differs from torch by {worst:.1e}, more than {band:.1e}"


@cache
def flash_problem(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn, under this name of transformers', is not used for documents here; None where it is."""

    def random(*shape: int) -> Tensor:
        return _random(*shape).to(device, _format_of("varlen_attention", dtype))

    def attend(parts: Parts, documents: Documents) -> Tensor:
        asked: Any = SimpleNamespace(is_causal=True)
        given = flash_arguments(documents)
        out: Tensor = ALL_ATTENTION_FUNCTIONS[name](asked, *parts, None, scaling=0.1, **given)[0]
        return out

    return _problem(lambda: _varlen(random, attend), BANDS[random(1).dtype])


def _format_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Attention has kernels for 16 bits only; weights in float32 compute there under autocast."""
    return torch.bfloat16 if name == "varlen_attention" and dtype is torch.float32 else dtype


def choose(setting: str, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Use what `model.kernels` asks for and what is right on this device."""
    if setting == "torch" or device.type != "cuda" or dtype not in BANDS:
        kernels.run({})
        return Verdict()
    verdict = compare(device, dtype)
    kernels.run(dict.fromkeys(verdict.used, device.type))
    return verdict


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator)


def _cases(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], list[float]]]:
    def random(*shape: int) -> Tensor:
        return _random(*shape).to(device, dtype)

    def narrow(*shape: int) -> Tensor:
        return random(*shape).to(_format_of("varlen_attention", dtype))

    from finetune.models.kernels.operations import RmsNorm, Rotate, Swiglu

    def norm(*, first: bool) -> list[float]:
        return _deviations(
            lambda x, w: RmsNorm.apply(x, w, 1e-5, first),  # type: ignore[no-untyped-call]
            lambda x, w: torch_forms.rms_norm(x, w, 1e-5, first),
            random(2, 37, 300),
            random(300),
        )

    cos, sin = random(1, 1, 37, 6), random(1, 1, 37, 6)
    return {
        "rms_norm": lambda: [*norm(first=False), *norm(first=True)],
        "swiglu": lambda: _deviations(Swiglu.apply, torch_forms.swiglu, random(2, 37, 2 * 300)),
        "rotate": lambda: _deviations(
            lambda x: Rotate.apply(x, cos, sin),  # type: ignore[no-untyped-call]
            lambda x: torch_forms.rotate(x, cos, sin),
            random(2, 37, 3, 32).transpose(1, 2),
        ),
        "cross_entropy": lambda: _cross_entropy(random(37, 5000)),
        "varlen_attention": lambda: _varlen(
            narrow, lambda parts, documents: varlen_attention(parts, documents, 0.1)
        ),
    }


def _deviations(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor
) -> list[float]:
    """Of the output and of each gradient, relative, against the torch form in float64."""
    mine = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, expected = ours(*mine), theirs(*wide)
    slope = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    found = torch.autograd.grad(out, mine, slope.to(out.dtype))
    exact = torch.autograd.grad(expected, wide, slope.double())
    return [_relative(a, b) for a, b in zip((out, *found), (expected, *exact), strict=True)]


def _varlen(
    random: Callable[..., Tensor], attend: Callable[[Parts, Documents], Tensor]
) -> list[float]:
    """Three documents in two rows, two heads for each key, beside attention document by document."""
    query, (key, value) = random(2, 4, 40, 64), (random(2, 2, 40, n + 63)[..., n - 1 :] for n in (1, 2))  # fmt: skip
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, 0] = starts[0, 13] = True
    documents = Documents.of(starts).to(query.device)

    def by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pieces = [(0, 0, 13), (0, 13, 40), (1, 0, 40)]
        parts = []
        for row, start, end in pieces:
            one, keys, values = (t[row : row + 1, :, start:end] for t in (query, key, value))
            out = scaled_dot_product_attention(
                one, keys, values, is_causal=True, scale=0.1, enable_gqa=True
            )
            parts.append(out.transpose(1, 2))
        return torch.cat([torch.cat(parts[:2], dim=1), parts[2]])

    return _deviations(lambda *parts: attend(parts, documents), by_one, query, key, value)


def _cross_entropy(logits: Tensor) -> list[float]:
    target = torch.arange(len(logits), device=logits.device) * 7
    wide = logits.double().requires_grad_()
    expected = cross_entropy(wide, target, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    work = logits.clone()
    loss = torch.ops.glm4_finetune.cross_entropy_(work, target)
    return [_relative(loss, expected), _relative(work, slope)]


def _relative(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(difference.detach())
