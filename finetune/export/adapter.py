"""A LoRA adapter folder as changes to named tensors of its base. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from finetune.artifacts.adapter import DORA, LoraFiles, read_lora
from finetune.artifacts.experts import PARTS, fused_part, separate_names
from finetune.artifacts.resolve import adapter_config
from finetune.artifacts.weights import TensorInfo
from finetune.errors import ModelError
from finetune.export.numbers import Floats, to_float32
from finetune.methods import METHODS

# Multiplications at once up to which OpenBLAS stays in the calling thread. Its own threads wait in
# busy loops for one another: twenty times the processor time when several shards are written at once.
_PRODUCT = 1 << 18


@dataclass(frozen=True)
class Update:
    """What is added to a matrix: W + scale * B @ A, and with a magnitude m * (...) / |W + ...|."""

    a: Floats
    """[rank, in]"""
    b: Floats
    """[out, rank]"""
    scale: np.float32
    magnitude: Floats | None = None
    """[out], the length of each row after merging (DoRA)."""

    def apply(self, rows: slice, weights: Floats, scratch: Floats) -> Floats | None:
        """Change ``weights``, the rows ``rows`` of the matrix, in place; an overflow gives infinity.

        Returns what each row was multiplied by in the end (DoRA), if by anything.
        """
        b = self.b[rows]
        width = max(1, _PRODUCT // b.size)
        for first in range(0, self.a.shape[1], width):
            columns = slice(first, first + width)
            np.matmul(b, self.a[:, columns], out=scratch[:, columns])
        if self.scale != 1:
            np.multiply(scratch, self.scale, out=scratch)
        np.add(weights, scratch, out=weights)
        if self.magnitude is None:
            return None
        norms = np.sqrt(np.einsum("ij,ij->i", weights, weights, dtype=np.float64))
        factors: Floats = (self.magnitude[rows] / norms).astype(np.float32)
        np.multiply(weights, factors[:, None], out=weights)
        return factors


@dataclass(frozen=True)
class Adapter:
    """An adapter folder read for merging."""

    folder: Path
    files: LoraFiles
    updates: Mapping[str, Update]
    """By the name of the base's tensor."""
    replacements: Mapping[str, TensorInfo]
    """Tensors that were trained whole (``modules_to_save``), by the name of the base's tensor."""


def read_adapter(folder: Path) -> Adapter:
    """The adapter of ``folder``; ModelError when merging would not give what it computes."""
    _check_mergeable(folder)
    files = read_lora(folder)
    updates: dict[str, Update] = {}
    for module in files.modules:
        if fused_part(module):
            updates |= _of_experts(files, module)
        else:
            updates[f"{module}.weight"] = _update(files, module)
    return Adapter(folder=folder, files=files, updates=updates, replacements=files.whole)


def combined(weighted: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Several adapters as one: the weighted sum of what each adds, exactly (PEFT's "cat").

    W + w1 s1 B1 A1 + w2 s2 B2 A2 = W + [w1 s1 B1, w2 s2 B2] [A1; A2]
    """
    first, weight = weighted[0]
    if len(weighted) == 1 and weight == 1:
        return first
    names = {name for adapter, _ in weighted for name in adapter.updates}
    for adapter, _ in weighted:
        if adapter.replacements or any(u.magnitude is not None for u in adapter.updates.values()):
            kind = "tensors that were trained whole" if adapter.replacements else "DoRA lengths"
            raise ModelError(
                f"{adapter.folder} holds {kind}, which cannot be added up or weighted; "
                "merge it alone and without a weight"
            )
    updates = {}
    for name in names:
        parts = [(a.updates[name], weight) for a, weight in weighted if name in a.updates]
        shapes = {(part.b.shape[0], part.a.shape[1]) for part, _ in parts}
        if len(shapes) > 1:
            raise ModelError(
                f"the adapters do not fit one base: {name} has shapes {shapes}; merge adapters of one base"
            )
        a = np.concatenate([part.a for part, _ in parts])
        b = np.concatenate([part.b * np.float32(part.scale * w) for part, w in parts], axis=1)
        updates[name] = Update(a, b, np.float32(1))
    return replace(first, updates=updates)


def _check_mergeable(folder: Path) -> None:
    kind = adapter_config(folder).get("peft_type")
    method = next((one for one in METHODS.values() if one.peft_type == kind), None)
    if method is None:
        raise ModelError(
            f"{folder} is a {kind} adapter; only LoRA becomes part of the weights. Use it as an adapter"
        )
    if method.merging:
        raise ModelError(f"{folder} is {method.merging}")


def _of_experts(files: LoraFiles, name: str) -> dict[str, Update]:
    """The update of every expert's own matrices, of one for a fused tensor.

    A is [experts x rank, in] and B is [out, rank x experts], the experts innermost: PEFT's form.
    """
    together = _update(files, name)
    rank, leaves = files.ranks[name], PARTS[name.rpartition(".")[2]]
    experts = len(together.a) // rank
    if together.b.shape[0] % len(leaves):
        raise ModelError(
            f"{name}: its {together.b.shape[0]} rows are not those of {' and '.join(leaves)}; copy the adapter again"
        )
    names = iter(separate_names(name, experts))
    updates = {}
    for a, b in zip(
        together.a.reshape(experts, rank, -1),
        np.moveaxis(together.b.reshape(len(together.b), rank, experts), 2, 0),
        strict=True,
    ):
        for rows in np.split(b, len(leaves)):
            updates[next(names)] = Update(a, np.ascontiguousarray(rows), together.scale)
    return updates


def _update(files: LoraFiles, module: str) -> Update:
    parts = files.modules[module]
    embedding = "lora_embedding_A" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    a, b = (_values(parts[name]) for name in names)
    if a.ndim != 2 or b.ndim != 2:
        raise ModelError(
            f"{module} is no matrix; only linear layers and embeddings are merged, so use it as an adapter"
        )
    scale = np.float32(files.scale(module))
    if embedding:
        if files.config.get("use_dora"):
            raise ModelError(f"{module}: DoRA on an embedding is not merged; use PEFT's")
        a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
    magnitude = _values(parts[DORA]).reshape(-1) if DORA in parts else None
    if math.frexp(float(scale))[0] == 0.5:  # a power of two multiplies exactly wherever it is put
        b, scale = b * scale, np.float32(1)
    return Update(a, b, scale, magnitude)


def _values(tensor: TensorInfo) -> Floats:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        values = to_float32(file.read(tensor.size), tensor.dtype, tensor.shape)
    if not np.isfinite(values).all():
        raise ModelError(
            f"{tensor.name} in {tensor.file} holds numbers that are not finite; use an earlier checkpoint"
        )
    return values
