"""A text family is a config: published ones of other sizes find their layers, train, merge; others have their reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
import transformers

from finetune.errors import ModelError
from finetune.export.merge import merge
from finetune.generation.load import open_model
from finetune.models.families import FAMILIES, REFUSED, family_of

CONFIGS: dict[str, dict[str, Any]] = {
    "GLM-4-32B-0414": {
        "model_type": "glm4", "hidden_size": 6144, "intermediate_size": 23040, "num_hidden_layers": 61,
        "num_attention_heads": 48, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552,
        "attention_bias": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": False, "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338],
    },
    "GLM-Edge-1.5B-Chat": {
        "model_type": "glm", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 59264,
        "attention_bias": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        "tie_word_embeddings": False, "pad_token_id": 59246, "eos_token_id": [59246, 59253, 59255],
    },
}  # fmt: skip
BILLIONS = {"GLM-4-32B-0414": 32.57, "GLM-Edge-1.5B-Chat": 1.59}
"""Weights as their pages give them."""
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048, "dtype": "float32",
    "vocab_size": tiny.VOCAB_SIZE, "pad_token_id": tiny.PAD_ID, "eos_token_id": tiny.EOS_IDS,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_at_full_size_every_layer_is_found_by_its_name(name: str) -> None:
    values = CONFIGS[name]
    family = family_of(values)
    with torch.device("meta"):
        model = family.model_class(family.config_class(**values))
    modules = [module for module, _ in model.named_modules()]
    layers = values["num_hidden_layers"]
    adapted = [module for module in modules if re.fullmatch(family.lora_targets, module)]
    assert len(adapted) == 6 * layers
    assert sum(bool(re.fullmatch(family.attention, module)) for module in modules) == layers
    assert sum(bool(re.fullmatch(family.rotary, module)) for module in modules) == 1
    assert family.head in modules
    weights = sum(p.numel() for p in model.parameters()) / 1e9
    assert weights == pytest.approx(BILLIONS[name], abs=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_small_one_of_this_kind_trains_and_merges(name: str, tmp_path: Path) -> None:
    """With GLM-Edge's rotation of whole heads, and without biases."""
    values = CONFIGS[name] | SMALL
    folder = tiny.save_model(tmp_path / "model", values["model_type"], **values)
    data = runs.write_dialogues(tmp_path / "rows.jsonl", 6)
    runs.run_here(runs.config(folder, data, tmp_path / "run", training__max_steps=2))
    merge(tmp_path / "run", tmp_path / "merged")
    ids = torch.tensor([[tiny.CONTROL_IDS["[gMASK]"], tiny.CONTROL_IDS["<sop>"], 5, 6, 7]])
    opened = open_model(tmp_path / "run/checkpoint-2").model
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        ours, theirs = opened(input_ids=ids).logits, plain(input_ids=ids).logits
        untuned = transformers.AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, untuned, atol=1e-4)


def glm_types() -> set[str]:
    """The model types of GLM that the installed transformers has a class for, but for their parts."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return {
        name
        for name in CONFIG_MAPPING_NAMES
        if name.startswith("glm") and not re.search("_(text|vision|encoder|vqmodel)$", name)
    }


def test_every_glm_of_transformers_is_a_family_or_has_its_reason() -> None:
    assert glm_types() <= FAMILIES.keys() | REFUSED.keys()
    assert not FAMILIES.keys() & REFUSED.keys()


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_newer_family_is_refused_by_its_name_and_reason(model_type: str) -> None:
    with pytest.raises(ModelError) as error:
        family_of({"model_type": model_type})
    checkpoints, reason = REFUSED[model_type]
    assert f"model_type {model_type!r} ({checkpoints}) is not supported: {reason}" in str(
        error.value
    )
    assert "supported are chatglm (" in str(error.value)
