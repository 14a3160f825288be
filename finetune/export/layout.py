"""GLM-4 text models in their two layouts: which tensor and which key of the config is which.

published (`chatglm`)                                        hf (`glm`)
transformer.embedding.word_embeddings                        model.embed_tokens
transformer.encoder.layers.N.self_attention.query_key_value  model.layers.N.self_attn.{q,k,v}_proj
                             self_attention.dense                           self_attn.o_proj
                             mlp.dense_h_to_4h                              mlp.gate_up_proj
                             mlp.dense_4h_to_h                              mlp.down_proj
transformer.encoder.final_layernorm                          model.norm
transformer.output_layer                                     lm_head

The rows of query_key_value are those of q, k and v one after the other; gate and up are one matrix in
both. Both rotate neighbouring pairs of the first half of a head, so no row changes its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import GlmConfig

from finetune.artifacts.model_config import read_model_config
from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.plain_files import check_folder, read_json
from finetune.errors import ModelError
from finetune.models.chatglm.configuration import ChatGLMConfig

Layout = Literal["published", "hf"]
LAYOUT_TYPES: dict[Layout, str] = {"published": "chatglm", "hf": "glm"}

ROTARY_BUFFER = "transformer.rotary_pos_emb.inv_freq"
"""In every published checkpoint, read by nobody, and without a place in the other layout."""
FUSED = "self_attention.query_key_value"
SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
EMBEDDING = {"published": "transformer.embedding.word_embeddings", "hf": "model.embed_tokens"}
HEAD = {"published": "transformer.output_layer", "hf": "lm_head"}

_OUTER = {EMBEDDING["published"]: EMBEDDING["hf"], HEAD["published"]: HEAD["hf"]} | {
    "transformer.encoder.final_layernorm": "model.norm"
}
_INNER = {
    "input_layernorm": "input_layernorm",
    "self_attention.dense": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
_LAYERS = {"published": "transformer.encoder.layers", "hf": "model.layers"}
_LAYER = re.compile(r"(?:transformer\.encoder|model)\.layers\.(\d+)\.(.+)")
_THETA = 10000.0


@dataclass(frozen=True)
class TextModel:
    """The config of a GLM-4 text model, whichever layout it is in."""

    folder: Path
    layout: Layout
    config: Any
    """Transformers' names for sizes work in both layouts."""

    @property
    def rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v."""
        groups = self.config.num_key_value_heads * self.config.head_dim
        return (self.config.num_attention_heads * self.config.head_dim, groups, groups)

    @property
    def tied(self) -> bool:
        """Whether input and output embedding are one matrix."""
        return bool(self.config.tie_word_embeddings)


def read_text_model(folder: Path) -> TextModel:
    """The config of ``folder``; ModelError when it has no counterpart in the other layout."""
    values = read_json(folder / MODEL_CONFIG)
    kind = values.get("model_type")
    if (
        kind not in LAYOUT_TYPES.values()
        or values.get("vision_config")
        or values.get("quantization_config")
    ):
        what = (
            "GLM-4V, and transformers' glm layout has no images"
            if values.get("vision_config")
            else "quantised" if values.get("quantization_config") else f"model_type {kind!r}"
        )  # fmt: skip
        raise ModelError(
            f"{folder} is {what}; only GLM-4 text models have both layouts: model_type chatglm "
            "(as published) and glm (the -hf conversions). Use 0414 models (glm4), which have one layout, as they are"
        )
    check_folder(folder)
    read_model_config(folder)
    if kind == "chatglm":
        config = ChatGLMConfig.from_dict(values, name_or_path=str(folder))
    else:
        config = GlmConfig.from_dict(values)
        _check_hf(config, folder)
    return TextModel(folder, "published" if kind == "chatglm" else "hf", config)


def other_names(module: str, layout: Layout) -> tuple[str, ...]:
    """What a module is called in ``layout``: one name, or q, k and v for a fused one.

    Of q, k and v each the fused module's. ModelError when no layout has such a module.
    """
    if match := _LAYER.fullmatch(module):
        at = f"{_LAYERS[layout]}.{match[1]}."
        if match[2] == FUSED:
            return tuple(at + name for name in SPLIT)
        if match[2] in SPLIT:
            return (at + FUSED,)
        inner = _INNER if layout == "hf" else {new: old for old, new in _INNER.items()}
        if match[2] in inner:
            return (at + inner[match[2]],)
    outer = _OUTER if layout == "hf" else {new: old for old, new in _OUTER.items()}
    if module in outer:
        return (outer[module],)
    raise ModelError(f"{module} has no place in the {layout} layout; keep the layout that it has")


def hf_config(model: TextModel, dtype: str, eos: Any, pad: int | None) -> dict[str, Any]:
    """config.json for transformers' GlmForCausalLM, of version 4.46 and of 5."""
    config = model.config
    return {
        "architectures": ["GlmForCausalLM"],
        "attention_bias": config.add_qkv_bias,
        "attention_dropout": config.attention_dropout,
        "eos_token_id": eos,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "glm",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": pad,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": _THETA * config.rope_ratio,
        **({"rope_parameters": config.rope_parameters} if config.scales_positions else {}),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": config.use_cache,
        "vocab_size": config.vocab_size,
    }


def published_config(model: TextModel, dtype: str, eos: Any, pad: int | None) -> dict[str, Any]:
    """config.json as the published code reads it."""
    config = model.config
    ratio = config.rope_parameters["rope_theta"] / _THETA
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "add_bias_linear": False,
        "add_qkv_bias": config.attention_bias,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": config.attention_dropout,
        "attention_softmax_in_fp32": True,
        "attn_implementation": "sdpa",
        "bias_dropout_fusion": True,
        "ffn_hidden_size": config.intermediate_size,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.rms_norm_eps,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_layers": config.num_hidden_layers,
        "rope_ratio": int(ratio) if float(ratio).is_integer() else ratio,
        "original_rope": True,
        "padded_vocab_size": config.vocab_size,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": config.max_position_embeddings,
        "use_cache": config.use_cache,
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }


def _check_hf(config: Any, folder: Path) -> None:
    """Refuse what the published layout cannot say."""
    rope = config.rope_parameters
    problems = []
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope_type is {rope['rope_type']!r}")
    if rope.get("partial_rotary_factor", 1.0) != 0.5:
        problems.append(f"partial_rotary_factor is {rope.get('partial_rotary_factor', 1.0)}")
    if config.hidden_act != "silu":
        problems.append(f"hidden_act is {config.hidden_act!r}")
    if problems:
        raise ModelError(
            f"{folder}: {'; '.join(problems)}, which the published layout cannot say "
            "(default, 0.5 and 'silu' there); keep the layout that it has"
        )
