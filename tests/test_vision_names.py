"""Names and shapes of the full GLM-4V-9B and of its adapters against the published list."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict

from finetune.config.schema import LoraMethod
from finetune.methods import attach
from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.modeling import ChatGLMForConditionalGeneration


def full_size(glm4_assets: Path) -> ChatGLMForConditionalGeneration:
    """GLM-4V-9B without numbers in it."""
    config = json.loads((glm4_assets / "golden/glm4v/glm4v_tiny/config.json").read_text())
    config |= {
        "num_layers": 40, "hidden_size": 4096, "ffn_hidden_size": 13696, "kv_channels": 128,
        "num_attention_heads": 32, "padded_vocab_size": 151552, "boi_token_id": 151339,
        "eoi_token_id": 151340,
    }  # fmt: skip
    config["vision_config"] |= {
        "num_hidden_layers": 63, "hidden_size": 1792, "num_heads": 16, "intermediate_size": 15360,
        "num_positions": 6401, "image_size": 1120,
    }  # fmt: skip
    full = ChatGLMConfig.from_dict(config)
    assert full.image_patches == 1600
    with torch.device("meta"):
        return ChatGLMForConditionalGeneration(full)


def test_names_and_shapes_of_the_full_model_are_the_published_ones(glm4_assets: Path) -> None:
    published = json.loads((glm4_assets / "golden/glm4v/full_param_shapes.json").read_text())
    model = full_size(glm4_assets)
    ours = {name: list(weight.shape) for name, weight in model.named_parameters()}
    assert len(ours) == 1053
    assert ours == {name: list(shape) for name, shape in published.items()}


TEXT = (
    r"encoder\.layers\.\d+\.(self_attention\.(query_key_value|dense)|mlp\.dense_(h_to_4h|4h_to_h))"
)
TOWER = r"vision\.transformer\.layers\.\d+\.(attention\.(query_key_value|dense)|mlp\.fc[12])"


@pytest.mark.parametrize(
    ("options", "adapted", "count"),
    [({}, TEXT, 40), ({"target_modules": rf"transformer\.{TOWER}"}, TOWER, 63)],
)
def test_adapter_keys_of_the_full_model_are_the_published_names_of_what_is_adapted(
    glm4_assets: Path, options: dict[str, Any], adapted: str, count: int
) -> None:
    published = json.loads((glm4_assets / "golden/glm4v/full_param_shapes.json").read_text())
    with torch.device("meta"):
        model = attach(full_size(glm4_assets), LoraMethod(**options))
    keys = {name: list(t.shape) for name, t in get_peft_model_state_dict(model).items()}
    expected = {}
    for name, shape in published.items():
        if re.fullmatch(rf"transformer\.{adapted}\.weight", name):
            at = f"base_model.model.{name.removesuffix('.weight')}"
            expected[f"{at}.lora_A.weight"] = [8, shape[1]]
            expected[f"{at}.lora_B.weight"] = [shape[0], 8]
    assert len(expected) == count * 4 * 2
    assert keys == expected
