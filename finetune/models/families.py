"""The table of checkpoint families: their classes, and the names of their parts.

A new text family is one more entry here. One with images has besides a way to take them in
`data.chat` (an object like `TakesImages`, chosen in `data.chat.tokenizer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers

from finetune.errors import ModelError
from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from finetune.models.loss import SupervisedHead, SupervisedLoss
from finetune.models.moe.modeling import Glm4MoeForCausalLM, Glm4MoeLiteForCausalLM
from finetune.models.vision import grids
from finetune.models.vision.mixture import Glm4vMoeForConditionalGeneration


class GlmForCausalLM(SupervisedLoss, transformers.GlmForCausalLM):
    """transformers' model with the loss over supervised tokens; keeps the name that it saves."""

    looks_at_positions = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.__class__ = SupervisedHead


class Glm4ForCausalLM(SupervisedLoss, transformers.Glm4ForCausalLM):
    """transformers' model with the loss over supervised tokens; keeps the name that it saves."""

    looks_at_positions = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.__class__ = SupervisedHead


VISION = "vision"
"""Names the vision encoder, and what joins it to the text, in every family."""


@dataclass(frozen=True)
class Family:
    """What checkpoints of one `model_type` are made of; names are regexes over full module names."""

    model_type: str
    checkpoints: str
    """Which published ones belong to it, in words."""
    config_class: Any
    model_class: Any
    attention: str
    """The attention of every text layer."""
    lora_targets: str
    """The layers that LoRA adapts by default."""
    rotary: str
    """The one rotary embedding that positions of text go through."""
    head: str = "lm_head"
    """The output layer, which stays whole when the others are held in 4 bits."""
    vision: str | None = None
    """A part of the name of everything that sees images."""
    experts: str | None = None
    """The routed experts of a layer that is a mixture."""
    router: str | None = None
    """What chooses among them, which no method trains."""
    no_prefix: str | None = None
    """Why it can be given no prefix (P-Tuning v2), as the end of a sentence."""
    vision_lora_targets: str | None = None
    """The layers of that which LoRA adapts when it is asked to."""

    def sees_images(self, config: Any) -> bool:
        """Whether a checkpoint with this config.json has a vision tower."""
        return bool(self.vision and config.get("vision_config"))

    def part(self, pattern: str) -> str:
        """What `vision` is called in this family; other patterns as they are."""
        return self.vision if self.vision and pattern == VISION else pattern

    @property
    def unquantized(self) -> Sequence[str]:
        """Modules that stay as they are: the head, whose loss runs in chunks, and the vision encoder.

        Regexes that transformers matches from the beginning of a module's full name.
        """
        parts = [self.head, self.vision] if self.vision else [self.head]
        return [rf"(.+\.)?{part}" for part in parts]


def _split_layers(text: str) -> dict[str, str]:
    """Names inside transformers' GLM classes, which have a projection each for q, k and v."""
    return {
        "attention": rf"{text}\.layers\.\d+\.self_attn",
        "lora_targets": rf"{text}\.layers\.\d+\."
        r"(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_up_proj|down_proj))",
        "rotary": rf"{text}\.rotary_emb",
    }


def _mixture(text: str, projections: str) -> dict[str, str]:
    """Names inside transformers' GLM classes whose layers, but for the first, are mixtures of experts."""
    return {
        "attention": rf"{text}\.layers\.\d+\.self_attn",
        "lora_targets": rf"{text}\.layers\.\d+\."
        rf"(self_attn\.({projections})|mlp\.(shared_experts\.)?(gate_proj|up_proj|down_proj))",
        "rotary": rf"{text}\.rotary_emb",
        "experts": rf"{text}\.layers\.\d+\.mlp\.experts",
        "router": rf"{text}\.layers\.\d+\.mlp\.gate",
    }


_GRID_VISION = {
    "vision": "visual",
    "vision_lora_targets": r"model\.visual\.(blocks\.\d+\.(attn|mlp)|merger)\."
    r"(qkv|proj|gate_proj|up_proj|down_proj)",
}
"""Names inside transformers' vision encoders of images that keep their shape."""


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "chatglm",
            "GLM-4-9B, GLM-4-9B-Chat, its long versions and GLM-4V-9B as first published",
            ChatGLMConfig,
            ChatGLMForConditionalGeneration,
            attention=r"transformer\.encoder\.layers\.\d+\.self_attention",
            lora_targets=r"transformer\.encoder\.layers\.\d+\."
            r"(self_attention\.(query_key_value|dense)|mlp\.(dense_h_to_4h|dense_4h_to_h))",
            rotary=r"transformer\.rotary_pos_emb",
            head="output_layer",
            vision="vision",
            vision_lora_targets=r"transformer\.vision\."
            r"(transformer\.layers\.\d+\.(attention\.(query_key_value|dense)|mlp\.(fc1|fc2))"
            r"|linear_proj\.(linear_proj|dense_h_to_4h|gate_proj|dense_4h_to_h))",
        ),
        Family(
            "glm",
            "the -hf conversions",
            transformers.GlmConfig,
            GlmForCausalLM,
            **_split_layers("model"),
        ),
        Family(
            "glm4",
            "GLM-4-0414, GLM-Z1",
            transformers.Glm4Config,
            Glm4ForCausalLM,
            **_split_layers("model"),
        ),
        Family(
            "glm4v",
            "GLM-4.1V, GLM-4.6V-Flash, AutoGLM-Phone",
            transformers.Glm4vConfig,
            grids.Glm4vForConditionalGeneration,
            **_split_layers(r"model\.language_model"),
            **_GRID_VISION,
        ),
        Family(
            "glm46v",
            "GLM-4.6V's form around a dense text",
            transformers.Glm46VConfig,
            grids.Glm46VForConditionalGeneration,
            **_split_layers(r"model\.language_model"),
            **_GRID_VISION,
        ),
        Family(
            "glm_ocr",
            "GLM-OCR",
            transformers.GlmOcrConfig,
            grids.GlmOcrForConditionalGeneration,
            **_split_layers(r"model\.language_model"),
            **_GRID_VISION,
        ),
        Family(
            "glm4v_moe",
            "GLM-4.5V, GLM-4.6V",
            transformers.Glm4vMoeConfig,
            Glm4vMoeForConditionalGeneration,
            **_mixture(r"model\.language_model", "q_proj|k_proj|v_proj|o_proj"),
            **_GRID_VISION,
        ),
        Family(
            "glm4_moe",
            "GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7",
            transformers.Glm4MoeConfig,
            Glm4MoeForCausalLM,
            **_mixture("model", "q_proj|k_proj|v_proj|o_proj"),
        ),
        Family(
            "glm4_moe_lite",
            "GLM-4.7-Flash",
            transformers.Glm4MoeLiteConfig,
            Glm4MoeLiteForCausalLM,
            **_mixture("model", "q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj"),
            no_prefix="its cache holds what keys and values are made from (MLA), for which PEFT's prefix has no form",
        ),
    )
}


_CHOSEN = "its attention looks at some chosen tokens only (DSA), which nothing here trains"
_SIZED = "its image processor resizes by a rule of its own, which is not handled here"
_ALONE = "it is no chat model of text"
REFUSED: dict[str, tuple[str, str]] = {
    "glm_moe_dsa": ("GLM-5", _CHOSEN),
    "glm5_next": ("GLM-5.3-Flash", _CHOSEN),
    "glmga": ("GLM-GA, in GLM-4.6V's form", _SIZED),
    "glm_image": ("GLM-Image", _ALONE),
    "glmasr": ("GLM-ASR", _ALONE),
}
"""Newer families that transformers has a class for: which checkpoints they are, and why they are refused."""


def family_of(config: Any) -> Family:
    """The family of a config (an object or config.json's dict).

    Raises:
        ModelError: It is none of these.
    """
    name = config.get("model_type") if isinstance(config, dict) else config.model_type
    name = name if isinstance(name, str | None) else repr(name)
    if name not in FAMILIES:
        known = ", ".join(f"{one.model_type} ({one.checkpoints})" for one in FAMILIES.values())
        if name in REFUSED:
            checkpoints, reason = REFUSED[name]
            raise ModelError(
                f"model_type {name!r} ({checkpoints}) is not supported: {reason}; supported are {known}"
            )
        raise ModelError(f"model_type {name!r} is not supported; supported are {known}")
    return FAMILIES[name]
