from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import make_adapter, make_base
from safetensors.torch import load_file, save_file

from finetune.artifacts.base_record import BaseRecord
from finetune.artifacts.model_config import is_count, read_model_config
from finetune.artifacts.weights import model_fingerprint
from finetune.errors import ModelError
from finetune.evaluation.keys import model_key
from finetune.export.merge import merge
from finetune.methods import full
from finetune.models.load import load_model

WEIGHTS = "model.safetensors"


def model(folder: Path, family: str = "glm", **config: Any) -> Path:
    tiny.save_model(folder, family)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


HOSTILE: dict[str, tuple[Any, str]] = {
    "num_hidden_layers": (10**9, "num_hidden_layers is 1000000000, must be from 1 to"),
    "head_dim": (10**6, "head_dim is 1000000, must be from 1 to"),
    "hidden_size": (2.5, "hidden_size is 2.5"),
    "vocab_size": ("many", "vocab_size is 'many'"),
    "num_attention_heads": (0, "num_attention_heads is 0"),
    "num_key_value_heads": (-2, "num_key_value_heads is -2"),
    "intermediate_size": (True, "intermediate_size is True"),
    "max_position_embeddings": ([1], r"max_position_embeddings is \[1\]"),
    "rms_norm_eps": ("x", "rms_norm_eps is 'x'"),
    "rope_theta": (float("nan"), "rope_theta is nan"),
    "use_cache": ("no", "use_cache is 'no'"),
    "tie_word_embeddings": ("x", "tie_word_embeddings is 'x'"),
    "eos_token_id": ([1, "x"], "eos_token_id is"),
    "rope_parameters": ({"rope_type": "unknown", "rope_theta": 1.0}, "cannot be loaded"),
    "rope_scaling": (7, "rope_scaling is no object"),
    "vision_config": ("x", "vision_config is no object"),
}


@pytest.mark.parametrize("key", HOSTILE)
def test_a_config_that_cannot_be_is_refused_in_words_at_once(tmp_path: Path, key: str) -> None:
    value, reason = HOSTILE[key]
    folder = model(tmp_path / "model", **{key: value})
    started = time.process_time()
    with pytest.raises(ModelError, match=reason):
        load_model(folder)
    assert time.process_time() - started < 5


def test_sizes_that_are_possible_one_by_one_and_not_together_are_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / WEIGHTS)
    # One long tensor allows every side to be long.
    stored["model.embed_tokens.weight"] = torch.zeros(1 << 20, 1)
    save_file(stored, folder / WEIGHTS)
    values |= {"hidden_size": 1 << 20, "intermediate_size": 1 << 20}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"asks for about \d[\d,]+ numbers and its weights hold"):
        load_model(folder)


def test_a_config_nested_without_end_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "config.json").write_text('{"a":' * 200_000 + "1" + "}" * 200_000)
    with pytest.raises(ModelError, match="is damaged"):
        load_model(folder)


@pytest.mark.parametrize("family", ["glm", "glm4", "chatglm"])
def test_configs_of_every_family_are_taken(tmp_path: Path, family: str) -> None:
    assert read_model_config(model(tmp_path / "model", family))["model_type"] == family


def spoil(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    stored = load_file(folder / WEIGHTS)
    name = sorted(stored)[len(stored) // 2]
    stored[name] = change(stored[name].clone())
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    return name


def last(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, value: float, dtype: str
) -> None:
    folder = model(tmp_path / "model")
    name = spoil(folder, last(value))
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load_model(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_weights_that_are_no_floating_point_numbers_are_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = model(tmp_path / "model")
    name = spoil(folder, lambda tensor: (100 * tensor).to(dtype))
    with pytest.raises(ModelError, match="quantised weights without their scales") as caught:
        load_model(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize("location", ["touched", "copied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_is_not_finite_is_not_merged_into(
    tmp_path: Path, location: str, dtype: torch.dtype
) -> None:
    base = make_base(tmp_path / "base", dtype, shards=1)
    adapter = make_adapter(tmp_path / "adapter", base)
    (adapter / "finetune.json").unlink()  # of the base before
    file = base / "model-00001-of-00001.safetensors"
    stored = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight" if location == "touched" else "model.norm.weight"
    stored[name].view(-1)[-1] = float("nan")
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite") as caught:
        merge(adapter, tmp_path / "out", check="none")
    assert name in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_the_fingerprint_sees_the_start_the_middle_and_the_end_of_a_tensor(
    tmp_path: Path, place: float
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    values = torch.arange(1000, dtype=torch.float32)
    save_file({"a": values}, folder / WEIGHTS)
    before = model_fingerprint(folder)
    values[int(place * 999)] += 1
    save_file({"a": values}, folder / WEIGHTS)
    assert model_fingerprint(folder) != before


def test_a_full_checkpoint_that_lacks_a_tensor_is_not_resumed(tmp_path: Path) -> None:
    base = load_model(model(tmp_path / "base"))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    record = BaseRecord(str(tmp_path / "base"), None, "f")
    full.save(base, folder, base=record, gather=full.own_weights(base))
    full.restore(base, folder)
    stored = load_file(folder / WEIGHTS)
    for name in sorted(stored):
        save_file({n: t for n, t in stored.items() if n != name}, folder / WEIGHTS)
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            full.restore(base, folder)


def test_kept_results_are_those_of_the_adapters_options_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    before = model_key(str(adapter), None)
    assert model_key(str(adapter), None) == before
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    assert model_key(str(adapter), None) != before


@pytest.mark.parametrize(
    ("value", "counts"),
    [(1, True), (2, True), (2**31, True), (0, False), (-1, False), (2**31 + 1, False), (True, False),
     (1.0, False), ("1", False), (None, False)],
)  # fmt: skip
def test_a_count_is_a_whole_number_from_one_on(value: Any, counts: bool) -> None:
    assert is_count(value) == counts
