"""Tiny configs and inputs of each family, in the form that transformers' testers ask for."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers

from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.modeling import ChatGLMForConditionalGeneration, ChatGLMModel
from finetune.models.families import Glm4ForCausalLM, GlmForCausalLM
from finetune.models.moe.modeling import Glm4MoeForCausalLM, Glm4MoeLiteForCausalLM
from finetune.models.vision import grids
from finetune.models.vision.mixture import Glm4vMoeForConditionalGeneration, Glm4vMoeModel

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
    config_options: ClassVar[dict[str, Any]] = {"hidden_size": 37}
    """What transformers' `ConfigTester` sets and looks for."""
    config_class: Any
    additional_model_inputs: ClassVar[list[str]] = []
    is_composite = False


class ChatGLMTester(Tester):
    """GLM-4-9B as published."""

    base_model_class = ChatGLMModel
    causal_lm_class = ChatGLMForConditionalGeneration
    config_class = ChatGLMConfig
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
    additional_model_inputs: ClassVar[list[str]] = ["pixel_values"]
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


_EXPERTS = {
    "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip


class MixtureTester(GlmTester):
    """GLM-4.5: a dense layer, then a mixture of four experts, as transformers has it."""

    base_model_class = transformers.Glm4MoeModel
    causal_lm_class = transformers.Glm4MoeForCausalLM
    config_class = transformers.Glm4MoeConfig
    sizes: ClassVar[dict[str, Any]] = {"num_key_value_heads": 2, "head_dim": 8}

    def get_config(self) -> Any:
        """A tiny config."""
        return self.config_class(
            **SIZES, **_EXPERTS, **self.sizes, intermediate_size=37, pad_token_id=0, eos_token_id=1,
            bos_token_id=1, max_position_embeddings=512,
        )  # fmt: skip


class OurMixtureTester(MixtureTester):
    """The same with the loss of this project, and with its routing counted."""

    causal_lm_class = Glm4MoeForCausalLM


class MlaTester(MixtureTester):
    """GLM-4.7-Flash: a mixture behind compressed keys and values, as transformers has it."""

    base_model_class = transformers.Glm4MoeLiteModel
    causal_lm_class = transformers.Glm4MoeLiteForCausalLM
    config_class = transformers.Glm4MoeLiteConfig
    sizes: ClassVar[dict[str, Any]] = {
        "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 16,
    }  # fmt: skip


class OurMlaTester(MlaTester):
    """The same with the loss of this project, and with its routing counted."""

    causal_lm_class = Glm4MoeLiteForCausalLM


IMAGE = 5
"""The token of an image, of which each row here has one: testers cut all tensors to the size of the batch."""


class GridTester(Tester):
    """GLM-4.1V: images that keep their shape, as transformers has it."""

    base_model_class: Any = transformers.Glm4vModel
    causal_lm_class: Any = transformers.Glm4vForConditionalGeneration
    config_class: Any = transformers.Glm4vConfig
    batch_size = 7
    seq_length = encoder_seq_length = 10
    vocab_size = 4099  # drawn ids are hardly ever that of an image, which wants pixels
    is_composite = True
    additional_model_inputs: ClassVar[list[str]] = [
        "pixel_values",
        "image_grid_thw",
        "mm_token_type_ids",
    ]
    text: ClassVar[dict[str, Any]] = {}
    heads: ClassVar[dict[str, Any]] = {"head_dim": 8, "sections": [1, 1, 0], "partial": 0.5}
    config_options: ClassVar[dict[str, Any]] = {
        "has_text_modality": False,
        "common_properties": ["image_token_id"],
    }

    def get_config(self) -> Any:
        """A tiny config."""
        text = SIZES | {
            "intermediate_size": 37, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1,
            "bos_token_id": 1, "max_position_embeddings": 512, "vocab_size": self.vocab_size,
            "head_dim": self.heads["head_dim"],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0,
                "partial_rotary_factor": self.heads["partial"], "mrope_section": self.heads["sections"],
            },
        }  # fmt: skip
        vision = {
            "depth": 2, "hidden_size": 16, "num_heads": 2, "image_size": 16, "patch_size": 4,
            "out_hidden_size": 32, "intermediate_size": 22, "spatial_merge_size": 1,
        }  # fmt: skip
        return self.config_class(
            text_config=text | self.text, vision_config=vision, image_token_id=IMAGE,
            video_token_id=6, image_start_token_id=BOI, image_end_token_id=EOI,
            video_start_token_id=7, video_end_token_id=8,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """A config, and rows that show an image of one patch each."""
        ids = torch.randint(9, 99, (self.batch_size, self.seq_length))
        ids[:, 1:4] = torch.tensor([BOI, IMAGE, EOI])
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(self.batch_size, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 1, 1]] * self.batch_size),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class OurGridTester(GridTester):
    """The same with the loss of this project, where batches may be without images."""

    base_model_class = grids.Glm4vModel
    causal_lm_class = grids.Glm4vForConditionalGeneration


class OcrTester(GridTester):
    """GLM-OCR, as transformers has it."""

    base_model_class = transformers.GlmOcrModel
    causal_lm_class = transformers.GlmOcrForConditionalGeneration
    config_class = transformers.GlmOcrConfig
    heads: ClassVar[dict[str, Any]] = {"head_dim": 16, "sections": [1, 1, 2], "partial": 0.5}


class OurOcrTester(OcrTester):
    """The same with the loss of this project, where batches may be without images."""

    base_model_class = grids.GlmOcrModel
    causal_lm_class = grids.GlmOcrForConditionalGeneration


class Grid46Tester(GridTester):
    """GLM-4.6V's form around a dense text, as transformers has it."""

    base_model_class = transformers.Glm46VModel
    causal_lm_class = transformers.Glm46VForConditionalGeneration
    config_class = transformers.Glm46VConfig


class OurGrid46Tester(Grid46Tester):
    """The same with the loss of this project, where batches may be without images."""

    base_model_class = grids.Glm46VModel
    causal_lm_class = grids.Glm46VForConditionalGeneration


class GridMixtureTester(GridTester):
    """GLM-4.5V, as transformers has it."""

    base_model_class = transformers.Glm4vMoeModel
    causal_lm_class = transformers.Glm4vMoeForConditionalGeneration
    config_class = transformers.Glm4vMoeConfig
    text: ClassVar[dict[str, Any]] = _EXPERTS


class OurGridMixtureTester(GridMixtureTester):
    """The same with the loss of this project, where batches may be without images."""

    base_model_class = Glm4vMoeModel
    causal_lm_class = Glm4vMoeForConditionalGeneration
