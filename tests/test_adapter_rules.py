"""What the settings of an adapter may be, and which tensors they ask for; no model is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hints import said
from test_artifact_rules import Tensors, write_tensors

from finetune.artifacts.adapter import PREFIX, check_complete, check_config, read_lora
from finetune.artifacts.regex import LONGEST, match_names
from finetune.errors import ModelError

SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q", "k"]}


def adapter(folder: Path, tensors: Tensors | None = None, **settings: Any) -> Path:
    """An adapter of the modules x.q and x.k of rank 2, or of other tensors."""
    pairs = {f"x.{m}.lora_{p}.weight": s for m in "qk" for p, s in (("A", (2, 8)), ("B", (8, 2)))}
    named = {PREFIX + name: shape for name, shape in (pairs | (tensors or {})).items()}
    write_tensors(folder / "adapter_model.safetensors", named)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


# --- what a setting may be -----------------------------------------------------------------------

TAKEN_AND_REFUSED: list[tuple[str, list[Any], list[Any]]] = [
    ("r", [1, 64], [0, -1, True, 1.5, "8", None]),
    ("lora_alpha", [6, 0.5, -1e6, 1e6], [1.1e6, -1.1e6, True, "8", None, 10**400]),
    ("lora_dropout", [0, 0.1, 1], [-0.1, 1.1, True, "0"]),
    ("target_modules", ["q", ["q"], "all-linear"], ["", [], [""], [1], ["q", 1], 3]),
    ("exclude_modules", [None, "q", ["q"]], [3, [1], [""]]),
    ("modules_to_save", [None, []], ["q", [1]]),
    ("target_parameters", [None, []], ["q", [1]]),
    ("layers_to_transform", [None, 1, [0, 1]], [True, [True], "1", 1.5]),
    ("rank_pattern", [None, {}, {"q": 2}], [{"q": 0}, {"q": True}, [1], "q"]),
    ("alpha_pattern", [None, {}, {"q": 1e6}], [{"q": 1.1e6}, {"q": "x"}, [1]]),
    ("bias", ["none", "all", "lora_only"], ["some", None, True]),
    ("init_lora_weights", [True, False, "gaussian", "eva", "orthogonal", None],
     ["pissa", "olora", "corda", "loftq", "pissa_niter_4", 1, 0]),
    ("use_rslora", [True, False, None], ["yes", 1]),
    ("use_dora", [False, None], ["yes", 1]),
    ("megatron_core", [None, "megatron.core"], ["os"]),
    ("task_type", [None, "CAUSAL_LM"], ["SEQ_CLS"]),
    ("revision", [None, "v1"], [3]),
    ("base_model_name_or_path", [None, "m"], [3]),
    *((name, [None, False, 0, "", [], {}], [1, "x", [1], {"a": 1}]) for name in (
        "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "layer_replication",
        "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config",
        "layers_pattern", "monteclora_config", "megatron_config", "ensure_weight_tying",
        "velora_config", "of_a_later_peft")),
    *((name, [None, 1, "x", {"a": 1}], []) for name in (
        "peft_version", "auto_mapping", "inference_mode", "loftq_config", "eva_config",
        "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
        "encoder_hidden_size", "init_weights", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "taken", "refused"), TAKEN_AND_REFUSED, ids=lambda v: str(v)[:30])
def test_each_setting_of_an_adapter_is_taken_or_refused_by_its_value(
    tmp_path: Path, name: str, taken: list[Any], refused: list[Any]
) -> None:
    file = tmp_path / "adapter_config.json"
    for value in taken:
        file.write_text(json.dumps(SETTINGS | {name: value}))
        assert check_config(tmp_path)[name] == value
    for value in refused:
        file.write_text(json.dumps(SETTINGS | {name: value}))
        with pytest.raises(ModelError, match=name):
            check_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("num_virtual_tokens", [1, 4], [0, None, True, "4"]),
        ("token_dim", [None, 8], [0, "8"]), ("num_layers", [None, 2], [0, "2"]),
        ("num_attention_heads", [None, 2], [0, "2"]),
        ("num_transformer_submodules", [None, 1], [2]),
        ("prefix_projection", [None, True, False], ["x"]), ("modules_to_save", [None, []], [["x"]]),
    ],
)  # fmt: skip
def test_each_setting_of_a_prefix_is_taken_or_refused_by_its_value(
    tmp_path: Path, name: str, taken: list[Any], refused: list[Any]
) -> None:
    prefix = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}
    file = tmp_path / "adapter_config.json"
    for value in taken:
        file.write_text(json.dumps(prefix | {name: value}))
        assert check_config(tmp_path)[name] == value
    for value in refused:
        file.write_text(json.dumps(prefix | {name: value}))
        with pytest.raises(ModelError, match=name):
            check_config(tmp_path)


# --- what an adapter is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, {"x.q": 3, "x.k": 3}),
        ({"use_rslora": True}, {"x.q": 6 / math.sqrt(2), "x.k": 6 / math.sqrt(2)}),
        ({"alpha_pattern": {"q": 8}}, {"x.q": 4, "x.k": 3}),
        # Of several patterns that match the first one counts.
        ({"alpha_pattern": {"q": 8, "x.q": 2, ".*": 10}}, {"x.q": 4, "x.k": 5}),
        # A pattern is of the end of a name, behind a point.
        ({"alpha_pattern": {"x": 8, "k": 2}}, {"x.q": 3, "x.k": 1}),
        ({"r": 4, "rank_pattern": {"q": 2, "k": 2}}, {"x.q": 3, "x.k": 3}),
    ],
)
def test_a_modules_scale_is_its_alpha_by_its_rank(
    tmp_path: Path, settings: dict[str, Any], scales: dict[str, float]
) -> None:
    found = read_lora(adapter(tmp_path, **settings))
    assert {name: found.scale(name) for name in found.modules} == pytest.approx(scales)


NAMES = ["m.layers.0.x.q", "m.layers.0.x.k", "m.layers.1.x.q", "m.layers.1.x.k", "head.q2", "x.q"]


@pytest.mark.parametrize(
    ("settings", "adapted"),
    [
        ({}, {"m.layers.0.x.q", "m.layers.0.x.k", "m.layers.1.x.q", "m.layers.1.x.k", "x.q"}),
        ({"target_modules": ["x.q"]}, {"m.layers.0.x.q", "m.layers.1.x.q", "x.q"}),
        ({"target_modules": r".*\.0\.x\.[qk]"}, {"m.layers.0.x.q", "m.layers.0.x.k"}),
        ({"exclude_modules": ["q"]}, {"m.layers.0.x.k", "m.layers.1.x.k"}),
        ({"exclude_modules": r".*\.1\..*"}, {"m.layers.0.x.q", "m.layers.0.x.k", "x.q"}),
        ({"layers_to_transform": 1}, {"m.layers.1.x.q", "m.layers.1.x.k"}),
        ({"layers_to_transform": [0]}, {"m.layers.0.x.q", "m.layers.0.x.k"}),
    ],
)
def test_what_a_config_adapts_is_missed_in_its_file_and_nothing_else(
    tmp_path: Path, settings: dict[str, Any], adapted: set[str]
) -> None:
    found = read_lora(adapter(tmp_path, **settings))
    expected = {f"it has nothing for {name}, which its config adapts" for name in adapted - {"x.q"}}
    if "x.q" not in adapted:
        expected.add("it holds x.q, which its config does not adapt")
    said_ = found.misfits(NAMES)
    assert set(said_) == expected
    assert said_ == sorted(said_, key=lambda one: (one.startswith("it holds"), one))


WHOLE: list[tuple[str, dict[str, Any], bool]] = [
    ("x.q.bias", {}, False),
    ("x.q.bias", {"bias": "all"}, True),
    ("x.q.bias", {"bias": "lora_only"}, True),
    ("norm.weight", {}, False),
    ("lm_head.weight", {}, False),
    ("norm.weight", {"modules_to_save": ["norm"]}, True),
    ("x.norm.modules_to_save.default.weight", {"modules_to_save": ["norm"]}, True),
    ("subnorm.weight", {"modules_to_save": ["norm"]}, False),
    ("x.q.lora_C.weight", {}, False),
    ("x.q.lora_B.bias", {"bias": "all"}, False),
    ("embed.token_adapter.trainable_tokens_delta", {}, False),
]


@pytest.mark.parametrize(("name", "settings", "known"), WHOLE)
def test_a_tensor_that_was_trained_whole_is_known_by_the_config(
    tmp_path: Path, name: str, settings: dict[str, Any], known: bool
) -> None:
    folder = adapter(tmp_path, {name: (2,)}, **settings)
    if known:
        assert list(read_lora(folder).whole) == [name.replace("modules_to_save.default.", "")]
    else:
        assert f"{name} is of a kind that is not known here" in said(read_lora, folder)


def test_an_entry_of_the_config_without_a_tensor_is_missed(tmp_path: Path) -> None:
    for key in ("modules_to_save", "target_parameters"):
        folder = adapter(tmp_path, **{key: ["gone"]})
        assert f"{key} names gone, and there is no tensor of it" in said(read_lora, folder)
    for rank, told in ((64, False), (65, True)):
        folder = adapter(tmp_path, rank_pattern={"nobody": rank})
        if told:
            assert f"rank {rank} is in adapter_config.json and in no tensor" in said(
                read_lora, folder
            )
        else:
            read_lora(folder)


def test_a_list_is_too_long_when_the_file_has_far_fewer_tensors(tmp_path: Path) -> None:
    long = ["q", "k", *map(str, range(1022))]
    read_lora(adapter(tmp_path, target_modules=long))
    assert "target_modules has 1025 entries, and the file 4 tensors" in said(
        read_lora, adapter(tmp_path, target_modules=[*long, "more"])
    )


def test_what_the_base_takes_and_the_file_has_is_compared_both_ways() -> None:
    file, expected = Path("a"), {"one": (1, 2), "two": (3,)}
    check_complete(file, expected, expected)
    assert "one is missing" in said(check_complete, file, {"two": (3,)}, expected)
    assert "one is (2, 1) and not (1, 2)" in said(
        check_complete, file, expected | {"one": (2, 1)}, expected
    )
    more = said(check_complete, file, expected | {"six": (1,)}, expected)
    assert "six has no place in the base" in more
    assert "missing" not in more
    many = said(check_complete, file, {str(n): (1,) for n in range(7)} | expected, expected)
    assert many.count("has no place") == 5
    assert "and 2 more" in many


def test_patterns_match_whole_names_and_are_not_endless() -> None:
    assert match_names(["ab"], ["ab", "abc", "xab"], location="x") == {"ab": {"ab"}}
    assert match_names(["a."], ["ab", "abc"], location="x") == {"a.": {"ab"}}
    match_names(["a" * LONGEST], [], location="x")
    with pytest.raises(ModelError, match="longer than"):
        match_names(["a" * (LONGEST + 1)], [], location="x")
