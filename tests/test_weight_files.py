"""The header of a safetensors file is read as it is written, and what does not fit is named."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from finetune.artifacts.weights import ITEM_SIZE, read_shard
from finetune.errors import ModelError


def written(folder: Path, entries: dict[str, Any], num_bytes: int) -> Path:
    """A file with this header in front of so many bytes."""
    header = json.dumps(entries).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))
    return file


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("dtype", ITEM_SIZE)
def test_a_tensor_has_the_bytes_of_its_shape_and_kind(tmp_path: Path, dtype: str) -> None:
    size = 6 * ITEM_SIZE[dtype]
    [tensor] = read_shard(written(tmp_path, {"a": entry(dtype, [2, 3], 0, size)}, size)).tensors
    assert (tensor.dtype, tensor.shape, tensor.size) == (dtype, (2, 3), size)
    for wrong in (size - 1, size + 1):
        file = written(tmp_path, {"a": entry(dtype, [2, 3], 0, wrong)}, wrong)
        with pytest.raises(ModelError, match=f"a has {wrong} bytes instead of {size}"):
            read_shard(file)


def test_a_kind_of_number_that_is_not_known_is_read_and_left_to_those_who_open_it(
    tmp_path: Path,
) -> None:
    [tensor] = read_shard(written(tmp_path, {"a": entry("F4", [8], 0, 4)}, 4)).tensors
    assert (tensor.dtype, tensor.size) == ("F4", 4)


@pytest.mark.parametrize(
    ("second", "num_bytes", "said"),
    [
        (entry("F32", [1], 4, 8), 8, None),
        (entry("F32", [1], 5, 9), 9, "the bytes of b are not where they should be"),
        (entry("F32", [1], 0, 4), 4, "are not where they should be"),
        (entry("F32", [1], 4, 8), 9, "model.safetensors"),
        (entry("F32", [1], 4, 8), 7, "model.safetensors"),
    ],
)
def test_tensors_lie_one_behind_the_other_and_fill_the_file(
    tmp_path: Path, second: dict[str, Any], num_bytes: int, said: str | None
) -> None:
    file = written(tmp_path, {"b": second, "a": entry("F32", [1], 0, 4)}, num_bytes)
    if said is None:
        assert [tensor.name for tensor in read_shard(file).tensors] == ["a", "b"]
        return
    with pytest.raises(ModelError, match=said):
        read_shard(file)


def test_a_tensor_of_nothing_lies_before_the_one_at_its_place(tmp_path: Path) -> None:
    file = written(tmp_path, {"a": entry("F32", [1], 0, 4), "none": entry("F32", [0], 0, 0)}, 4)
    assert [tensor.name for tensor in read_shard(file).tensors] == ["none", "a"]


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000, "5", "[]", '{"a": [1]}', '{"a": {"shape": [1], "data_offsets": [0, 4]}}', '{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        '{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}', '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [null, 4]}}', "\\xff",
    ],
    ids=lambda header: header[:40],
)  # fmt: skip
def test_a_header_that_is_none_is_damage_and_no_error_of_ours(tmp_path: Path, header: str) -> None:
    file = tmp_path / "model.safetensors"
    text = header.encode("latin-1")
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ModelError, match=r"is not a whole safetensors file .*; copy it again"):
        read_shard(file)
