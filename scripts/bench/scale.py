"""Runs of 8, 64 and 512 GPUs on paper: memory, bytes on the links, efficiency, checkpoints.

    python scripts/bench/scale.py [--json] [--nvlink 300e9] [--node-link 320e9] [--hop 3e-6]

From the arithmetic of `finetune plan` at the sizes of GLM-4-9B and GLM-4-32B-0414: one packed row of
8,192 tokens a GPU and pass, activation checkpointing, bfloat16. What each GPU sends in a step follows from
the stage: float32 gradients of adapters once, gradients and updated weights once (ZeRO-1), gradients in
every pass (ZeRO-2), weights twice and gradients once in every pass (ZeRO-3). Two numbers of efficiency:
with communication behind the computation altogether, and with none of it hidden. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from long_rows import SIZES

GLM4_32B = {
    "model_type": "glm4", "hidden_size": 6144, "num_hidden_layers": 61, "intermediate_size": 23040,
    "num_attention_heads": 48, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552,
    "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {"9B": SIZES | {"multi_query_group_num": 2}, "32B": GLM4_32B}
WAYS = {
    "9B": (("lora", None), ("full", 1), ("full", 2), ("full", 3)),
    "32B": (("lora", 3), ("full", 3)),
}
"""Method and ZeRO stage."""
GPUS = (8, 64, 512)
ON_A_NODE = 8
LENGTH = 8192
ACCUMULATION = 4
BUCKET = 16_777_216
"""Numbers that are reduced or gathered at a time in stages 1 and 2: hidden size squared."""


@dataclass(frozen=True)
class Links:
    """What links give in practice."""

    nvlink: float = 300e9
    """Bytes/s that a GPU sends to those of its node; 450e9 nominal on an H100."""
    node_link: float = 320e9
    """Bytes/s that a node sends to others: 8 cards of 400 Gbit/s at 80 %."""
    hop: float = 3e-6
    """Seconds that a ring takes for each of its members, however little it carries."""
    disk: float = 2e9
    """Bytes/s that a node writes."""
    host: float = 20e9
    """Bytes/s from a GPU to the host's memory."""

    def seconds(self, sent: float, collectives: float, gpus: int) -> float:
        """Of a step in which each GPU sends `sent` bytes in so many collectives."""
        slower = self.nvlink if gpus <= ON_A_NODE else min(self.nvlink, self.node_link)
        return sent / slower + collectives * (gpus - 1) * self.hop


def sent_in_a_step(sizes: dict[str, float], stage: int | None, gpus: int) -> tuple[float, float]:
    """Bytes that each GPU sends, and the number of collectives."""
    ring = (gpus - 1) / gpus
    everything, trained, layers = sizes["weights"], sizes["trained"], sizes["layers"]
    gradients = 2 * trained  # bfloat16
    if stage is None:  # all-reduce of float32 gradients, once a step
        return 2 * ring * 4 * trained, -(-4 * trained // 25e6)
    buckets = -(-trained // BUCKET)
    if stage < 3:
        reductions = ACCUMULATION if stage == 2 else 1
        return ring * gradients * (reductions + 1), buckets * (reductions + 1)
    passes = ACCUMULATION * (2 * everything + (gradients if sizes["all"] else 0))
    return ring * passes + (0 if sizes["all"] else 2 * ring * gradients), 3 * ACCUMULATION * layers


def row(name: str, folder: Path, kind: str, stage: int | None, gpus: int, links: Links) -> dict[str, Any]:  # fmt: skip
    """One run."""
    from finetune.config.schema import (
        DeepSpeedSection,
        FullMethod,
        LoraMethod,
        ModelSection,
        TrainingSection,
    )
    from finetune.models.load import text_config
    from finetune.planning.plan import Gpu, plan

    training = TrainingSection(
        output_dir="-", activation_checkpointing=True, gradient_accumulation_steps=ACCUMULATION
    )
    method = FullMethod() if kind == "full" else LoraMethod(rank=16, dropout=0.0)
    deepspeed = None if stage is None else DeepSpeedSection(zero_stage=stage)
    found = plan(
        ModelSection(path=str(folder), dtype="bfloat16"), method, training, deepspeed, Gpu(number=gpus),
        folder=folder, length=LENGTH,
    )  # fmt: skip
    whole = 2.0 * weights_of(MODELS[name])
    trained = whole / 2 if kind == "full" else found.checkpoint_bytes / (16 if stage else 12)
    layers = text_config(folder).num_hidden_layers
    sizes = {"weights": whole, "trained": trained, "layers": layers, "all": kind == "full"}
    sent, collectives = sent_in_a_step(sizes, stage, gpus)
    computing, sending = found.seconds_per_step, links.seconds(sent, collectives, gpus)
    nodes = max(1, gpus // ON_A_NODE)
    return {
        "model": name,
        "method": kind,
        "stage": stage,
        "gpus": gpus,
        "memory_gb": round(found.memory_bytes / 1e9, 1),
        "fits_80_gb": found.fits,
        "sent_gb": round(sent / 1e9, 2),
        "sent_by_a_card_gb": 0.0 if nodes == 1 else round(sent / 8 / 1e9, 2),
        "computing_s": round(computing, 2),
        "sending_s": round(sending, 2),
        "hidden": round(computing / max(computing, sending), 2),
        "in_turn": round(computing / (computing + sending), 2),
        "checkpoint_gb": round(found.checkpoint_bytes / 1e9, 1),
        "write_s": round(found.checkpoint_bytes / (links.disk * nodes), 1),
        "copy_s": round(found.checkpoint_bytes / gpus / links.host, 2),
    }


def weights_of(sizes: dict[str, Any]) -> float:
    """How many weights a model has."""
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    groups = sizes.get("multi_query_group_num") or sizes["num_key_value_heads"]
    inner = sizes.get("ffn_hidden_size") or sizes["intermediate_size"]
    layers = sizes.get("num_layers") or sizes["num_hidden_layers"]
    words = sizes.get("padded_vocab_size") or sizes["vocab_size"]
    attention = hidden * 128 * (heads + 2 * groups) + 128 * heads * hidden
    return float(layers * (attention + 3 * hidden * inner) + 2 * words * hidden)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = (
        "model, method", "ZeRO", "GPUs", "a GPU holds", "sends a step", "each network card",
        "computing", "sending", "efficiency, hidden", "efficiency, in turn",
        "checkpoint", "written in", "copied in",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in rows:
        cells = (
            f"{one['model']} {one['method']}", "–" if one["stage"] is None else one["stage"], one["gpus"],
            f"{one['memory_gb']} GB" + ("" if one["fits_80_gb"] else " (too much)"), f"{one['sent_gb']} GB",
            f"{one['sent_by_a_card_gb']} GB" if one["gpus"] > ON_A_NODE else "–", f"{one['computing_s']} s",
            f"{one['sending_s']} s", f"{100 * one['hidden']:.0f} %", f"{100 * one['in_turn']:.0f} %",
            f"{one['checkpoint_gb']} GB", f"{one['write_s']} s", f"{one['copy_s']} s",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """The table, or a list of objects."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    links = Links()
    parser.add_argument("--nvlink", type=float, default=links.nvlink)
    parser.add_argument("--node-link", type=float, default=links.node_link)
    parser.add_argument("--hop", type=float, default=links.hop)
    parser.add_argument("--disk", type=float, default=links.disk)
    parser.add_argument("--host", type=float, default=links.host)
    parser.add_argument("--json", action="store_true")
    asked = vars(parser.parse_args())
    as_json = asked.pop("json")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, sizes in MODELS.items():
            folder = Path(temporary) / name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(sizes))
            for kind, stage in WAYS[name]:
                rows += [row(name, folder, kind, stage, gpus, Links(**asked)) for gpus in GPUS]
    print(json.dumps(rows) if as_json else table(rows))


if __name__ == "__main__":
    main()
