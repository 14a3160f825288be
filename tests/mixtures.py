"""Tiny random mixtures of experts in the published layout: experts apart, and a layer that predicts ahead (MTP).

Three layers, the first of which is dense; four experts of which a token takes two, and a shared one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FAMILIES = ("glm4_moe", "glm4_moe_lite")
_SHARED = {
    "attention_dropout": 0.0, "dtype": "float32", "eos_token_id": tiny.EOS_IDS, "hidden_act": "silu",
    "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 2048,
    "moe_intermediate_size": 16, "n_group": 1, "n_routed_experts": 4, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1, "pad_token_id": tiny.PAD_ID, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "topk_group": 1, "use_cache": True, "vocab_size": tiny.VOCAB_SIZE,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "glm4_moe": _SHARED | {
        "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True,
        "first_k_dense_replace": 1, "head_dim": 8, "num_key_value_heads": 2, "routed_scaling_factor": 1.0,
        "use_qk_norm": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    },
    "glm4_moe_lite": _SHARED | {
        "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"],
        "attention_bias": False, "num_key_value_heads": 4, "routed_scaling_factor": 1.8,
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}  # fmt: skip


def save_model(
    folder: Path, family: str, *, seed: int = 0, shard_size: str = "5GB", **overrides: Any
) -> Path:
    """Write a tiny checkpoint, its weights as transformers' `save_pretrained` writes them; `overrides` go into its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = CONFIGS[family] | overrides
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    draw(model.state_dict(), seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tiny.save_tokenizer(folder)
    config = folder / "config.json"
    written = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(written | values, indent=2), encoding="utf-8")
    generation = {"eos_token_id": tiny.EOS_IDS, "pad_token_id": tiny.PAD_ID, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    if written["num_nextn_predict_layers"]:
        _predict_ahead(folder, written, seed)
    return folder


def draw(weights: Mapping[str, Tensor], seed: int) -> None:
    """Random numbers into weights, wide enough for logits to differ and routes to be sure."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(weights.items()):
        weight.copy_(tiny.drawn(name, tuple(weight.shape), generator))


def _predict_ahead(folder: Path, config: dict[str, Any], seed: int) -> None:
    """Weights of the layer behind the last one, in a file that has others too."""
    last = config["num_hidden_layers"] - 1
    files = sorted(folder.glob("*.safetensors"))
    held = {name: tensor for file in files for name, tensor in load_file(file).items()}
    at, after = f"model.layers.{last}.", f"model.layers.{last + 1}."
    width, rows = config["hidden_size"], config["vocab_size"]
    shapes = {after + n[len(at) :]: tuple(t.shape) for n, t in held.items() if n.startswith(at)}
    shapes |= {after + "eh_proj.weight": (width, 2 * width), after + "shared_head.head.weight": (rows, width)}  # fmt: skip
    shapes |= {
        after + f"{name}.weight": (width,) for name in ("enorm", "hnorm", "shared_head.norm")
    }
    shapes[after + "embed_tokens.weight"] = (rows, width)
    generator = torch.Generator().manual_seed(seed + 1)
    more = {name: tiny.drawn(name, shape, generator) for name, shape in sorted(shapes.items())}
    save_file(load_file(files[-1]) | more, files[-1], metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        values = json.loads(index.read_text(encoding="utf-8"))
        values["weight_map"] |= dict.fromkeys(more, files[-1].name)
        index.write_text(json.dumps(values, indent=2), encoding="utf-8")
