"""The weights of a checkpoint folder as they lie on disk: which tensor is where. No torch, no copies."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.artifacts.names import ADAPTER_WEIGHTS, MODEL_CONFIG, MODEL_WEIGHTS, WEIGHTS_INDEX
from finetune.artifacts.plain_files import check_folder, check_plain, read_json
from finetune.errors import ModelError

ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip

FLOATS = ("F16", "BF16", "F32")
"""What weights are kept in; integers and 8-bit floats mean nothing without their scales."""

_MAX_HEADER = 100_000_000
# What a header of JSON that is nested without end, or of values that are none, is met with.
_NOT_WHOLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
_SAMPLE = 64
# Written by tools on the way, without a meaning for the weights.
_VOLATILE = ("_name_or_path", "transformers_version", "auto_map")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file."""

    file: Path
    name: str
    dtype: str
    """As safetensors writes it: F32, BF16, …"""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    def rows(self, first: int, last: int) -> TensorInfo:
        """The rows ``first`` to ``last`` (excluded), which lie together in the file."""
        row = self.size // self.shape[0]
        start, end = self.start + first * row, self.start + last * row
        return replace(self, shape=(last - first, *self.shape[1:]), start=start, end=end)


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file: its tensors in the order of their bytes, and its own header."""

    file: Path
    tensors: tuple[TensorInfo, ...]
    header: bytes
    """Everything before the first tensor's bytes, length included."""
    metadata: dict[str, str]


def read_shard(file: Path) -> Shard:
    """The header of a safetensors file; ModelError when the file is damaged or no such file."""
    check_plain(file)
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            (length,) = struct.unpack("<Q", prefix)
            if length > _MAX_HEADER:
                raise ValueError("its header is too long")
            text = stream.read(length)
            total = os.fstat(stream.fileno()).st_size
        if len(text) < length:
            raise ValueError("its header is cut off")
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        tensors = [_tensor(file, name, entry, 8 + length) for name, entry in entries.items()]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
        position = 8 + length
        for tensor in tensors:
            if tensor.start != position:
                raise ValueError(f"the bytes of {tensor.name} are not where they should be")
            position = tensor.end
        if position != total:
            raise ValueError(f"it has {total} bytes instead of {position}")
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    except (*_NOT_WHOLE, struct.error) as error:
        raise ModelError(
            f"{file} is not a whole safetensors file ({error}); copy it again"
        ) from error
    return Shard(file, tuple(tensors), prefix + text, metadata)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder in the order of their names.

    Raises ModelError when there are none, or when a file of the index is missing.
    """
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is damaged ({error}); copy it again") from error
        for name in names:
            if Path(name).name != name or not os.path.isfile(folder / name):  # noqa: PTH113 - Path.is_file raises for a name that is too long
                raise ModelError(f"{folder} has no {name}, which its index names; copy it again")
        return [folder / name for name in names]
    if (folder / MODEL_WEIGHTS).is_file():
        return [folder / MODEL_WEIGHTS]
    raise ModelError(
        f"{folder} has neither {MODEL_WEIGHTS} nor {WEIGHTS_INDEX}; only safetensors weights are opened "
        "(a *.bin is a pickle: convert it first)"
    )


def tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder by name."""
    return {t.name: t for file in weight_files(folder) for t in read_shard(file).tensors}


def model_fingerprint(folder: str | Path) -> str:
    """A hash of config, tensor names, types, shapes and samples of every tensor's bytes.

    Milliseconds for any size. Does not depend on how the tensors are spread over files, so a
    copied or re-sharded checkpoint keeps it; other weights or another config do not.
    """
    folder = Path(folder)
    digest = hashlib.sha256(b"glm4-finetune model 1\n")
    config = read_json(folder / MODEL_CONFIG)
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    found = tensors(folder)
    for name in sorted(found):
        tensor = found[name]
        digest.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
        for sample in _samples(tensor):
            digest.update(sample)
    return digest.hexdigest()


def _samples(tensor: TensorInfo) -> Iterator[bytes]:
    """Bytes from the start, the middle and the end of a tensor."""
    descriptor = os.open(tensor.file, os.O_RDONLY)
    try:
        for part in range(3):
            place = max(tensor.size - _SAMPLE, 0) * part // 2
            yield os.pread(descriptor, min(_SAMPLE, tensor.size), tensor.start + place)
    finally:
        os.close(descriptor)


def _tensor(file: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorInfo:
    start, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    tensor = TensorInfo(file, name, entry["dtype"], shape, data_start + start, data_start + end)
    wanted = math.prod(shape) * ITEM_SIZE.get(tensor.dtype, 0)
    if tensor.dtype in ITEM_SIZE and tensor.size != wanted:
        raise ValueError(f"{name} has {tensor.size} bytes instead of {wanted}")
    return tensor


def adapter_file(folder: Path) -> Path:
    """The adapter's safetensors file; ModelError when there is none."""
    check_folder(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{folder} has no {ADAPTER_WEIGHTS}; only safetensors adapters are opened (an "
            "adapter_model.bin is a pickle: convert it with PEFT). Give the folder of a checkpoint"
        )
    return folder / ADAPTER_WEIGHTS
