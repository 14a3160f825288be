"""Names, weights, configs, experts and adapters, value by value; no model is loaded."""

from __future__ import annotations

import json
import re
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hints import said
from test_adapter_rules import SETTINGS, adapter
from test_artifact_rules import Tensors, model, write_tensors

from finetune.artifacts import (
    checkpoint,
    experts,
    names,
    weights,
)
from finetune.artifacts.adapter import PREFIX, check_config, read_lora, understood
from finetune.artifacts.model_config import check_floats, read_model_config, shown

# --- names, weights ------------------------------------------------------------------------------


def constant(module: str, name: str) -> str:
    """What a library's source calls a file; importing it would take seconds."""
    package, _, rest = module.partition(".")
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / f"{rest.replace('.', '/')}.py").read_text("utf-8")
    [value] = re.findall(rf'^{name} = "([^"]+)"', source, re.MULTILINE)
    return str(value)


def test_files_are_called_as_the_libraries_call_them() -> None:
    for ours, module, name in (
        (names.ADAPTER_CONFIG, "peft.utils.constants", "CONFIG_NAME"),
        (names.ADAPTER_WEIGHTS, "peft.utils.constants", "SAFETENSORS_WEIGHTS_NAME"),
        (names.MODEL_CONFIG, "transformers.utils.__init__", "CONFIG_NAME"),
        (names.MODEL_WEIGHTS, "transformers.utils.__init__", "SAFE_WEIGHTS_NAME"),
        (names.WEIGHTS_INDEX, "transformers.utils.__init__", "SAFE_WEIGHTS_INDEX_NAME"),
        (names.GENERATION_CONFIG, "transformers.utils.__init__", "GENERATION_CONFIG_NAME"),
        (names.PREPROCESSOR_CONFIG, "transformers.utils.__init__", "FEATURE_EXTRACTOR_NAME"),
        (names.CHAT_TEMPLATE, "transformers.utils.hub", "CHAT_TEMPLATE_FILE"),
        (
            names.OLDER_CHAT_TEMPLATE,
            "transformers.utils.hub",
            "LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE",
        ),
        (names.TRAINER_STATE, "transformers.trainer", "TRAINER_STATE_NAME"),
    ):
        assert ours == constant(module, name)


def test_a_run_of_an_earlier_version_has_files_of_these_names() -> None:
    ours = {
        "BASE_RECORD": "finetune.json", "PREFIX_ENCODER": "prefix_encoder.safetensors", "PREFIX_UNITS": "prefix_units.safetensors",
        "RUN_RECORD": "run.json", "STREAM": "stream.json", "RUN_CONFIG": "config.yaml", "RUN_DATA": "data.json", "RUN_METRICS": "metrics.jsonl",
        "BEST": "best.json", "UNTUNED": "untuned.npz", "EVALUATION": "evaluation.json", "MANIFEST": "manifest.json",
    }  # fmt: skip
    assert {name: getattr(names, name) for name in ours} == ours
    assert checkpoint.folder_name(7) == "checkpoint-7"
    assert checkpoint.folder_name(7, resumable=False) == "weights-7"


def test_bytes_of_a_number_are_those_that_torch_takes() -> None:
    import torch
    from safetensors.torch import save

    for dtype in (torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32, torch.float64, torch.int64, torch.uint64):  # fmt: skip
        written = save({"a": torch.zeros(3).to(dtype)})
        header = json.loads(written[8 : 8 + struct.unpack("<Q", written[:8])[0]])
        assert weights.ITEM_SIZE[header["a"]["dtype"]] == dtype.itemsize, dtype
    assert len(weights.ITEM_SIZE) == 15


def sharded(folder: Path, *shards: dict[str, int]) -> Path:
    """A model in several files: each tensor with the byte that fills it."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    index = {}
    for number, shard in enumerate(shards):
        for name, content in shard.items():
            file = f"{number}-{name}.safetensors"
            write_tensors(folder / file, {name: (40,)}, content=content)
            index[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_a_fingerprint_is_of_the_tensors_however_they_are_spread(tmp_path: Path) -> None:
    one = sharded(tmp_path / "one", {"a": 1, "b": 2})
    other = sharded(tmp_path / "other", {"b": 2}, {"a": 1})
    swapped = sharded(tmp_path / "swapped", {"a": 2, "b": 1})
    assert weights.model_fingerprint(one) == weights.model_fingerprint(str(other))
    assert weights.model_fingerprint(swapped) != weights.model_fingerprint(one)
    assert [file.name for file in weights.weight_files(other)] == ["0-b.safetensors", "1-a.safetensors"]  # fmt: skip
    many = sharded(tmp_path / "many", *({name: 0} for name in "hgfedcba"))
    assert [file.name for file in weights.weight_files(many)] == sorted(file.name for file in many.glob("*.safetensors"))  # fmt: skip
    found = weights.tensors(one)
    assert {name: tensor.shape for name, tensor in found.items()} == {"a": (40,), "b": (40,)}
    for index in ("[]", '{"weight_map": {"a": ["x"]}}', "{}"):
        (one / "model.safetensors.index.json").write_text(index)
        assert "is damaged" in said(weights.weight_files, one)
    (one / "model.safetensors.index.json").unlink()
    assert "has neither model.safetensors nor" in said(weights.weight_files, one)


def test_the_header_of_a_file_is_kept_as_it_is_with_what_its_maker_noted(tmp_path: Path) -> None:
    entries = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}  # fmt: skip
    text = json.dumps(entries).encode()
    head = struct.pack("<Q", len(text)) + text
    (tmp_path / "m").write_bytes(head + b"abcd")
    shard = weights.read_shard(tmp_path / "m")
    assert (shard.header, shard.metadata) == (head, {"format": "pt"})
    for damaged, reason in (
        (head[:20], "its header is cut off"), (head[:5], "is not a whole safetensors file"),
        (struct.pack("<Q", 100_000_001) + text, "its header is too long"), (struct.pack("<Q", 2) + b"[]", "is not a whole safetensors file"),
    ):  # fmt: skip
        (tmp_path / "m").write_bytes(damaged)
        assert reason in said(weights.read_shard, tmp_path / "m")
    assert "cannot be read (No such file" in said(weights.read_shard, tmp_path / "none")
    assert "has no adapter_model.safetensors" in said(weights.adapter_file, tmp_path)


@pytest.mark.parametrize(
    ("keys", "taken", "refused"),
    [
        ("num_layers num_hidden_layers depth", [1, None], [2, 0, "1", 1.0]),
        (
            "hidden_size ffn_hidden_size intermediate_size kv_channels head_dim vocab_size num_attention_heads num_heads multi_query_group_num "
            "num_key_value_heads padded_vocab_size out_hidden_size patch_size in_channels spatial_merge_size temporal_patch_size num_positions",
            [1, 64, None], [65, 0, True, "8"],
        ),
        ("seq_length max_position_embeddings image_size", [1, 2**31, None], [0, 2**31 + 1, 1.5]),
        (
            "rms_norm_eps layernorm_epsilon layer_norm_eps rope_ratio rope_theta attention_dropout hidden_dropout dropout_prob initializer_range partial_rotary_factor",
            [0, 1e-5, -1, 10**300, None], ["1", True, float("inf"), float("nan"), 10**400],
        ),
        ("use_cache tie_word_embeddings add_qkv_bias attention_bias rmsnorm", [True, False, None], [0, "true"]),
        ("num_labels _num_labels", [1, 10_000, None], [0, 10_001]),
        ("eos_token_id pad_token_id bos_token_id boi_token_id eoi_token_id image_token_id", [-1, 0, [1, 2], None], [-2, 1.5, ["1"]]),
        ("text_config vision_config rope_parameters rope_scaling", [{}, None], [[], 1, "x"]),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_every_number_of_a_config_is_taken_or_refused_by_what_it_is(
    tmp_path: Path, keys: str, taken: list[Any], refused: list[Any]
) -> None:
    for key in keys.split():
        for value in taken:
            assert read_model_config(model(tmp_path, **{key: value}))[key] == value, key
        for value in refused:
            assert f"{key} is" in said(read_model_config, model(tmp_path, **{key: value})), key


def test_weights_of_other_kinds_are_counted_and_one_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"x": (1,), "y": (2,)}, "I8")
    text = said(check_floats, tmp_path, weights.tensors(tmp_path))
    assert "holds 2 tensors that are not F16, BF16, F32, such as x (I8)" in text
    for dtype in ("F16", "BF16", "F32"):
        write_tensors(tmp_path / "model.safetensors", {"x": (1,)}, dtype)
        check_floats(tmp_path, weights.tensors(tmp_path))
    assert (shown("x" * 38), shown("x" * 39)) == (repr("x" * 38), "'" + "x" * 36 + "…")


# --- experts -------------------------------------------------------------------------------------


def test_names_of_experts_are_taken_apart_and_put_together() -> None:
    assert experts.fused_part("m.layers.1.mlp.experts.down_proj") == ("m.layers.1.mlp.experts", "down_proj")  # fmt: skip
    assert experts.separate_name("m.experts.12.up_proj.weight") == ("m.experts", 12, "up_proj")
    for other in ("m.experts.12.up_proj.bias", "m.experts.x.up_proj.weight", "m.shared.up_proj.weight"):  # fmt: skip
        assert experts.separate_name(other) is None
        assert experts.fused_part(other) is None
    there = [f"{m}.experts.{e}.{leaf}.weight" for m in ("y", "x") for e in range(3) for leaf in ("gate_proj", "up_proj", "down_proj")]  # fmt: skip
    assert experts.fused_names([*there, "z.weight"]) == [f"{m}.experts.{part}" for m in "xy" for part in ("gate_up_proj", "down_proj")]  # fmt: skip
    apart = [name for part in experts.fused_names(there[:9]) for name in experts.separate_names(part, 3)]  # fmt: skip
    assert sorted(apart) == sorted(there[:9])
    assert experts.num_experts({"n_routed_experts": 8}) == 8
    assert experts.num_experts({"text_config": {"n_routed_experts": 4}, "n_routed_experts": 8}) == 4
    assert experts.num_experts({"n_routed_experts": None}) == experts.num_experts({}) == 0


# --- adapters ------------------------------------------------------------------------------------


def holding(folder: Path, tensors: Tensors, **settings: Any) -> Path:
    """An adapter of these tensors and no others."""
    write_tensors(folder / "adapter_model.safetensors", {PREFIX + name: shape for name, shape in tensors.items()})  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


EMBEDDING: Tensors = {"embed_tokens.lora_embedding_A": (2, 50), "embed_tokens.lora_embedding_B": (8, 2)}  # fmt: skip


def test_an_adapted_embedding_has_both_of_its_parts_and_the_embeddings_saved_beside_it(
    tmp_path: Path,
) -> None:
    beside: Tensors = {
        "y.original_module.weight": (1,), "lm_head.weight": (50, 8), "embed_tokens.base_layer.weight": (50, 8), "x.original_module.weight": (1,),
    }  # fmt: skip
    found = read_lora(holding(tmp_path, EMBEDDING | beside))
    assert set(found.modules["embed_tokens"]) == {"lora_embedding_A", "lora_embedding_B"}
    assert set(found.whole) == {"lm_head.weight", "embed_tokens.weight"}
    assert found.ranks == {"embed_tokens": 2}
    for name in EMBEDDING:
        part = name.rpartition(".")[2]
        folder = holding(tmp_path, {n: s for n, s in EMBEDDING.items() if n != name})
        assert f"embed_tokens has no {part}" in said(read_lora, folder)
    norm = holding(tmp_path, EMBEDDING | {"norm.weight": (8,)})
    assert "norm.weight is of a kind that is not known here" in said(read_lora, norm)
    turned = holding(tmp_path, EMBEDDING | {"embed_tokens.lora_embedding_B": (2, 8)})
    assert "do not fit" in said(read_lora, turned)


def test_magnitudes_belong_to_dora_alone(tmp_path: Path) -> None:
    pair: Tensors = {"x.q.lora_A.weight": (2, 8), "x.q.lora_B.weight": (8, 2)}
    for name in ("x.q.lora_magnitude_vector", "x.q.lora_magnitude_vector.weight"):
        with_it = pair | {name: (8,)}
        found = read_lora(holding(tmp_path, with_it, use_dora=True))
        assert set(found.modules["x.q"]) == {"lora_A", "lora_B", "lora_magnitude_vector"}
        assert "has a lora_magnitude_vector that nothing uses" in said(read_lora, holding(tmp_path, with_it))  # fmt: skip
    assert "x.q has no lora_magnitude_vector" in said(read_lora, holding(tmp_path, pair, use_dora=True))  # fmt: skip


def test_adapters_of_experts_are_told_by_how_deep_they_lie(tmp_path: Path) -> None:
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    inner = {"x.mlp.experts.base_layer": (8, 16), "x.mlp.experts": (16, 8)}
    tensors: Tensors = {}
    for name, (rows, columns) in inner.items():  # two experts of rank 2 each
        tensors |= {f"{name}.lora_A.weight": (4, columns), f"{name}.lora_B.weight": (rows, 4)}
    found = read_lora(holding(tmp_path, tensors, target_modules=[], target_parameters=targets))
    assert found.modules["x.mlp.experts.gate_up_proj"]["lora_A"].shape == (4, 16)
    assert found.modules["x.mlp.experts.down_proj"]["lora_A"].shape == (4, 8)
    assert found.misfits(["x.mlp.experts.gate_up_proj", "x.mlp.experts.down_proj", "x.q"]) == []
    assert found.misfits(["y.mlp.experts.down_proj"]) == ["it has nothing for y.mlp.experts.down_proj, which its config adapts"]  # fmt: skip
    one = {name: shape for name, shape in tensors.items() if "base_layer" not in name}
    found = read_lora(holding(tmp_path, one, target_modules=[], target_parameters=targets[1:]))
    assert list(found.modules) == ["x.mlp.experts.down_proj"]
    odd = tensors | {"x.mlp.experts.lora_A.weight": (5, 8), "x.mlp.experts.lora_B.weight": (16, 5)}
    folder = holding(tmp_path, odd, target_modules=[], target_parameters=targets)
    assert "has rank 5 here and 2 in" in said(read_lora, folder)
    layer = holding(tmp_path, {"x.gate.lora_A.weight": (2, 8), "x.gate.lora_B.weight": (8, 2)}, target_modules=[], target_parameters=["gate.weight"])  # fmt: skip
    found = read_lora(layer)
    assert found.misfits(["x.gate", "x.q"]) == []
    assert found.misfits(["z.gate"]) == ["it has nothing for z.gate, which its config adapts"]


def test_all_linear_is_known_to_peft_alone_and_what_is_missing_is_named(tmp_path: Path) -> None:
    found = read_lora(adapter(tmp_path, target_modules="all-linear"))
    assert found.misfits(["x.q", "x.k", "x.other"]) == []
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "target_modules is missing" in said(check_config, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    assert "num_virtual_tokens is missing" in said(check_config, tmp_path)
    folder = adapter(tmp_path, target_modules=r".*\.[qk]", layers_to_transform=[0])
    assert "layers_to_transform is not for target_modules that is a regex" in said(check_config, folder)  # fmt: skip
    many = {f"later_{n}": n + 1 for n in range(7)}
    text = said(check_config, adapter(tmp_path, **many))
    assert "later_4=5: that is not supported here" in text
    assert "later_5" not in text
    assert understood(SETTINGS | {"init_lora_weights": True, "revision": None, "inference_mode": True, "use_rslora": False}) == {"r": 2, "lora_alpha": 6, "target_modules": ["q", "k"], "use_rslora": False}  # fmt: skip
    empty = holding(tmp_path, {})
    assert "it holds no tensor" in said(read_lora, empty)
    unnamed = write_tensors(tmp_path / "adapter_model.safetensors", {"x.q.lora_A.weight": (2, 8)})
    assert "x.q.lora_A.weight is not named base_model.model.…" in said(read_lora, unnamed.parent)


def test_settings_that_are_null_ask_for_nothing(tmp_path: Path) -> None:
    null = dict.fromkeys(("target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform"))  # fmt: skip
    found = read_lora(adapter(tmp_path, **null))
    assert found.misfits(["x.q", "x.k", "x.v"]) == []
    assert found.ranks == {"x.q": 2, "x.k": 2}
    rest = [
        "num_layers",
        "depth",
        "hidden_size",
        "vocab_size",
        "head_dim",
        "num_heads",
        "seq_length",
    ]
    text = said(read_model_config, model(tmp_path / "m", **dict.fromkeys(rest, 0)))
    assert text.count("must be") == 5, "of seven"
    odd = model(tmp_path / "m", image_size="x", patch_size=14)
    assert "image_size is 'x'" in said(read_model_config, odd)
    large: Tensors = {"x.q.lora_A.weight": (100, 8), "x.q.lora_B.weight": (8, 100)}
    assert read_lora(holding(tmp_path, large, r=100, target_modules=["q"])).ranks == {"x.q": 100}


def test_a_fingerprint_is_of_names_and_shapes_and_not_of_the_order_of_keys(tmp_path: Path) -> None:
    def of(name: str, shape: tuple[int, ...], config: str = '{"a": 1, "b": 2}') -> str:
        write_tensors(tmp_path / "model.safetensors", {name: shape})
        (tmp_path / "config.json").write_text(config)
        return weights.model_fingerprint(tmp_path)

    one = of("x", (64, 8))
    assert of("x", (64, 8), '{"b": 2, "a": 1}') == one
    assert len({one, of("y", (64, 8)), of("x", (8, 64)), of("x", (512,))}) == 4
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/model.safetensors").symlink_to(tmp_path / "model.safetensors")
    assert "leads out of its folder" in said(weights.read_shard, tmp_path / "inner/model.safetensors")  # fmt: skip
    (tmp_path / "inner/adapter_model.safetensors").touch()
    assert "leads out of its folder" in said(weights.adapter_file, tmp_path / "inner")
