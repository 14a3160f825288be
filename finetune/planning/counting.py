"""Operations, bytes, FLOPs and memory of code that runs on shape-only tensors.

Under `shapes_only()` tensors have a shape and a number format but no contents, so a 9B model costs
nothing, and `counting()` sees every operation that a GPU would be given. One operation that is no
mere view counts as one kernel; operations over lists of tensors as many as CUDA launches for them.
Dropout and attention are counted as the single kernels that they are on a GPU.

Memory is exact: each storage is noted when it is made and when it is let go of, with what it turned
out to be (weights, adapters, gradients, optimizer, activations; the rest is transients).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from finetune.models.loss import CHUNK_ELEMENTS
from finetune.planning.attention import FLOPS as ATTENTION_FLOPS
from finetune.planning.attention import attention
from finetune.planning.roofline import Ceilings, seconds

KINDS = ("weights", "adapters", "gradients", "optimizer", "activations", "transients")

# No kernel runs for these: they give another view of the same memory, or memory as it comes.
_NO_KERNEL = {
    "_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_", "set_",
    "device", "is_same_size",
}  # fmt: skip
# They only write.
_FILLS = {
    "zeros", "ones", "zeros_like", "ones_like", "full", "full_like", "fill_", "zero_", "new_zeros",
    "new_ones", "new_full", "arange", "scalar_tensor",
}  # fmt: skip
# They read as much as they give, not the whole table.
_GATHERS = {"embedding", "index_select", "gather", "index"}
# Tensors that one launch of an operation over lists takes, by the number of lists (torch's MultiTensorApply).
_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_ELEMENTS_PER_LAUNCH = 320 * 65536


@dataclass(slots=True)
class Kernels:
    """Sums over kernels of one name, phase and number format."""

    number: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0


@dataclass
class Ledger:
    """What was counted."""

    kernels: dict[tuple[str, str, str], Kernels] = field(default_factory=dict)
    """By phase, operation and number format of its FLOPs (`-` for those that have none)."""
    events: list[tuple[int, int, str]] = field(default_factory=list)
    """Storage, bytes that it added or, negative, gave back, and the phase; in the order of time."""
    kinds: dict[int, str] = field(default_factory=dict)
    """What a storage turned out to be."""
    mask_bytes: int = 0
    """Of the largest mask that attention was given."""

    def total(self, of: str, *, dtype: str | None = None) -> float:
        """Sum of a field of Kernels over all of them, or those of one format."""
        return sum(
            float(getattr(kernels, of))
            for (_, _, kind), kernels in self.kernels.items()
            if dtype in (None, kind)
        )

    def peak(self, kinds: Collection[str] = KINDS) -> dict[str, int]:
        """Bytes by kind at the moment when most of these kinds are held."""
        return max(self.peaks(kinds).values(), key=lambda held: sum(held.values()))

    def peaks(self, kinds: Collection[str] = KINDS) -> dict[str, dict[str, int]]:
        """The same of every phase."""
        live: Counter[str] = Counter()
        now = 0
        most: dict[str, int] = {}
        best: dict[str, dict[str, int]] = {}
        for storage, size, phase in self.events:
            if (kind := self.kinds.get(storage, "transients")) in kinds:
                live[kind] += size
                now += size
            if now > most.get(phase, -1):
                most[phase] = now
                best[phase] = {kind: live[kind] for kind in kinds}
        return best


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operation below it into a ledger."""

    def __init__(self, ceilings: Ceilings) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = Ledger()
        self.phase = "forward"
        self._ceilings = ceilings
        self._storages: dict[int, int] = {}
        self._serial = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = {id(t): t for t in tree_leaves(out) if isinstance(t, Tensor)}
        for tensor in made.values():
            self.note(tensor)
        if not func.is_view and name not in _NO_KERNEL:
            self._add(name, func, (args, kwargs, out), (list(given.values()), list(made.values())))
        return out

    def note(self, tensor: Tensor, kind: str | None = None) -> None:
        """Take a tensor's storage into the ledger, or say what one is that is there."""
        storage = tensor.untyped_storage()
        at = id(storage)
        if at not in self._storages:
            self._serial += 1
            serial, size = self._serial, storage.nbytes()
            self._storages[at] = serial
            self.ledger.events.append((serial, size, self.phase))
            weakref.finalize(storage, self._gone, at, serial, size)
        if kind is not None:
            self.ledger.kinds[self._storages[at]] = kind

    def name_living(self, kind: str) -> None:
        """Everything that is alive and has no name is `kind`."""
        for serial in self._storages.values():
            self.ledger.kinds.setdefault(serial, kind)

    def _gone(self, at: int, serial: int, size: int) -> None:
        del self._storages[at]
        self.ledger.events.append((serial, -size, self.phase))

    def _add(self, name: str, func: Any, call: Any, tensors: tuple[list[Tensor], list[Tensor]]) -> None:  # fmt: skip
        args, kwargs, out = call
        given, made = tensors
        flops = _flops(func, name, args, kwargs, out)
        moved = _bytes(name, given, made)
        number = _launches(args) if name.startswith(("_foreach", "_fused")) else 1
        kind = "-"
        if flops:
            wide = any(t.dtype is torch.float32 for t in given)
            kind = "attention" if name in ATTENTION_FLOPS else "float32" if wide else "bfloat16"
        row = self.ledger.kernels.setdefault((self.phase, name, kind), Kernels())
        row.number += number
        row.bytes += moved
        row.flops += flops
        row.seconds += seconds(self._ceilings, kind, flops, moved, number)


@contextmanager
def _as_on_gpu(ledger: Ledger) -> Iterator[None]:
    """Dropout and attention are the single operations that CUDA has for them, recomputed ones too.

    The loss is computed in a GPU's chunks.
    """
    dropout, scaled = F.dropout, F.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **given: Any
    ) -> Tensor:
        if attn_mask is not None:
            size = attn_mask.numel() * attn_mask.element_size()
            ledger.mask_bytes = max(ledger.mask_bytes, size)
        if torch.is_autocast_enabled("cpu"):
            kind = torch.get_autocast_dtype("cpu")
            query, key, value = (tensor.to(kind) for tensor in (query, key, value))
        return attention(query, key, value, attn_mask, bool(given.get("is_causal")))

    chunk, CHUNK_ELEMENTS["cpu"] = CHUNK_ELEMENTS["cpu"], CHUNK_ELEMENTS["other"]
    F.dropout, F.scaled_dot_product_attention = _dropout, attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, scaled
        CHUNK_ELEMENTS["cpu"] = chunk


def shapes_only() -> FakeTensorMode:
    """A context in which tensors have no contents."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def counting(ceilings: Ceilings) -> Iterator[Counting]:
    """Count what is done inside, under `shapes_only`."""
    counter = Counting(ceilings)
    with _as_on_gpu(counter.ledger), counter:
        yield counter


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0:
        return input
    return torch.native_dropout(input, p, True)[0]


def _size(tensor: Tensor) -> int:
    """Bytes that are really there: an expanded tensor is not larger than its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _bytes(name: str, given: Iterable[Tensor], made: Iterable[Tensor]) -> int:
    written = sum(map(_size, made))
    if name in _FILLS:
        return written
    if name in _GATHERS:
        return 2 * written
    if name in ("scatter_add_", "scatter_", "index_add_"):  # in place: only where the source goes
        return 2 * sum(sorted(map(_size, given))[:-1])
    return sum(map(_size, given)) + written


def _flops(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    if name in ATTENTION_FLOPS:
        return int(ATTENTION_FLOPS[name](*args))
    if (
        name == "_grouped_mm"
    ):  # of experts: rows [S, K] and weights [E, K, N], or for their gradient [S, N]
        rows, others = args[:2]
        return int(2 * rows.numel() * others.shape[-1])
    packet = func.overloadpacket
    if packet not in flop_registry and name.endswith("_"):  # in place: addmm_
        packet = getattr(torch.ops.aten, name[:-1], packet)
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def _launches(args: tuple[Any, ...]) -> int:
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    if not lists:
        return 1
    elements = sum(tensor.numel() for tensor in lists[0])
    depth = min(len(lists), 5)
    return int(
        max(
            -(-len(lists[0]) // _PER_LAUNCH[depth]),
            -(-elements // _ELEMENTS_PER_LAUNCH),
            1,
        )
    )
