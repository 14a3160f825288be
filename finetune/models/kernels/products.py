"""Linear layers on a CPU while a model replies: oneDNN's product in the place of MKL's.

torch multiplies float32 matrices with MKL, which takes a slow path on processors that are not Intel's: on an
AMD EPYC a layer of 576 to 3,072 features takes 1.4 times as long for 4 rows and twice as long for 1,024
(scripts/bench/products.py). oneDNN, which torch has besides, does not, and reads the same weights as they lie.
Small weights stay with MKL, whose call costs less, and so does whatever wants a gradient.

As they lie oneDNN has to turn the weights around at every product, which for a few rows takes as long as the
product. `packed` turns them around once. Then a row's numbers are also the same, bit for bit, whatever number
of rows is multiplied with it, on which `generation.drafts` stands.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.distributed.device import free_bytes

FEWEST = 1 << 18
"""Numbers of a weight: of smaller ones the call takes longer than the product."""
FEWEST_PACKED = 1 << 16
"""The same of one that is packed."""
PACKED_SHARE = 4
"""Of the free memory the packed weights take this part at most; larger models do without."""

_packs: dict[int, _Pack] = {}
"""What is packed, by the weight's id."""
_in_pairs: dict[tuple[int, ...], bool] = {}
"""`_Pack.in_pairs` by [out, in] and threads: the order of a sum does not depend on numbers."""
_one_by_one = False


class ReplyingLinear(nn.Linear):
    """torch's layer; in evaluation without a gradient its product is `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., out]."""
        if self.training:
            return super().forward(input)
        return linear(input, self.weight, self.bias)


@dataclass(slots=True)
class _Pack:
    """A weight as oneDNN reads it."""

    weight: Tensor
    """Itself, so that no other gets its id."""
    numbers: Tensor
    in_pairs: bool
    """A row alone would be added up in another order, so it is multiplied as two."""
    users: int = 0

    def product(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        if not self.in_pairs or rows.numel() > rows.shape[-1]:
            return _by_onednn(rows, self.numbers, bias)
        row = rows.reshape(1, -1)
        both = _by_onednn(torch.cat([row, row]), self.numbers, bias)
        return both[:1].view(*rows.shape[:-1], -1)


def use_in(model: nn.Module) -> None:
    """Let the plain linear layers of a model multiply so, where that is faster."""
    if not _gains():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ReplyingLinear


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside, the weights of these layers, which nobody changes meanwhile, lie in memory packed, too.

    Only where that is faster, and takes no more than a quarter of the memory that is free.
    """
    weights = _packable(model)
    for weight in weights:
        if id(weight) not in _packs:
            _packs[id(weight)] = _pack(weight)
        _packs[id(weight)].users += 1
    try:
        yield
    finally:
        for weight in weights:
            _packs[id(weight)].users -= 1
            if not _packs[id(weight)].users:
                del _packs[id(weight)]


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is packed now."""
    return id(weight) in _packs


@contextmanager
def one_by_one() -> Iterator[None]:
    """Inside, attention and products that are not packed are made row by row: the numbers of a row alone."""
    global _one_by_one
    before, _one_by_one = _one_by_one, True
    try:
        yield
    finally:
        _one_by_one = before


def rows_are_apart() -> bool:
    """Whether rows are to be computed as each alone would be."""
    return _one_by_one


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows [..., in] x weightᵀ + bias, by oneDNN where that is faster and no gradient is wanted."""
    if (
        torch.is_grad_enabled()
        or rows.dtype is not torch.float32
        or weight.dtype is not torch.float32
        or rows.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or not _gains()
    ):
        return F.linear(rows, weight, bias)
    if (pack := _packs.get(id(weight))) is not None:
        return pack.product(rows, bias)
    if _one_by_one and rows.numel() > rows.shape[-1]:
        alone = [linear(rows[..., at : at + 1, :], weight, bias) for at in range(rows.shape[-2])]
        return torch.cat(alone, dim=-2)
    if weight.numel() < FEWEST:
        return F.linear(rows, weight, bias)
    return _by_onednn(rows, weight, bias)


def _by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def _packable(model: nn.Module) -> list[Tensor]:
    """The weights that are worth it, each once; none where all of them are too large."""
    if not _gains():
        return []
    layers = [module for module in model.modules() if isinstance(module, ReplyingLinear)]
    found = {id(layer.weight): layer.weight for layer in layers}
    weights = [weight for weight in found.values() if _is_worth_packing(weight)]
    missing = sum(weight.nbytes for weight in weights if id(weight) not in _packs)
    return weights if PACKED_SHARE * missing <= free_bytes() else []


def _is_worth_packing(weight: Tensor) -> bool:
    is_whole = isinstance(weight, nn.Parameter) and not hasattr(weight, "ds_id")  # no shard of one
    is_plain = weight.device.type == "cpu" and weight.dtype is torch.float32
    return is_whole and is_plain and weight.numel() >= FEWEST_PACKED


def _pack(weight: Tensor) -> _Pack:
    with torch.no_grad():
        numbers: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4)
    kind = (*weight.shape, torch.get_num_threads())
    if kind not in _in_pairs:
        _in_pairs[kind] = _adds_otherwise(numbers, weight.shape[1])
    return _Pack(weight, numbers, _in_pairs[kind])


def _adds_otherwise(numbers: Tensor, width: int) -> bool:
    """Whether one row's product differs from that of the same row beside another one."""
    rows = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone, beside = (_by_onednn(part, numbers, None) for part in (rows[:1], rows))
    return not torch.equal(alone, beside[:1])


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
    """Whether oneDNN's product is there and right: the operators are torch's own affair, and may change."""
    random = torch.Generator().manual_seed(0)
    sizes = ((3, 2, 40), (24, 40), (24,))
    rows, weight, bias = (torch.randn(*size, generator=random) for size in sizes)
    with torch.no_grad():
        try:
            numbers: Any = torch.ops.mkldnn._reorder_linear_weight(weight, 4)
            found = [_by_onednn(rows, one, bias) for one in (weight, numbers)]
        except (AttributeError, RuntimeError, TypeError):
            return False
        expected = F.linear(rows, weight, bias)
        return all(torch.allclose(one, expected, atol=1e-4) for one in found)
