"""Export of adapters: the same function on the base in its other layout, and back byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import logits, make_adapter, make_base
from closeness import additions, assert_close
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.errors import ConfigError, ModelError
from finetune.export.convert import export_model
from finetune.export.convert_adapter import export_adapter
from finetune.export.merge import merge
from finetune.models.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"layers.0.mlp.dense_h_to_4h": 2}, "alpha_pattern": {"dense": 3}},
    "one layer": {"target_modules": ["layers.1.self_attention.query_key_value"]},
    "embedding": {"target_modules": ["word_embeddings", "query_key_value"]},
    "saved whole": {"target_modules": ["query_key_value"], "modules_to_save": ["output_layer"]},
    "biases": {"bias": "lora_only"},
}
HF_KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "no k": {"target_modules": ["q_proj", "v_proj"]},
    "other ranks": {"rank_pattern": {"k_proj": 2}},
    "other scales": {"alpha_pattern": {"layers.0.self_attn.k_proj": 3}},
}


def answers(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of base and adapter, of what transformers has in transformers' own class."""
    config = json.loads((base / "config.json").read_text())
    plain = config["model_type"] == "glm"
    model = AutoModelForCausalLM.from_pretrained(base) if plain else load_model(base)
    return logits(PeftModel.from_pretrained(model, str(adapter)).eval())


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_the_published_layout_computes_the_same_on_glm_and_comes_back(
    tmp_path: Path, kind: str
) -> None:
    base = make_base(tmp_path / "base", family="chatglm")
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    export_model(base, tmp_path / "hf", layout="hf", check="none")
    there, back = tmp_path / "there", tmp_path / "back"
    export_adapter(adapter, there, layout="hf", new_base=str(tmp_path / "hf"))
    model = load_model(base)
    wanted, plain, sums = answers(base, adapter), logits(model), additions(model.config, 30)
    assert_close(answers(tmp_path / "hf", there), wanted, sums)
    assert (wanted - plain).abs().max() > 0.05
    export_adapter(there, back, layout="published", new_base=str(base))
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_close(answers(base, back), wanted, sums)


@pytest.mark.parametrize("kind", HF_KINDS)
def test_an_adapter_of_the_glm_layout_computes_the_same_as_published(
    tmp_path: Path, kind: str
) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, **HF_KINDS[kind])
    export_model(base, tmp_path / "published", layout="published", check="none")
    report = export_adapter(
        adapter, tmp_path / "there", layout="published", new_base=str(tmp_path / "published")
    )
    wanted = answers(base, adapter)
    found = answers(tmp_path / "published", tmp_path / "there")
    assert_close(found, wanted, additions(load_model(base).config, 30))
    ranks = {"no k": 8, "other ranks": 10}
    assert f"rank {ranks.get(kind, 12)} " in " ".join(report.notes)
    merge(tmp_path / "there", tmp_path / "merged")  # our merge reads it, with its own check


def test_an_adapter_is_only_told_of_a_base_that_is_its_own_in_the_other_layout(
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path / "base", family="chatglm")
    other = make_base(tmp_path / "other", family="chatglm", seed=3)
    adapter = make_adapter(tmp_path / "adapter", base)
    export_model(other, tmp_path / "hf", layout="hf", check="none")
    for new_base, reason in ((tmp_path / "hf", "is another"), (base, "is not in the hf layout")):
        with pytest.raises((ConfigError, ModelError), match=reason):
            export_adapter(adapter, tmp_path / "out", layout="hf", new_base=str(new_base))
    with pytest.raises(ModelError, match="was trained on"):
        export_adapter(adapter, tmp_path / "out", layout="hf", base=other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "lora_only"}, {"bias": "all"}], ids=str)  # fmt: skip
def test_lengths_or_biases_of_some_of_q_k_and_v_are_refused(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base, target_modules=["q_proj", "v_proj"], **options)
    with pytest.raises(ModelError, match="not adapted alike"):
        export_adapter(adapter, tmp_path / "out", layout="published")


def test_the_names_in_the_adapters_config_are_the_new_ones(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    export_adapter(adapter, tmp_path / "out", layout="published")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == [
        "dense",
        "dense_4h_to_h",
        "dense_h_to_4h",
        "query_key_value",
    ]
    assert (config["r"], config["lora_alpha"]) == (12, 18)  # 3 times 4 and 6
    others = ("dense", "dense_4h_to_h", "dense_h_to_4h")
    assert config["rank_pattern"] == dict.fromkeys(others, 4)
    assert config["alpha_pattern"] == dict.fromkeys(others, 6)
