"""Every method on every ZeRO stage in one and two processes, against one process without DeepSpeed.

    python scripts/bench/stage_matrix.py [--methods lora full] [--stages none 3] [--processes 1 2]
                                         [--dtype bfloat16] [--family chatglm] [--json]
                                         [--with data__packing=true]

With `--family glm4v` or `glm4.1v` the tower is frozen and every third dialogue shows an image.

Tiny random models, five optimizer steps of eight dialogues, validation loss and generation at the
end. A cell of the table holds the largest difference to its method's float32 run in one process
without DeepSpeed

    loss     of any step's training loss
    weights  of any number in the saved adapter or model
    logits   of the saved folder opened by `finetune.generation.load`

and says so when the greedy replies of the evaluation are others. A save must hold every tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
from cells import Cell

STAGES = ("none", "0", "1", "2", "3")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {
        "method": {"kind": "lora", "rank": 4, "dropout": 0.0},
        "training__learning_rate": 1e-2,
    },
    "ptuning_v2": {
        "method": {"kind": "ptuning_v2", "num_virtual_tokens": 5},
        "training__learning_rate": 3e-2,
    },
    "ptuning_v2_projection": {
        "method": {"kind": "ptuning_v2", "num_virtual_tokens": 5, "prefix_projection": True},
        "training__learning_rate": 1e-2,
    },
    "full": {"method": {"kind": "full"}, "training__learning_rate": 1e-3},
}
STEPS = 5
GLOBAL_BATCH = 8
# What float32 sums in another order leave behind after five steps of AdamW, with a margin; and the
# band around float32 in which a bfloat16 run stays (its replies may be others).
BARS = {
    "float32": {"loss": 2e-5, "weights": 2e-3, "logits": 2e-3},
    # A step may change a prefix's keys, of size 2, by 3e-2 of that.
    "bfloat16": {"loss": 3e-2, "weights": 5e-2, "logits": 0.2},
}


@dataclass(frozen=True)
class Place:
    """Where a method is run."""

    method: str
    stage: str
    processes: int
    dtype: str

    @property
    def name(self) -> str:
        """For files and for the table."""
        return f"{self.method}-zero{self.stage}-{self.processes}p-{self.dtype}"


def cell(place: Place, model: Path, data: Path, folder: Path, changes: dict[str, Any]) -> Cell:
    """The run of a place: the same global batch in every one."""
    import runs

    options = dict(METHODS[place.method])
    method = options.pop("method")
    settings = runs.config(
        model, data, folder / place.name, training__max_steps=STEPS,
        training__batch_size=GLOBAL_BATCH // 2 // place.processes,
        training__gradient_accumulation_steps=2, data__validation=str(data),
        evaluation__max_samples=5, model__dtype=place.dtype, **options, **changes,
    ) | {"method": method}  # fmt: skip
    if place.stage != "none":
        settings["deepspeed"] = {"zero_stage": int(place.stage)}
    return Cell(place.name, settings, place.processes)


@dataclass(frozen=True)
class Outcome:
    """What a run left."""

    losses: list[float]
    weights: dict[str, Any]
    logits: Any
    replies: list[str]


def outcome(run_dir: Path, base: Path) -> Outcome:
    """Read it from the run directory; the saved folder is opened as a user would."""
    import pictures
    import runs
    import tiny
    import torch
    from safetensors.torch import load_file

    from finetune.artifacts.weights import tensors
    from finetune.generation.load import open_model

    checkpoint = run_dir / f"checkpoint-{STEPS}"
    weights: dict[str, Any] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        weights |= {name: tensor.float() for name, tensor in load_file(file).items()}
    if not (checkpoint / "adapter_config.json").exists():
        missing = set(tensors(base)) ^ set(weights)
        if missing:
            raise SystemExit(f"{checkpoint} differs from the base in {sorted(missing)[:3]}")
    ids = torch.randint(0, 370, (2, 24), generator=torch.Generator().manual_seed(0))
    opened = open_model(checkpoint)
    shown = {}
    if opened.model.config.model_type == "chatglm" and opened.template.image:
        span = [pictures.BOI, *[tiny.PAD_ID] * pictures.NUM_PATCHES, pictures.EOI]
        ids[0, 2 : 2 + len(span)] = torch.tensor(span)
        side = pictures.SIZE
        shown["pixel_values"] = torch.linspace(-2, 2, 3 * side**2).view(1, 3, side, side)
    with torch.no_grad():
        logits = opened.model(input_ids=ids, use_cache=False, **shown).logits
    lines = (run_dir / f"predictions-{STEPS}.jsonl").read_text(encoding="utf-8").splitlines()
    replies = [json.loads(line)["prediction"] for line in lines]
    return Outcome(runs.history(run_dir), weights, logits, replies)


def differences(found: Outcome, reference: Outcome) -> dict[str, Any]:
    """The largest difference of each kind."""
    if found.weights.keys() != reference.weights.keys():
        raise SystemExit("the cells saved other tensors")
    return {
        "loss": max(abs(a - b) for a, b in zip(found.losses, reference.losses, strict=True)),
        "weights": max(
            float((found.weights[k] - value).abs().max()) for k, value in reference.weights.items()
        ),
        "logits": float((found.logits - reference.logits).abs().max()),
        "same_replies": found.replies == reference.replies,
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the cells; differences or the problem by cell name."""
    os.environ["FINETUNE_CACHE"] = str(folder / "cache")
    base, data, changes = cells.subject(options.family, folder, 21)
    asked = dict(text.split("=", 1) for text in options.changes)
    changes |= {key: json.loads(value) for key, value in asked.items()}
    places = [
        Place(method, stage, processes, options.dtype)
        for method in options.methods
        for stage in options.stages
        for processes in options.processes
    ]
    references = {method: Place(method, "none", 1, "float32") for method in options.methods}
    todo = list(dict.fromkeys([*references.values(), *places]))
    cells.warm_up(base)
    problems = cells.run_all(
        (cell(place, base, data, folder, changes) for place in todo),
        folder,
        done=(lambda line: None) if options.json else (lambda line: print(line, flush=True)),
    )
    found = {p: outcome(folder / p.name, base) for p in todo if p.name not in problems}
    return {
        place.name: problems.get(place.name)
        or differences(found[place], found[references[place.method]])
        for place in places
    }


def missed(result: Any, dtype: str) -> list[str]:
    """Why a cell does not pass."""
    if isinstance(result, str):
        return [result]
    bars = BARS[dtype].items()
    found = [f"{key} {result[key]:.1e}" for key, most in bars if not result[key] <= most]
    if dtype == "float32" and not result["same_replies"]:
        found.append("other replies")
    return found


def show(results: dict[str, Any], options: argparse.Namespace) -> str:
    """The table: a row for every method and process count, a column for every stage."""
    rows = []
    for method in options.methods:
        for processes in options.processes:
            row = [method, str(processes)]
            for stage in options.stages:
                result = results[Place(method, stage, processes, options.dtype).name]
                row.append(
                    "FAILED"
                    if isinstance(result, str)
                    else f"{result['loss']:.0e} {result['weights']:.0e} {result['logits']:.0e}"
                    + ("" if result["same_replies"] else " other replies")
                )
            rows.append(row)
    heads = ["no DeepSpeed" if s == "none" else f"ZeRO-{s}" for s in options.stages]
    return cells.table(["method", "processes", *heads], rows)


def main() -> int:
    """Print the table; 1 when a cell misses a bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtype", choices=BARS, default="float32")
    parser.add_argument("--family", choices=cells.FAMILIES, default="chatglm")
    parser.add_argument("--with", dest="changes", nargs="*", default=[], metavar="SECTION__KEY=JSON")  # fmt: skip
    parser.add_argument("--keep", type=Path, help="write the runs here instead of to a temporary")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = measure(options, folder)
    bad = {name: why for name, result in results.items() if (why := missed(result, options.dtype))}
    if options.json:
        print(json.dumps({"cells": results, "missed": bad, "bars": BARS[options.dtype]}))
        return bool(bad)
    print(
        f"\n{options.dtype}, largest difference to float32 in one process without DeepSpeed: loss, weights, logits\n"
    )
    print(show(results, options))
    for name, why in bad.items():
        print(f"MISSED  {name}: {', '.join(why)}")
    print(f"{len(results) - len(bad)} of {len(results)} cells within {BARS[options.dtype]}")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
