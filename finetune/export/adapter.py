"""A LoRA adapter folder as changes to named tensors of its base. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.artifacts.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune.artifacts.plain_files import read_json
from finetune.artifacts.weights import TensorInfo, read_shard
from finetune.errors import ModelError
from finetune.export.numbers import STORAGE, Floats, to_float32
from finetune.methods import METHODS

# Options of peft.LoraConfig under which W + scale * B @ A is not what the adapter computes.
_NOT_MERGED = (
    "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "megatron_config", "ensure_weight_tying",
)  # fmt: skip
# Initialisations that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and others change it.
_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", None)

# Multiplications at once up to which OpenBLAS stays in the calling thread. Its own threads wait in
# busy loops for one another: twenty times the processor time when several shards are written at once.
_PRODUCT = 1 << 18

PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)"
)


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

    def apply(self, rows: slice, weights: Floats, scratch: Floats) -> None:
        """Change ``weights``, the rows ``rows`` of the matrix, in place; an overflow gives infinity."""
        b = self.b[rows]
        width = max(1, _PRODUCT // b.size)
        for first in range(0, self.a.shape[1], width):
            columns = slice(first, first + width)
            np.matmul(b, self.a[:, columns], out=scratch[:, columns])
        if self.scale != 1:
            np.multiply(scratch, self.scale, out=scratch)
        np.add(weights, scratch, out=weights)
        if self.magnitude is not None:
            norms = np.sqrt(np.einsum("ij,ij->i", weights, weights, dtype=np.float64))
            factors = (self.magnitude[rows] / norms).astype(np.float32)
            np.multiply(weights, factors[:, None], out=weights)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder read for merging."""

    folder: Path
    base: str | None
    """Path or hub id of the base, as the adapter names it."""
    revision: str | None
    updates: Mapping[str, Update]
    """By the name of the base's tensor."""
    replacements: Mapping[str, TensorInfo]
    """Tensors that were trained whole (``modules_to_save``), by the name of the base's tensor."""


def read_adapter(folder: Path) -> Adapter:
    """The adapter of ``folder``; ModelError when merging would not give what it computes."""
    config = read_json(folder / ADAPTER_CONFIG)
    _check_mergeable(config, folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{folder} has no {ADAPTER_WEIGHTS}; only safetensors adapters are opened (an adapter_model.bin is a pickle)"
        )
    parts: dict[str, dict[str, TensorInfo]] = {}
    replacements: dict[str, TensorInfo] = {}
    for tensor in read_shard(folder / ADAPTER_WEIGHTS).tensors:
        name = tensor.name.removeprefix("base_model.model.")
        match = PART.fullmatch(name)
        if match:
            part = match["part"].removesuffix(".weight")
            parts.setdefault(match["module"], {})[part] = tensor
        elif "lora_" in name or "token_adapter" in name:
            raise ModelError(f"{folder}: {name} is of a kind that merging does not know")
        else:
            replacements[name.replace(".base_layer.", ".")] = tensor
    return Adapter(
        folder=folder,
        base=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        updates={f"{m}.weight": _update(m, found, config) for m, found in parts.items()},
        replacements=replacements,
    )


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
            raise ModelError(f"the adapters do not fit one base: {name} has shapes {shapes}")
        a = np.concatenate([part.a for part, _ in parts])
        b = np.concatenate([part.b * np.float32(part.scale * w) for part, w in parts], axis=1)
        updates[name] = Update(a, b, np.float32(1))
    return replace(first, updates=updates)


def _check_mergeable(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    method = next((one for one in METHODS.values() if one.peft_type == kind), None)
    if method is None:
        raise ModelError(
            f"{folder} is a {kind} adapter; only LoRA becomes part of the weights. Use it as an adapter"
        )
    if method.merging:
        raise ModelError(f"{folder} is {method.merging}")
    problems = [f"{name}={config[name]!r}" for name in _NOT_MERGED if config.get(name)]
    if config.get("init_lora_weights") not in _KEEPS_BASE:
        problems.append(
            f"init_lora_weights={config['init_lora_weights']!r}, which changes the base"
        )
    if problems:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG} says {', '.join(problems)}: merging does not support that. "
            "Merge it with PEFT's merge_and_unload"
        )


def _update(module: str, parts: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Update:
    embedding = "lora_embedding_A" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    missing = [name for name in names if name not in parts]
    if missing:
        raise ModelError(f"{module} has no {missing[0]} in the adapter; copy the adapter again")
    a, b = (_values(parts[name]) for name in names)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ModelError(f"{module}: {names[0]} {a.shape} and {names[1]} {b.shape} do not fit")
    rank, alpha = rank_and_alpha(config, module)
    if rank != a.shape[0]:
        raise ModelError(
            f"{module} has rank {a.shape[0]} in {ADAPTER_WEIGHTS} and {rank} in {ADAPTER_CONFIG}"
        )
    scale = np.float32(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
    if embedding:
        if config.get("use_dora"):
            raise ModelError(f"{module}: DoRA on an embedding is not merged; use PEFT's")
        a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
    magnitude = None
    if config.get("use_dora"):
        if "lora_magnitude_vector" not in parts:
            raise ModelError(f"{module} has no lora_magnitude_vector although use_dora is set")
        magnitude = _values(parts["lora_magnitude_vector"]).reshape(-1)
    if math.frexp(float(scale))[0] == 0.5:  # a power of two multiplies exactly wherever it is put
        b, scale = b * scale, np.float32(1)
    return Update(a, b, scale, magnitude)


def rank_and_alpha(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """What an adapter_config.json says of a module."""
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return int(rank), float(alpha)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _values(tensor: TensorInfo) -> Floats:
    if tensor.dtype not in STORAGE:
        raise ModelError(f"{tensor.name} in {tensor.file} is {tensor.dtype}, not a float")
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        values = to_float32(file.read(tensor.size), tensor.dtype, tensor.shape)
    if not np.isfinite(values).all():
        raise ModelError(f"{tensor.name} in {tensor.file} holds numbers that are not finite")
    return values
