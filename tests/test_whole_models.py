"""A whole model on its way to disk: experts by number, shards by size, and a process that writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import methods
from finetune.artifacts.base_record import BaseRecord
from finetune.config.schema import FullMethod, LoraMethod
from finetune.methods import full
from finetune.methods.full_experts import separated, together
from finetune.models.load import load_model


def test_experts_come_together_in_the_order_of_their_numbers() -> None:
    fused = torch.arange(12 * 4 * 3.0).view(12, 4, 3)
    name = "model.layers.0.mlp.experts"
    apart = separated({f"{name}.gate_up_proj": fused, "model.norm.weight": torch.ones(1)})
    mixed = {key: apart[key] for key in sorted(apart)}  # 0, 1, 10, 11, 2: as a file has them
    back = together(mixed)
    assert torch.equal(back[f"{name}.gate_up_proj"], fused)
    assert back.keys() == {f"{name}.gate_up_proj", "model.norm.weight"}


def test_shards_are_as_large_as_is_allowed_and_their_index_tells_the_size_of_all(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 60_000
    monkeypatch.setattr(full, "MAX_SHARD_BYTES", most)
    model = methods.attach(load_model(tiny_glm), FullMethod())
    methods.save(model, tmp_path, base=BaseRecord(str(tiny_glm), None, "x"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    total = 0
    for file in files:
        tensors = load_file(tmp_path / file)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert size <= most or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {file}
        total += size
    assert index["metadata"]["total_size"] == total
    assert total == sum(w.numel() * w.element_size() for w in model.parameters())


def test_a_shard_that_cannot_be_written_fails_the_save_after_all_were_gathered(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full, "MAX_SHARD_BYTES", 60_000)
    model = methods.attach(load_model(tiny_glm), FullMethod())
    gathered: list[int] = []

    def gather(names: Any) -> Any:
        gathered.append(len(names))
        return full.own_weights(model)(names)

    def broken(tensors: Any, path: Path) -> None:
        raise OSError(f"of shard {len(gathered)}")

    monkeypatch.setattr(full, "save_tensors", broken)
    with pytest.raises(OSError, match="of shard 1"):
        full.save(model, tmp_path, base=BaseRecord(str(tiny_glm), None, "x"), gather=gather)
    assert sum(gathered) == len(methods.saved_names(model))  # the others must not be left waiting
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_gathers_nothing_writes_nothing(tiny_glm: Path, tmp_path: Path) -> None:
    model = methods.attach(load_model(tiny_glm), FullMethod())
    base = BaseRecord(str(tiny_glm), None, "x")
    methods.save(model, tmp_path, base=base, gather=lambda names: {})
    adapted = methods.attach(load_model(tiny_glm), LoraMethod(rank=2))
    methods.save(adapted, tmp_path, base=base, gather=lambda names: {})
    assert list(tmp_path.iterdir()) == []
