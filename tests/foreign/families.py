"""Tiny configs and inputs of each family, in the form that transformers' testers ask for."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers

from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.modeling import ChatGLMForConditionalGeneration, ChatGLMModel
from finetune.models.families import Glm4ForCausalLM, GlmForCausalLM

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 99}
BOI, EOI = 3, 4  # tests of resizing cut the end of the vocabulary off
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 32,
    "layer_norm_eps": 1e-6, "patch_size": 2, "image_size": 8, "in_channels": 3,
    "num_positions": 17, "scaling_factor": 8, "dropout_prob": 0.0, "hidden_act": "gelu",
}  # fmt: skip


class Tester:
    """What transformers' mixins call `model_tester`: a decoder's tiny config and a batch for it."""

    base_model_class: Any
    causal_lm_class: Any
    sequence_classification_class = None
    batch_size = 13
    seq_length = 7
    encoder_seq_length = 7
    is_training = True
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 4
    vocab_size = 99

    def __init__(self, parent: Any) -> None:
        self.parent = parent

    def get_config(self) -> Any:
        """A tiny config."""
        raise NotImplementedError

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """A config, and a batch whose last row is padded as transformers' own tester pads it."""
        ids = torch.randint(5, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class ChatGLMTester(Tester):
    """GLM-4-9B as published."""

    base_model_class = ChatGLMModel
    causal_lm_class = ChatGLMForConditionalGeneration
    extra: ClassVar[dict[str, Any]] = {}

    def get_config(self) -> ChatGLMConfig:
        """A tiny config."""
        return ChatGLMConfig(
            num_layers=2, padded_vocab_size=99, hidden_size=32, ffn_hidden_size=37, kv_channels=8,
            num_attention_heads=4, multi_query_group_num=2, seq_length=512, pad_token_id=0,
            eos_token_id=1, **self.extra,
        )  # fmt: skip


class ChatGLMVisionTester(ChatGLMTester):
    """GLM-4V-9B: every row shows an image of four patches."""

    extra: ClassVar[dict[str, Any]] = {
        "vision_config": VISION,
        "boi_token_id": BOI,
        "eoi_token_id": EOI,
    }
    batch_size = 7
    seq_length = encoder_seq_length = 10

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """A config and a batch."""
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["input_ids"][:, 1:7] = torch.tensor([BOI, 0, 0, 0, 0, EOI])
        inputs["pixel_values"] = torch.randn(self.batch_size, 3, 8, 8)
        return config, inputs

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class GlmTester(Tester):
    """transformers' own Glm, for comparison."""

    base_model_class = transformers.GlmModel
    causal_lm_class: Any = transformers.GlmForCausalLM
    config_class: Any = transformers.GlmConfig

    def get_config(self) -> Any:
        """A tiny config."""
        return self.config_class(
            **SIZES, intermediate_size=37, num_key_value_heads=2, head_dim=8, pad_token_id=0,
            eos_token_id=1, bos_token_id=1, max_position_embeddings=512,
        )  # fmt: skip


class OurGlmTester(GlmTester):
    """The -hf conversions with the loss of this project."""

    causal_lm_class = GlmForCausalLM


class OurGlm4Tester(GlmTester):
    """GLM-4-0414 with the loss of this project."""

    base_model_class = transformers.Glm4Model
    causal_lm_class = Glm4ForCausalLM
    config_class = transformers.Glm4Config
