"""What `finetune plan` says of the published mixtures of experts: the table of docs/methods.md.

    python scripts/bench/mixture_plans.py [--zh]

Needs no weights: only their sizes, as the config.json of each has them on the hub.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from cells import ROOT, table

sys.path.insert(0, str(ROOT))

LENGTH = 4096
MODELS: dict[str, dict[str, Any]] = {
    # zai-org/GLM-4.5-Air
    "GLM-4.5-Air": {
        "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 128,
        "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131072,
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
        "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 46,
        "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000, "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False, "topk_group": 1, "use_qk_norm": False, "vocab_size": 151552,
        "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338], "torch_dtype": "bfloat16",
    },
    # zai-org/GLM-4.7-Flash
    "GLM-4.7-Flash": {
        "model_type": "glm4_moe_lite", "attention_bias": False, "hidden_size": 2048,
        "intermediate_size": 10240, "kv_lora_rank": 512, "max_position_embeddings": 202752,
        "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 1,
        "num_attention_heads": 20, "num_experts_per_tok": 4, "num_hidden_layers": 47,
        "num_key_value_heads": 20, "num_nextn_predict_layers": 1, "q_lora_rank": 768,
        "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
        "routed_scaling_factor": 1.8, "tie_word_embeddings": False, "topk_group": 1, "v_head_dim": 256,
        "vocab_size": 154880, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
RUNS: dict[str, tuple[dict[str, Any], int | None, int]] = {
    "LoRA, 1 GPU": ({"kind": "lora"}, None, 1),
    "LoRA, ZeRO-3, 8 GPUs": ({"kind": "lora"}, 3, 8),
    "LoRA with routed experts, ZeRO-2, 8 GPUs": (
        {"kind": "lora", "dropout": 0.0, "target_modules": ["o_proj", "experts"]}, 2, 8,
    ),
    "full, ZeRO-3, 32 GPUs": ({"kind": "full"}, 3, 32),
}  # fmt: skip
CHINESE = {
    "LoRA, 1 GPU": "LoRA，1 个 GPU",
    "LoRA, ZeRO-3, 8 GPUs": "LoRA，ZeRO-3，8 个 GPU",
    "LoRA with routed experts, ZeRO-2, 8 GPUs": "LoRA 加路由专家，ZeRO-2，8 个 GPU",
    "full, ZeRO-3, 32 GPUs": "全量，ZeRO-3，32 个 GPU",
}


def plan_of(folder: Path, method: dict[str, Any], stage: int | None, gpus: int) -> Any:
    """The plan of a row of 4,096 tokens, with recomputed activations."""
    from finetune.cli.inputs import planned
    from finetune.config.schema import RunConfig
    from finetune.planning.plan import Gpu

    tree = {
        "model": {"path": str(folder), "dtype": "bfloat16"}, "method": method,
        "data": {"train": "x.jsonl", "max_length": LENGTH},
        "training": {"output_dir": "x", "activation_checkpointing": True},
    } | ({} if stage is None else {"deepspeed": {"zero_stage": stage}})  # fmt: skip
    return planned(RunConfig.model_validate(tree), Gpu(number=gpus))[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zh", action="store_true", help="in Chinese")
    chinese = parser.parse_args().zh
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, config in MODELS.items():
            (Path(temporary) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            plans = {run: plan_of(Path(temporary), *given) for run, given in RUNS.items()}
            any_plan = plans["LoRA, 1 GPU"]
            both = f"{any_plan.parameters / 1e9:.1f}", f"{any_plan.active_parameters / 1e9:.1f}"
            rows += [
                [
                    name, *both, CHINESE[run] if chinese else run, f"{plan.memory['weights'] / 1e9:.1f}",
                    f"{(plan.memory['gradients'] + plan.memory['optimizer'] + plan.memory['adapters']) / 1e9:.1f}",
                    f"{plan.memory_bytes / 1e9:.1f}",
                ]
                for run, plan in plans.items()
            ]  # fmt: skip
    heads = ["model", "weights, billion", "a token takes", "run", "weights, GB", "gradients and states, GB", "together, GB a GPU"]  # fmt: skip
    if chinese:
        heads = ["模型", "权重，十亿", "每个 token 用到", "训练", "权重，GB", "梯度与状态，GB", "合计，每个 GPU 的 GB"]  # fmt: skip
    print(table(heads, rows))


if __name__ == "__main__":
    main()
