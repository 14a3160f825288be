"""Tensors, updates and adapters in a line, for the tests of merging and of exporting."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from finetune.artifacts.weights import TensorInfo, read_shard
from finetune.export.adapter import Adapter, Update
from finetune.export.shards import Output, make_header

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensor(name: str, *shape: int, dtype: str = "F32", file: str = "a") -> TensorInfo:
    size = int(np.prod(shape)) * {"F32": 4, "BF16": 2, "I64": 8}[dtype]
    return TensorInfo(Path(file), name, dtype, shape, 0, size)


def update(rows: int = 4, columns: int = 3, scale: float = 1.0, **how: Any) -> Update:
    numbers = np.arange(1, 1 + 2 * (rows + columns), dtype=np.float32)
    a, b = numbers[: 2 * columns].reshape(2, columns), numbers[2 * columns :].reshape(rows, 2)
    return Update(a, b, np.float32(scale), **how)


def adapter(updates: Any = None, replacements: Any = None, misfits: Any = ()) -> Adapter:
    files: Any = SimpleNamespace(misfits=lambda modules: list(misfits))
    return Adapter(Path("adapter"), files, updates or {}, replacements or {})


def stored(file: Path, **arrays: tuple[str, np.ndarray[Any, Any]]) -> dict[str, TensorInfo]:
    """A safetensors file of arrays in formats."""
    outputs = [Output(name, dtype, a.shape, constant=a.tobytes()) for name, (dtype, a) in arrays.items()]  # fmt: skip
    file.write_bytes(make_header(outputs, {}) + b"".join(one.constant for one in outputs))
    return {tensor.name: tensor for tensor in read_shard(file).tensors}
