"""Linear layers on a CPU while a model replies: oneDNN's product in the place of MKL's.

torch multiplies float32 matrices with MKL, which takes a slow path on processors that are not Intel's: on an
AMD EPYC a layer of 576 to 3,072 features takes 1.4 times as long for 4 rows and twice as long for 1,024
(scripts/bench/products.py). oneDNN, which torch has besides, does not, and reads the same weights as they lie.
Small weights stay with MKL, whose call costs less, and so does whatever wants a gradient.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST = 1 << 18
"""Numbers of a weight: of smaller ones the call takes longer than the product."""


class ReplyingLinear(nn.Linear):
    """torch's layer; in evaluation without a gradient its product is `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., out]."""
        if self.training:
            return super().forward(input)
        return linear(input, self.weight, self.bias)


def use_in(model: nn.Module) -> None:
    """Let the plain linear layers of a model multiply so, where that is faster."""
    if not _gains():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ReplyingLinear


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows [..., in] x weightᵀ + bias, by oneDNN where that is faster and no gradient is wanted."""
    if (
        weight.numel() < FEWEST
        or torch.is_grad_enabled()
        or rows.dtype is not torch.float32
        or weight.dtype is not torch.float32
        or rows.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or not _gains()
    ):
        return F.linear(rows, weight, bias)
    return _by_onednn(rows, weight, bias)


def _by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


@cache
def _gains() -> bool:
    """Whether this processor is one that MKL is slow on, and torch has oneDNN's product for it."""
    return _is_slow_for_mkl() and torch._C.has_mkl and _is_right()


def _is_slow_for_mkl() -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    cpus = Path("/proc/cpuinfo")
    named = cpus.read_text(encoding="utf-8", errors="replace") if cpus.is_file() else ""
    return "GenuineIntel" not in (named or platform.processor())


def _is_right() -> bool:
    """Whether oneDNN's product is there and right: the operator is torch's own affair, and may change."""
    random = torch.Generator().manual_seed(0)
    sizes = ((3, 2, 40), (24, 40), (24,))
    rows, weight, bias = (torch.randn(*size, generator=random) for size in sizes)
    with torch.no_grad():
        try:
            found = _by_onednn(rows, weight, bias)
        except (AttributeError, RuntimeError, TypeError):
            return False
        return torch.allclose(found, F.linear(rows, weight, bias), atol=1e-4)
