"""How many numbers a config asks for, beside those that its folder holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.weights import tensors
from finetune.errors import ModelError
from finetune.models.chatglm.configuration import ChatGLMVisionConfig
from finetune.models.moe.modeling import first_dense


def check_size(folder: Path, config: Any) -> None:
    """Refuse a config that asks for far more numbers than the folder has, before they are allocated."""
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2 * (text.num_attention_heads + text.num_key_value_heads) * head
    asked = text.num_hidden_layers * text.hidden_size * (attention + 3 * text.intermediate_size)
    asked += text.vocab_size * text.hidden_size
    if experts := getattr(text, "n_routed_experts", None):
        if not 0 < text.num_experts_per_tok <= experts:
            raise ModelError(
                f"{folder}: a token takes {text.num_experts_per_tok} of {experts} experts by its {MODEL_CONFIG}; "
                "use the config.json that belongs to it"
            )
        layers = text.num_hidden_layers - first_dense(text)
        # What a mixture has in the place of an MLP.
        wide = 3 * (experts * text.moe_intermediate_size - text.intermediate_size)
        asked += layers * text.hidden_size * wide
    if isinstance(vision, ChatGLMVisionConfig):
        wide = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
        asked += vision.num_hidden_layers * wide
    elif vision is not None:
        asked += (
            vision.depth
            * vision.hidden_size
            * (4 * vision.hidden_size + 3 * vision.out_hidden_size)
        )
    held = sum(math.prod(tensor.shape) for tensor in tensors(folder).values())
    if asked > 2 * held + 1_000_000:
        raise ModelError(
            f"{folder}: its {MODEL_CONFIG} asks for about {asked:,} numbers and its weights hold "
            f"{held:,}; copy the checkpoint again, or use the config.json that belongs to it"
        )
