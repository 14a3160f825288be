"""What one training step costs, counted on shape-only tensors at the true size of a model.

    python scripts/bench/count.py --model FOLDER [--method lora] [--length 4096] [--batch 1]
                                  [--checkpointing | --no-checkpointing] [--peers] [--json]

FOLDER needs no more than a config.json. Lists are taken everywhere: `--length 1024 4096 32768`.
Counted, not measured: kernels, bytes moved, FLOPs by number format and the exact peak of memory of the
product's own model, method, loss and optimizer; no GPU is needed, and a 9B step takes two seconds on one
core. Milliseconds are a roofline: for each kernel the largest of its FLOPs, its bytes and its launch at
the stated ceilings. What counts as a kernel: finetune/planning/counting.py; the peers: count_peers.py.

    kernels, bytes               operations that a GPU is given, and what they read and write
    flops_bfloat16, _float32     of matrix products and attention (which counts as bfloat16)
    peak_bytes, peak             at the moment when most is held, and of which kind that is
    activation_bytes_per_token   activations and transients at their own peak
    mask_bytes                   the largest attention mask
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SUBJECTS = ("ours", "peft_trainer", "peft_liger")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="a folder with a config.json")
    parser.add_argument("--method", nargs="+", default=["lora"], choices=["lora", "ptuning_v2", "full"])  # fmt: skip
    parser.add_argument("--length", nargs="+", type=int, default=[4096], help="tokens of a row")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="rows")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=None, help="default: both")  # fmt: skip
    parser.add_argument("--kernels", choices=["auto", "torch"], default="auto", help="of ours")
    parser.add_argument("--four-bits", action="store_true", help="QLoRA: model.quantization nf4")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="of ours")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--prefix", type=int, default=128, help="virtual tokens of ptuning_v2")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens")
    for name, unit in (("bfloat16", "FLOP/s"), ("float32", "FLOP/s"), ("attention", "FLOP/s"), ("memory", "bytes/s"), ("launch", "seconds of the smallest kernel")):  # fmt: skip
        parser.add_argument(f"--{name}", type=float, help=f"ceiling, {unit}")
    parser.add_argument("--peers", action="store_true", help="plain PEFT + Trainer, and with Liger")
    parser.add_argument(
        "--syncs",
        action="store_true",
        help="instead: waits for the GPU a step, by call site, of a tiny run on this CPU",
    )
    parser.add_argument("--zero-stage", nargs="+", type=int, choices=range(4), help="with --syncs")
    parser.add_argument("--offload", action="store_true", help="with --zero-stage: the optimizer on the CPU")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    asked = parser.parse_args()
    if not asked.syncs and asked.model is None:
        parser.error("give --model, the folder of a checkpoint")
    if not asked.syncs and not (asked.model / "config.json").is_file():
        parser.error(f"{asked.model} has no config.json; give the folder of a checkpoint")
    return asked


def method_of(kind: str, asked: argparse.Namespace) -> Any:
    """The method's section."""
    from finetune.config.schema import FullMethod, LoraMethod, PTuningV2Method

    if kind == "lora":
        return LoraMethod(rank=asked.rank, dropout=asked.dropout)
    if kind == "ptuning_v2":
        return PTuningV2Method(num_virtual_tokens=asked.prefix)
    return FullMethod()


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """One object per subject, method, length, batch and checkpointing."""
    from count_peers import can, peer

    from finetune.models.kernels import NAMES
    from finetune.planning.roofline import Ceilings
    from finetune.planning.step import Shape, count_step
    from finetune.planning.subjects import own

    names = ("bfloat16", "float32", "attention", "memory", "launch")
    given = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    ceilings = Ceilings(**given)
    both = [True, False] if asked.checkpointing is None else [asked.checkpointing]
    found = []
    for kind, length, batch, checkpointing in itertools.product(
        asked.method, asked.length, asked.batch, both
    ):
        method = method_of(kind, asked)
        shape = Shape(batch, length, asked.supervised)
        for name in SUBJECTS if asked.peers else SUBJECTS[:1]:
            if name == "ours":
                kernels = NAMES if asked.kernels == "auto" else ()
                subject = own(asked.model, method, checkpointing=checkpointing, kernels=kernels, four_bits=asked.four_bits)  # fmt: skip
                subject = dataclasses.replace(subject, optimizer=asked.optimizer)
            elif can(name, method, checkpointing=checkpointing):
                liger = name == "peft_liger"
                subject = peer(asked.model, method, checkpointing=checkpointing, liger=liger, four_bits=asked.four_bits)  # fmt: skip
            else:
                continue
            cost = count_step(subject, shape, ceilings)
            found.append(
                {
                    "subject": name,
                    "method": f"{kind}, 4 bits" if asked.four_bits else kind,
                    "length": length,
                    "batch": batch,
                    "checkpointing": checkpointing,
                    "kernels": cost.kernels,
                    "bytes": cost.bytes,
                    "flops_bfloat16": cost.flops["bfloat16"] + cost.flops["attention"],
                    "flops_float32": cost.flops["float32"],
                    "peak_bytes": cost.peak_bytes,
                    "peak": cost.peak,
                    "activation_bytes_per_token": round(cost.working / shape.tokens),
                    "mask_bytes": cost.mask_bytes,
                    "milliseconds": round(cost.milliseconds, 1),
                }
            )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown; times also relative to plain PEFT + Trainer where that was asked for."""
    lines = [
        "| | method | rows x tokens | checkpointing | kernels | TB moved | float32 TFLOP | peak GB "
        "| MB a token | mask GB | ms | x peft_trainer |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    same = ("method", "length", "batch", "checkpointing")
    plain = {
        tuple(row[key] for key in same): row["milliseconds"]
        for row in found
        if row["subject"] == "peft_trainer"
    }
    for row in found:
        than = plain.get(tuple(row[key] for key in same))
        cells = [
            row["subject"],
            row["method"],
            f"{row['batch']} x {row['length']:,}",
            "yes" if row["checkpointing"] else "no",
            f"{row['kernels']:,}",
            f"{row['bytes'] / 1e12:.3f}",
            f"{row['flops_float32'] / 1e12:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['activation_bytes_per_token'] / 1e6:.3f}",
            f"{row['mask_bytes'] / 1e9:.2f}",
            f"{row['milliseconds']:,.0f}",
            f"{row['milliseconds'] / than:.2f}" if than else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the counts."""
    asked = arguments()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if asked.syncs:
        from count_syncs import count

        for method, stage in itertools.product(asked.method, asked.zero_stage or [None]):
            offload = asked.offload and stage is not None
            print(json.dumps(count(method, packing=True, stage=stage, offload=offload)))
        return
    found = rows(asked)
    print(json.dumps(found, indent=2) if asked.json else table(found))


if __name__ == "__main__":
    main()
