"""How much memory a full fine-tuning takes in tensors, counted byte by byte: no copy that is not said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from adapters import weights_of
from closeness import assert_trained_alike
from weight_copies import NUM_SHARDS, SIZES

from finetune.artifacts.names import WEIGHTS_INDEX
from finetune.artifacts.weights import model_fingerprint, read_shard, weight_files
from finetune.methods import BaseRecord, full
from finetune.models.load import load_model

# What a step may hold at most, in units of the weights in float32; docs/methods.md has the sums.
# Weights, gradients and Adam's two moments; under DeepSpeed also originals, their gradients and Adam's work.
# In bfloat16 without DeepSpeed the casts are gone before all gradients are there.
PEAKS = {
    "float32-zeroNone-1p-adamw_torch": 1 + 1 + 2,
    "bfloat16-zeroNone-1p-adamw_torch": 1 + 1 + 2,
    "bfloat16-zero2-1p-adamw_torch": 0.5 + 0.5 + 1 + 2 + 1 + 2,
    "float32-zero2-1p-adamw_torch": 1 + 1 + 1 + 2 + 1 + 2,
    "bfloat16-zero2-1p-adamw_torch_fused": 0.5 + 0.5 + 0.5 + 1 + 2 + 1,
}
# Copies of single tensors, and what the dialogue computes. Half a copy of the weights, in bfloat16, is more.
MARGIN = 0.35


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("copies")


@pytest.fixture(scope="module")
def measured(folder: Path) -> Mapping[str, Any]:
    """What the program counted; its runs stay in the folder."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("weight_copies.py")), str(folder)],
        capture_output=True, text=True, timeout=300, check=False,
        # Blocks of tensors go back to the kernel at once, so that it counts what is in use.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", list(PEAKS))
def test_a_step_of_full_tuning_holds_nothing_beyond_what_the_page_says(
    measured: Mapping[str, Any], name: str
) -> None:
    (found,) = measured[name]
    assert PEAKS[name] - 0.05 < found["peak"] < PEAKS[name] + MARGIN


@pytest.mark.parametrize("name", list(PEAKS))
def test_a_save_of_whole_weights_copies_none(measured: Mapping[str, Any], name: str) -> None:
    assert measured[name][0]["save"] < measured["largest"]


def test_under_zero_3_a_save_adds_one_shard_to_the_leader_and_one_weight_to_the_others(
    measured: Mapping[str, Any],
) -> None:
    leader, other = measured["float32-zero3-2p-adamw_torch"]
    largest, noise = measured["largest"], 0.05
    assert 2 * largest < leader["save"] < 1 / NUM_SHARDS + largest + noise
    assert 0 < other["save"] < 2 * largest + noise  # for a moment in parts and in one piece


def test_shards_of_two_processes_are_those_of_one(
    measured: Mapping[str, Any], folder: Path
) -> None:
    whole, sharded = (
        folder / f"float32-{place}/checkpoint-2"
        for place in ("zeroNone-1p-adamw_torch", "zero3-2p-adamw_torch")
    )
    names = [file.name for file in weight_files(whole)]
    assert len(names) == len({*names}) > NUM_SHARDS - 1
    assert [file.name for file in weight_files(sharded)] == names
    assert (sharded / WEIGHTS_INDEX).read_bytes() == (whole / WEIGHTS_INDEX).read_bytes()
    for name in names:
        left, right = read_shard(sharded / name), read_shard(whole / name)
        assert left.header == right.header
        assert (sharded / name).stat().st_size == (whole / name).stat().st_size
    assert_trained_alike(sharded.parent, whole.parent)
    ours, before = weights_of(sharded), weights_of(folder / "model")
    assert ours.keys() == before.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, before[name]) == ("inv_freq" in name), name


def test_a_shard_is_let_go_before_the_next_is_gathered(
    tiny_chatglm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full, "MAX_SHARD_BYTES", 20_000)
    model = load_model(tiny_chatglm)
    whole, gathered = full.own_weights(model), []

    def gather(names: Sequence[str]) -> dict[str, torch.Tensor]:
        assert [left for left in gathered if left() is not None] == []
        found = {name: tensor.clone() for name, tensor in whole(names).items()}
        gathered.extend(weakref.ref(tensor) for tensor in found.values())
        return found

    base = BaseRecord(str(tiny_chatglm), None, model_fingerprint(tiny_chatglm))
    full.save(model, tmp_path, base=base, gather=gather)
    assert len(gathered) == len(weights_of(tmp_path))
    assert len(weight_files(tmp_path)) > 3


def test_a_run_goes_on_from_a_checkpoint_in_shards_with_the_same_bits(
    tiny_chatglm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full, "MAX_SHARD_BYTES", 20_000)
    data = runs.write_dialogues(tmp_path / "train.jsonl", 8)
    whole, part = (
        runs.config(
            tiny_chatglm, data, tmp_path / name, training__max_steps=3,
            training__save_every_steps=1, training__learning_rate=1e-3,
        ) | {"method": {"kind": "full"}}
        for name in ("whole", "part")
    )  # fmt: skip
    runs.run_here(whole)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "part/checkpoint-2")
    assert runs.run_here(part)["resumed_from"] == str(tmp_path / "part/checkpoint-2")
    files = weight_files(tmp_path / "whole/checkpoint-3")
    assert len(files) > 3
    for file in files:
        assert (tmp_path / "part/checkpoint-3" / file.name).read_bytes() == file.read_bytes()


def test_the_model_is_large_beside_its_largest_weight(measured: Mapping[str, Any]) -> None:
    assert measured["largest"] < MARGIN / 3, SIZES
