"""How long a row may be: the memory of a GPU by length, GPUs that share a row, and what is offloaded.

    python scripts/bench/long_rows.py [--lengths 32768 131072 1048576] [--json]

Counted on shape-only tensors at the sizes of GLM-4-9B-Chat-1M (40 layers of 4,096, 32 heads, 4 of keys
and values), LoRA of rank 16, batches of one row, bfloat16, activation checkpointing, every token learnt.
No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SIZES = {
    "model_type": "chatglm", "num_layers": 40, "padded_vocab_size": 151552, "hidden_size": 4096,
    "ffn_hidden_size": 13696, "kv_channels": 128, "num_attention_heads": 32, "multi_query_group_num": 4,
    "seq_length": 1048576, "rope_ratio": 10000, "original_rope": True, "rmsnorm": True,
    "post_layer_norm": True, "multi_query_attention": True, "add_bias_linear": False,
    "add_qkv_bias": True, "apply_residual_connection_post_layernorm": False,
    "layernorm_epsilon": 1.5625e-07, "tie_word_embeddings": False,
}  # fmt: skip
PLACES = {
    32_768: ((1, False), (1, True)),
    131_072: ((1, False), (1, True), (2, True), (4, True)),
    524_288: ((1, True), (2, True), (8, True)),
    1_048_576: ((2, True), (8, False), (8, True), (16, True)),
}
"""GPUs that share a row, and whether layers' inputs are kept on the host, by length."""
TILED = (40_960, 131_072)


def planned(folder: Path, length: int, sharing: int, *, offload: bool) -> dict[str, Any]:
    """The plan of one GPU."""
    from finetune.config.schema import LoraMethod, ModelSection, TrainingSection
    from finetune.planning.plan import Gpu, plan

    training = TrainingSection(
        output_dir="-",
        activation_checkpointing=True,
        offload_activations=offload,
        sequence_parallel=sharing,
    )
    found = plan(
        ModelSection(path=str(folder), dtype="bfloat16"), LoraMethod(rank=16, dropout=0.0), training, None,
        Gpu(number=sharing), folder=folder, length=length,
    )  # fmt: skip
    return {
        "tokens": length,
        "gpus": sharing,
        "offload": offload,
        "gpu_gb": round(found.memory_bytes / 1e9, 1),
        "host_gb": round(found.host_bytes / 1e9, 1),
        "seconds_at_40_percent": round(found.seconds_per_step, 1),
        "flops": found.flops,
    }


def tiling(folder: Path, length: int) -> str:
    """What the tiles of the MLP save and cost."""
    from finetune.models import tiled_mlp
    from finetune.planning import plan

    tiled = planned(folder, length, 1, offload=True)
    before = tiled_mlp.ABOVE
    tiled_mlp.ABOVE = plan.ABOVE = 1 << 40
    whole = planned(folder, length, 1, offload=True)
    tiled_mlp.ABOVE = plan.ABOVE = before
    more = tiled["flops"] / whole["flops"] - 1
    return f"{length:,} tokens without tiles: {whole['gpu_gb']} GB instead of {tiled['gpu_gb']}; tiles take {100 * more:.0f} % more FLOPs"


def main() -> None:
    """The table, or a list of objects."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=list(PLACES), choices=PLACES)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(SIZES))
        rows = [
            planned(folder, length, sharing, offload=offload)
            for length in asked.lengths
            for sharing, offload in PLACES[length]
        ]
        tiles = [] if asked.json else [tiling(folder, length) for length in TILED]
    if asked.json:
        print(json.dumps(rows))
        return
    print("| tokens of a row | GPUs that share it | layers' inputs | a GPU | host memory of a process | a step |\n|---|---|---|---|---|---|")  # fmt: skip
    for row in rows:
        kept, host = ("host", f"{row['host_gb']} GB") if row["offload"] else ("GPU", "–")
        print(f"| {row['tokens']:,} | {row['gpus']} | {kept} | {row['gpu_gb']} GB | {host} | {row['seconds_at_40_percent']} s |")  # fmt: skip
    print("", *tiles, sep="\n")


if __name__ == "__main__":
    main()
