"""What stands beside exported weights, and what an export reports: configs, stops, notes, figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter, make_base
from export_parts import stored, tensor
from transformers import GlmConfig

from finetune.artifacts.base_record import read_base_record
from finetune.artifacts.weights import model_fingerprint, read_shard, tensors
from finetune.errors import ConfigError, ModelError
from finetune.export import convert, convert_adapter, layout
from finetune.export.numbers import SPACING, STORAGE, rounded
from finetune.models.chatglm.configuration import ChatGLMConfig

EOS, PAD = [151329, 151336, 151338], 151329
PUBLISHED = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "attn_implementation": "sdpa", "bias_dropout_fusion": True, "ffn_hidden_size": 13696,
    "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 4096, "kv_channels": 128,
    "layernorm_epsilon": 1.5625e-07, "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_layers": 40, "rope_ratio": 500, "original_rope": True, "padded_vocab_size": 151552,
    "post_layer_norm": True, "rmsnorm": True, "seq_length": 131072, "use_cache": True, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "eos_token_id": EOS, "pad_token_id": PAD, "initializer_range": 0.02,
}  # fmt: skip
"""Of THUDM/glm-4-9b-chat, as published; transformers' default of what it leaves out."""
HF = {
    "architectures": ["GlmForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": EOS, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 13696,
    "max_position_embeddings": 131072, "model_type": "glm", "num_attention_heads": 32, "num_hidden_layers": 40,
    "num_key_value_heads": 2, "pad_token_id": PAD, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07,
    "rope_theta": 5_000_000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 151552,
}  # fmt: skip
"""Of THUDM/glm-4-9b-chat-hf, as published."""
SAME = {
    "attention_bias": ("add_qkv_bias", False), "attention_dropout": ("attention_dropout", 0.25), "head_dim": ("kv_channels", 64),
    "hidden_size": ("hidden_size", 2048), "initializer_range": ("initializer_range", 0.5), "intermediate_size": ("ffn_hidden_size", 77),
    "max_position_embeddings": ("seq_length", 1024), "num_attention_heads": ("num_attention_heads", 16),
    "num_hidden_layers": ("num_layers", 3), "num_key_value_heads": ("multi_query_group_num", 4),
    "rms_norm_eps": ("layernorm_epsilon", 1e-5), "use_cache": ("use_cache", False), "vocab_size": ("padded_vocab_size", 100),
}  # fmt: skip
"""transformers' key -> the published one, and a value that no default has."""


@pytest.mark.parametrize("key", [None, *SAME])
def test_each_layout_s_config_says_what_the_other_s_does(key: str | None) -> None:
    published, hf = dict(PUBLISHED), dict(HF)
    if key is not None:
        other, value = SAME[key]
        hf[key] = published[other] = value
        if key == "num_hidden_layers":
            published[key] = value
    from_published = layout.TextModel(Path("m"), "published", ChatGLMConfig.from_dict(published))
    from_hf = layout.TextModel(Path("m"), "hf", GlmConfig.from_dict(dict(hf)))
    assert layout.hf_config(from_published, "bfloat16", EOS, PAD) == hf
    assert layout.published_config(from_hf, "bfloat16", EOS, PAD) == published
    assert layout.published_config(from_hf, "float16", [1], None)["torch_dtype"] == "float16"
    assert layout.hf_config(from_published, "float16", [1], None)["torch_dtype"] == "float16"
    for text in (from_published, from_hf):
        heads, groups = hf["num_attention_heads"], hf["num_key_value_heads"]
        size = hf["head_dim"]
        assert text.rows == (heads * size, groups * size, groups * size)


@pytest.mark.parametrize(("theta", "ratio"), [(5e6, 500), (15000.0, 1.5), (10000.0, 1)])
def test_the_base_of_positions_is_a_multiple_of_ten_thousand(theta: float, ratio: float) -> None:
    config = GlmConfig.from_dict({**HF, "rope_theta": theta})
    found = layout.published_config(layout.TextModel(Path("m"), "hf", config), "x", 1, 1)["rope_ratio"]  # fmt: skip
    assert (found, type(found)) == (ratio, type(ratio))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary", "model.layers.0", "model.vision", "lm_heads"])  # fmt: skip
@pytest.mark.parametrize("to", ["hf", "published"])
def test_a_module_without_a_counterpart_is_named(name: str, to: Any) -> None:
    with pytest.raises(ModelError, match=f"{name} has no place in the {to} layout"):
        layout.other_names(name, to)


def test_the_spacing_of_each_format_is_that_of_torch() -> None:
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    assert {name: torch.finfo(kind).eps for name, kind in kinds.items()} == SPACING
    assert kinds.keys() == STORAGE.keys()


# --- what is written -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", family="chatglm")


def test_an_export_counts_what_it_wrote_and_compares_logits_only_when_asked(
    published: Path, tmp_path: Path
) -> None:
    report = convert.export_model(published, tmp_path / "out", layout="hf")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert report.num_bytes == sum(file.stat().st_size for file in files)
    assert report.num_tensors == len(tensors(tmp_path / "out"))
    assert (report.output, report.source, report.layout) == (tmp_path / "out", published, "hf")
    assert (report.largest_difference, report.notes) == (None, ())
    assert 0 < report.seconds < 60
    card = (tmp_path / "out/README.md").read_text()
    assert "Its weights are in the hf layout (model_type glm)." in card
    assert card.partition("# ")[2].startswith("out\n")
    with pytest.raises(ConfigError, match="lies inside"):
        convert.export_model(published, published / "new", layout="hf")


@pytest.mark.parametrize(("check", "read", "compared"), [("none", False, 0), ("tensors", True, 0), ("full", True, 1)])  # fmt: skip
def test_what_is_checked_is_what_was_said(
    check: Any, read: bool, compared: int, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    seen: list[Any] = []

    @contextmanager
    def written(plan: Any, out: Path, label: str, *, check: bool) -> Iterator[Path]:
        seen.append((out, label, check))
        yield tmp_path / "stage"

    monkeypatch.setattr(convert, "written", written)
    monkeypatch.setattr("finetune.export.parity.check_parity", lambda *given: seen.append(given) or 0.25)  # type: ignore[func-returns-value]  # fmt: skip
    report = convert.export_model(published, tmp_path / "out", layout="hf", check=check)
    assert seen[0] == (tmp_path / "out", "exported", read)
    assert seen[1:] == [(published, (), tmp_path / "stage")] * compared
    assert report.largest_difference == (0.25 if compared else None)


def test_a_model_without_a_tokenizer_or_an_index_is_exported_as_it_is(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        (base / name).unlink()
    (base / "model-00001-of-00001.safetensors").rename(base / "model.safetensors")
    (base / "generation_config.json").write_text('{"temperature": 0.8, "eos_token_id": 1, "pad_token_id": 2}')  # fmt: skip
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"eos_token_id": [5, 7], "pad_token_id": 9}))  # fmt: skip
    report = convert.export_model(base, tmp_path / "out", layout="published")
    assert report.notes == (f"{base} has no tokenizer, so none was written",)
    told = {"eos_token_id": [5, 7], "pad_token_id": 9}
    made = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert made == {"temperature": 0.8, **told}
    made = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: made[name] for name in told} == told
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert not written & {"tokenizer_config.json", "tokenizer.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("dtype", list(STORAGE))
def test_the_unused_buffer_comes_back_with_the_bytes_it_had(dtype: str, tmp_path: Path) -> None:
    values = rounded(np.array([0.5, 3.0, -7.0], np.float32), dtype)
    stored(tmp_path / "a", **{layout.ROTARY_BUFFER: (dtype, values), "w": (dtype, values)})
    kept = convert._stash_rotary(read_shard(tmp_path / "a"))[layout.ROTARY_BUFFER]
    made = convert._rotary_buffer(kept, SimpleNamespace(), "F32")  # type: ignore[arg-type]
    assert (made.name, made.dtype, made.shape, made.constant) == (layout.ROTARY_BUFFER, dtype, (3,), values.tobytes())  # fmt: skip
    stored(tmp_path / "b", w=(dtype, values))
    assert convert._stash_rotary(read_shard(tmp_path / "b")) == {}


# --- who is asked for what -------------------------------------------------------------------------


def test_an_export_hands_on_what_is_said_and_adds_its_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = convert.ExportReport(Path("o"), Path("s"), "hf", 1, 2, 3.0, None, ("second",))
    seen: list[Any] = []
    monkeypatch.setattr(convert, "local_folder", lambda name: tmp_path / "of-the-hub")
    monkeypatch.setattr(convert, "find_source", lambda path: (path / "found", ["first"]))
    monkeypatch.setattr(convert, "is_adapter", lambda path: "adapter" in str(path))
    monkeypatch.setattr(convert, "export_model", lambda *given, **how: seen.append((given, how)) or report)  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr(convert_adapter, "export_adapter", lambda *given, **how: seen.append((given, how)) or report)  # type: ignore[func-returns-value]  # fmt: skip
    out = tmp_path / "out"
    for name in ("adapter", "plain"):
        (tmp_path / name).mkdir()
    made = convert.export("owner/name", out, layout="published", check="full")
    assert made.notes == ("first", "second")
    assert seen.pop() == ((tmp_path / "of-the-hub/found", out), {"layout": "published", "check": "full"})  # fmt: skip
    convert.export(str(tmp_path / "plain"), out, layout="hf")
    assert seen.pop() == ((tmp_path / "plain/found", out), {"layout": "hf", "check": "tensors"})
    adapter = tmp_path / "adapter"
    made = convert.export(str(adapter), out, layout="hf", base="b", new_base="nb")
    assert seen.pop() == ((adapter / "found", out), {"layout": "hf", "base": Path("b"), "new_base": "nb"})  # fmt: skip
    convert.export(str(adapter), out, layout="hf")
    assert seen.pop()[1] == {"layout": "hf", "base": None, "new_base": None}


def test_an_adapter_names_its_new_base_and_keeps_its_fingerprint(
    published: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", published)
    convert.export_model(published, tmp_path / "hf", layout="hf", check="none")
    named: dict[Any, Any] = {str(tmp_path / "hf"): None, "owner/name": None, None: None}
    for number, new_base in enumerate(named):
        out = tmp_path / f"out-{number}"
        report = convert_adapter.export_adapter(adapter, out, layout="hf", new_base=new_base)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == new_base
        assert any("names no base; give --new-base" in n for n in report.notes) is (new_base is None)  # fmt: skip
        named[new_base] = read_base_record(out)
        assert report.num_tensors == len(read_shard(out / "adapter_model.safetensors").tensors)
        assert report.num_bytes == (out / "adapter_model.safetensors").stat().st_size
        assert (report.source, report.output, report.layout) == (adapter, out, "hf")
    told = named.pop(str(tmp_path / "hf"))
    assert (told.path, told.revision, told.fingerprint) == (str(tmp_path / "hf"), None, model_fingerprint(tmp_path / "hf"))  # fmt: skip
    assert set(named.values()) == {None}
    card = (tmp_path / "out-1/README.md").read_text()
    assert "The adapter is for the hf layout of its base (model_type glm)." in card
    for folder in (published, adapter):
        with pytest.raises(ConfigError, match="lies inside"):
            convert_adapter.export_adapter(adapter, folder / "new", layout="hf")
    with pytest.raises(ConfigError, match="is for the published layout already"):
        convert_adapter.export_adapter(adapter, tmp_path / "new", layout="published")


def test_the_first_bytes_of_a_tensor_are_read_where_it_lies(tmp_path: Path) -> None:
    found = stored(tmp_path / "a", v=("U8", np.zeros(9, np.uint8)), w=("U8", np.arange(200, dtype=np.uint8)))  # fmt: skip
    assert convert_adapter._start(found["v"]) == bytes(9)
    assert convert_adapter._start(found["w"]) == bytes(range(64))
    assert convert._output("x", tensor("a", 2, 3, dtype="BF16"), tensor("b", 5, 3, dtype="BF16")).shape == (7, 3)  # fmt: skip
    assert convert._output("x", tensor("a", 2, dtype="BF16")).dtype == "BF16"
