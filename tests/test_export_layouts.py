"""Adapters and configs in the other layout: the same function, told in other words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from export_parts import tensor

from finetune.errors import ConfigError, ModelError
from finetune.export import convert, convert_adapter, layout
from finetune.export.shards import Output


def text_model(layers: int = 2) -> Any:
    return SimpleNamespace(rows=(4, 2, 2), config=SimpleNamespace(num_hidden_layers=layers))


def part(*shape: int, start: float = 1.0) -> convert_adapter._Part:
    values = np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)
    return convert_adapter._Part("F32", values)


def lora(rows: int, rank: int = 2, alpha: float = 4.0, start: float = 1.0) -> Any:
    parts = {"lora_A.weight": part(rank, 3, start=start), "lora_B.weight": part(rows, rank, start=start)}  # fmt: skip
    return convert_adapter._Module(parts, rank, alpha)


def with_bias(rows: int, start: float = 1.0) -> Any:
    made = lora(rows, start=start)
    made.parts["base_layer.bias"] = part(rows, start=start)
    return made


def product(module: Any, config: dict[str, Any]) -> Any:
    root = module.rank**0.5 if config.get("use_rslora") else module.rank
    return module.alpha / root * module.of("lora_B").values @ module.of("lora_A").values


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}])
@pytest.mark.parametrize(
    "three",
    [
        [lora(4), lora(2), lora(2)], [lora(4), lora(2, alpha=8.0), lora(2)], [lora(4), lora(2, rank=3, start=5), lora(2, start=9)],
        [lora(4), None, lora(2, start=3)], [None, lora(2), None], [lora(4, alpha=1.5), lora(2, rank=1), lora(2, alpha=3)],
    ],
)  # fmt: skip
def test_q_k_and_v_as_one_module_compute_what_they_did(
    three: list[Any], config: dict[str, Any]
) -> None:
    made = convert_adapter._fuse(three, "qkv", text_model(), config, [])
    wanted = [np.zeros((rows, 3)) if one is None else product(one, config) for one, rows in zip(three, (4, 2, 2), strict=True)]  # fmt: skip
    assert np.allclose(product(made, config), np.concatenate(wanted), rtol=1e-5)


def test_what_one_module_cannot_say_of_q_k_and_v_is_refused() -> None:
    whole = convert_adapter._Module({"weight": part(2, 3)})
    half = lora(2)
    half.parts["lora_B.weight"] = convert_adapter._Part("BF16", np.zeros((2, 2), np.uint16))
    for three, reason in (
        ([lora(4), whole, lora(2)], "not adapted alike"), ([whole, whole, whole], "not adapted alike"), ([lora(4), half, lora(2)], "different dtypes"),
        ([with_bias(4), None, with_bias(2)], "not adapted alike"), ([with_bias(4), lora(2), with_bias(2)], "not adapted alike"), ([lora(4), lora(2), with_bias(2)], "not adapted alike"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=reason):
            convert_adapter._fuse(three, "qkv", text_model(), {}, [])
    made = convert_adapter._fuse([with_bias(4), with_bias(2, start=7), with_bias(2)], "qkv", text_model(), {}, [])  # fmt: skip
    assert made.parts["base_layer.bias"].values.tolist() == [1, 2, 3, 4, 7, 8, 1, 2]


def test_one_module_as_q_k_and_v_gives_each_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_adapter, "other_names", lambda name, layout: ("q", "k", "v") if name == "qkv" else ("o",))  # fmt: skip
    fused = lora(8)
    made = convert_adapter._split({"qkv": fused, "dense": lora(3)}, text_model())
    assert set(made) == {"q", "k", "v", "o"}
    b = [made[name].of("lora_B").values for name in "qkv"]
    assert [len(one) for one in b] == [4, 2, 2]
    assert np.array_equal(np.concatenate(b), fused.of("lora_B").values)
    assert all(made[name].rank == 2 and made[name].alpha == 4.0 for name in "qkv")


def test_a_new_config_names_what_is_adapted_with_its_ranks() -> None:
    old = {"r": 2, "exclude_modules": ["x"], "layers_to_transform": [0], "layers_pattern": "h", "revision": "abc", "base_model_name_or_path": "old", "lora_dropout": 0.1}  # fmt: skip
    made = {"model.layers.0.q": lora(4), "model.layers.1.q": lora(4), "model.layers.0.k": lora(4, rank=3, alpha=6.5), "lm_head": lora(4, rank=5, alpha=10.0), "model.embed": convert_adapter._Module({"weight": part(2, 3)})}  # fmt: skip
    assert convert_adapter._new_config(old, made, text_model(), "new") == {
        "r": 5, "lora_alpha": 10, "lora_dropout": 0.1, "base_model_name_or_path": "new", "revision": None, "exclude_modules": None, "layers_to_transform": None,
        "layers_pattern": None, "modules_to_save": ["embed"], "target_modules": ["lm_head", "model.layers.0.k", "q"],
        "rank_pattern": {"q": 2, "model.layers.0.k": 3}, "alpha_pattern": {"q": 4, "model.layers.0.k": 6.5},
    }  # fmt: skip
    fused = {f"a.{convert_adapter.FUSED}": lora(8, rank=rank) for rank in (6,)}
    [said] = convert_adapter._about_rank({"r": 2}, fused)
    assert "rank 6 and alpha 4" in said
    assert convert_adapter._about_rank({"r": 6}, fused) == []


def test_a_new_base_has_the_shapes_and_the_first_bytes_of_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = SimpleNamespace(folder=Path("old"), layout="hf")
    outputs = [Output("w", "F32", (2, 2), (tensor("w", 2, 2),)), Output("c", "F32", (1,), constant=bytes(4))]  # fmt: skip
    monkeypatch.setattr(convert_adapter, "read_text_model", lambda folder: model)
    monkeypatch.setattr(convert_adapter, "other_outputs", lambda model, layout: outputs)
    starts: dict[str, bytes] = {"a": b"x", "b": b"x", "other": b"y"}
    monkeypatch.setattr(convert_adapter, "_start", lambda one: starts[str(one.file)])
    for there, fits in ((tensor("w", 2, 2, file="b"), True), (tensor("w", 4, 1, file="b"), False), (tensor("w", 2, 2, file="other"), False), (None, False)):  # fmt: skip
        monkeypatch.setattr(convert_adapter, "tensors", lambda folder, there=there: {"w": there} if there else {})  # fmt: skip
        if fits:
            convert_adapter._check_same_weights(model, "hf", Path("new"))
            continue
        with pytest.raises(ModelError, match="w is another"):
            convert_adapter._check_same_weights(model, "hf", Path("new"))
    with pytest.raises(ConfigError, match="is not in the published layout"):
        convert_adapter._check_same_weights(model, "published", Path("new"))


def test_an_export_into_the_same_layout_or_with_a_base_of_a_whole_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SimpleNamespace(layout="hf", folder=tmp_path)
    monkeypatch.setattr(convert, "read_text_model", lambda folder: model)
    monkeypatch.setattr(convert, "find_source", lambda path: (Path(path), []))
    for check in ("none", "tensors", "full"):
        with pytest.raises(ConfigError, match="is in the hf layout already"):
            convert.export_model(tmp_path, tmp_path / "out", layout="hf", check=check)  # type: ignore[arg-type]
    for how in ({"base": "b"}, {"new_base": "b"}):
        with pytest.raises(ConfigError, match="is a whole model; leave them out"):
            convert.export(str(tmp_path), tmp_path / "out", layout="published", **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("scaled", [True, False])
def test_scaled_positions_and_their_base_come_along(scaled: bool) -> None:
    class Config(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            return name

    config = Config(rope_ratio=500, scales_positions=scaled, rope_parameters={"rope_type": "yarn"})
    made = layout.hf_config(SimpleNamespace(config=config), "bfloat16", [1, 2], 3)  # type: ignore[arg-type]
    assert (made["rope_theta"], made["eos_token_id"], made["pad_token_id"]) == (5_000_000.0, [1, 2], 3)  # fmt: skip
    assert made.get("rope_parameters") == ({"rope_type": "yarn"} if scaled else None)


@pytest.mark.parametrize(
    ("change", "said"),
    [({}, ""), ({"rope_type": "yarn"}, "rope_type is 'yarn'"), ({"partial_rotary_factor": 1.0}, "partial_rotary_factor is 1.0"), ({"partial_rotary_factor": None}, "partial_rotary_factor is 1.0"), ({"act": "gelu"}, "hidden_act is 'gelu'")],
)  # fmt: skip
def test_what_the_published_layout_cannot_say_is_named(change: dict[str, Any], said: str) -> None:
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5} | change
    act = rope.pop("act", "silu")
    rope = {name: value for name, value in rope.items() if value is not None}
    config = SimpleNamespace(rope_parameters=rope, hidden_act=act)
    if not said:
        layout._check_hf(config, Path("m"))
        return
    with pytest.raises(ModelError, match=said):
        layout._check_hf(config, Path("m"))


@pytest.mark.parametrize(
    ("three", "noted"),
    [
        ([lora(4), lora(2), lora(2)], False), ([lora(4), lora(2, start=3), lora(2)], False), ([lora(4), None, lora(2)], False),
        ([lora(4), lora(2, alpha=8.0), lora(2)], True), ([lora(4), lora(2), lora(2, rank=4)], True), ([None, lora(2), lora(2, alpha=8.0)], True),
    ],
)  # fmt: skip
def test_only_scales_that_differ_are_rounded_and_that_is_told(
    three: list[Any], noted: bool
) -> None:
    notes: list[str] = []
    made = convert_adapter._fuse(three, "layer.qkv", text_model(), {}, notes)
    assert [note.partition(":")[0] for note in notes] == ["layer.qkv"] * noted
    there = [module for module in three if module is not None]
    if not noted:
        first = there[0]
        assert made.alpha / made.rank == first.alpha / first.rank
        same = len(there) == 3 and all(
            np.array_equal(m.of("lora_A").values, first.of("lora_A").values) for m in there
        )
        assert made.rank == (first.rank if same else sum(m.rank for m in there))


def test_a_rank_above_the_usual_one_is_told_with_what_vllm_wants() -> None:
    made = {"a.self_attention.query_key_value": lora(8, rank=12, alpha=24.5), "b": lora(8, rank=99)}
    [said] = convert_adapter._about_rank({}, made)
    assert "rank 12 and alpha 24.5" in said
    assert said.endswith("--max-lora-rank of at least 12")
    made = {"a.self_attention.query_key_value": lora(8, rank=8)}
    assert convert_adapter._about_rank({}, made) == [], "8 is PEFT's own"


def test_what_is_trained_whole_is_named_by_its_last_word() -> None:
    whole = convert_adapter._Module({"weight": part(2, 3)})
    made = {"model.lm_head": whole, "model.embed_tokens": whole}
    found = convert_adapter._new_config({"r": 3}, made, text_model(), None)
    assert found["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert (found["target_modules"], found["r"], found["lora_alpha"]) == ([], 8, 8)
    assert found["base_model_name_or_path"] is None
    found = convert_adapter._new_config({}, {"q": lora(4)}, text_model(), None)
    assert found["modules_to_save"] is None
