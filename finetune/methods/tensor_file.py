"""Safetensors written tensor by tensor, hashed on the way; the bytes are those of the safetensors package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from finetune.storage.hashed import hashed_file, hashed_text

# From the last in the file to the first, as the package orders them: what must be aligned to more
# bytes comes first.
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32",
    torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_ORDER = list(DTYPES)
METADATA = {"format": "pt"}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write `path` with these tensors; each is brought to the CPU alone."""
    names = sorted(tensors, key=lambda name: (-_ORDER.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with hashed_file(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)


def save_config(config: Any, folder: Path) -> None:
    """Write what `config.save_pretrained` of transformers or PEFT writes."""
    with TemporaryDirectory() as aside:
        config.save_pretrained(aside)
        for file in sorted(Path(aside).iterdir()):
            hashed_text(folder / file.name, file.read_text(encoding="utf-8"))
