"""The least time that a kernel can take on a stated GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a GPU reaches in practice; the defaults are for one H100 SXM."""

    bfloat16: float = 650e12
    """FLOP/s of bf16 matrix products."""
    float32: float = 45e12
    """FLOP/s of float32 matrix products (no TF32)."""
    attention: float = 350e12
    """FLOP/s of a flash attention kernel."""
    memory: float = 2.7e12
    """Bytes/s."""
    launch: float = 2.5e-6
    """Seconds that the smallest kernel takes."""


def seconds(ceilings: Ceilings, kind: str, flops: int, moved: int, number: int = 1) -> float:
    """The largest of compute, memory and launch time of `number` kernels that together do this much.

    `kind` is `bfloat16`, `float32`, `attention` or, without FLOPs, anything else.
    """
    compute = flops / getattr(ceilings, kind) if flops else 0.0
    return max(compute, moved / ceilings.memory, number * ceilings.launch)
