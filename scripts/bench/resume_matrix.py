"""Runs stopped and resumed, against the same runs without a stop: equal bit for bit, N of N.

    python scripts/bench/resume_matrix.py [--methods lora full] [--stages none 2] [--variants packing]
                                          [--family glm4v] [--json]

Every method in every variant under every stage (in two processes when there is one, else in one) is
trained for two epochs, tiny and with dropout, and once more from its checkpoint

    first   after the first step
    middle  in the middle of the second epoch
    epoch   at the end of the first epoch

A cell of the table holds how many of the three ended in the same losses, learning rates, gradient
norms, evaluations, sample ids and final weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
from cells import Cell

STAGES = ("none", "0", "1", "2", "3")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "dropout": 0.1},
    "ptuning_v2": {"kind": "ptuning_v2", "num_virtual_tokens": 5},
    "ptuning_v2_projection": {
        "kind": "ptuning_v2",
        "num_virtual_tokens": 5,
        "prefix_projection": True,
    },
    "full": {"kind": "full"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"data__group_by_length": False},
    "accumulation": {"training__batch_size": 1, "training__gradient_accumulation_steps": 3},
    "loader_workers": {"data__loader_workers": 2},
    "grouping": {"data__group_by_length": True, "training__batch_size": 3},
    "packing": {"data__packing": True, "data__max_length": 96, "training__batch_size": 1},
    "evaluation": {
        "evaluation__every_steps": 2,
        "evaluation__max_samples": 3,
        "evaluation__best_metric": "loss",
    },
}
MOMENTS = ("first", "middle", "epoch")
LOGGED = ("loss", "learning_rate", "grad_norm", "eval_loss", "eval_bleu-4")


@dataclass(frozen=True)
class Line:
    """One uninterrupted run and what is resumed from it."""

    method: str
    variant: str
    stage: str

    @property
    def name(self) -> str:
        """For files and for the table."""
        return f"{self.method}-{self.variant}-zero{self.stage}"

    @property
    def processes(self) -> int:
        """Two where something is sharded."""
        return 1 if self.stage == "none" else 2


@dataclass(frozen=True)
class Subject:
    """What all runs have in common."""

    model: Path
    data: Path
    changes: dict[str, Any]


def cell(line: Line, name: str, subject: Subject, folder: Path) -> Cell:
    """The run of a line, into `folder/name`."""
    import runs

    data = subject.data
    changes = subject.changes | VARIANTS[line.variant]
    if line.variant == "evaluation":
        changes["data__validation"] = str(data)
    settings = runs.config(
        subject.model, data, folder / name, training__num_epochs=2, training__learning_rate=1e-3,
        training__save_every_steps=1, **changes,
    ) | {"method": METHODS[line.method]}  # fmt: skip
    del settings["training"]["max_steps"]
    if line.stage != "none":
        settings["deepspeed"] = {"zero_stage": int(line.stage)}
    return Cell(name, settings, line.processes)


def stops(run_dir: Path) -> dict[str, int]:
    """The steps of the three moments."""
    from finetune.artifacts.checkpoint import checkpoints

    saved = checkpoints(run_dir)
    state = json.loads((saved[-1] / "trainer_state.json").read_text(encoding="utf-8"))
    per_epoch = state["global_step"] // 2
    return {"first": 1, "middle": per_epoch + (per_epoch + 1) // 2, "epoch": per_epoch}


def differences(whole: Path, part: Path, stop: int) -> list[str]:
    """What is not equal between the two after step `stop`, the last checkpoint included."""
    found = []
    for key in LOGGED:
        late = {step: value for step, value in _history(whole, key) if step > stop}
        if late != dict(pair for pair in _history(part, key) if pair[0] > stop):
            found.append(key)
    last = max(whole.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    names = sorted(path.name for path in last.glob("*.safetensors"))
    if not names or any(
        (last / name).read_bytes() != (part / last.name / name).read_bytes() for name in names
    ):
        found.append("weights")
    best = [(folder / "best.json").is_file() for folder in (whole, part)]
    if best[0] and _best(whole) != (_best(part) if best[1] else None) and _best(whole)[0] > stop:
        found.append("best checkpoint")
    return found


def _history(run_dir: Path, key: str) -> Iterator[tuple[int, Any]]:
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if key in record:
            yield record["step"], record[key]


def _best(run_dir: Path) -> tuple[int, Any]:
    saved = max(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((saved / "trainer_state.json").read_text(encoding="utf-8"))
    return state["best_global_step"] or 0, state["best_metric"]


def measure(line: Line, subject: Subject, folder: Path, moments: list[str]) -> dict[str, str]:
    """What is wrong with each resumed run of a line; empty where it is equal."""
    whole = cell(line, line.name, subject, folder)
    if problem := cells.run(whole, folder):
        return dict.fromkeys(moments, f"the run without a stop failed: {problem}")
    return {
        moment: resumed(line, stop, subject, folder, folder)
        for moment, stop in stops(folder / line.name).items()
        if moment in moments
    }


def resumed(line: Line, stop: int, subject: Subject, folder: Path, into: Path) -> str:
    """What is not equal when the run in `folder` is resumed from step `stop`, in `into`."""
    name, saved = f"{line.name}-{stop}", f"checkpoint-{stop}"
    shutil.copytree(folder / line.name / saved, into / name / saved)
    part = cell(line, name, subject, into)
    if problem := cells.run(part, into):
        return problem
    unequal = differences(folder / line.name, into / name, stop)
    whole = cells.samples(cell(line, line.name, subject, folder), folder)
    if cells.samples(part, into) != whole[stop:]:
        unequal.append("sample ids")
    return ", ".join(unequal)


def show(results: dict[str, dict[str, str]], options: argparse.Namespace) -> str:
    """The table: a row for every method and stage, a column for every variant."""
    rows = []
    for method in options.methods:
        for stage in options.stages:
            row = [method, "no DeepSpeed" if stage == "none" else f"ZeRO-{stage}"]
            for variant in options.variants:
                result = results[Line(method, variant, stage).name]
                equal = sum(1 for problem in result.values() if not problem)
                row.append(f"{equal} of {len(result)}")
            rows.append(row)
    return cells.table(["method", "stage", *options.variants], rows)


def main() -> int:
    """Print the table; 1 when a resumed run differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["none", "2", "3"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=list(MOMENTS))
    parser.add_argument("--family", choices=cells.FAMILIES, default="chatglm")
    parser.add_argument("--keep", type=Path, help="write the runs here instead of to a temporary")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["FINETUNE_CACHE"] = str(folder / "cache")
        subject = Subject(*cells.subject(options.family, folder, 13, weights=True))
        cells.warm_up(subject.model)
        for method in options.methods:
            for stage in options.stages:
                for variant in options.variants:
                    line = Line(method, variant, stage)
                    results[line.name] = measure(line, subject, folder, options.moments)
                    if not options.json:
                        print(f"{line.name}: {results[line.name]}", flush=True)
                    if not options.keep:
                        for run_dir in folder.glob(f"{line.name}*/"):
                            shutil.rmtree(run_dir)
    every = [problem for result in results.values() for problem in result.values()]
    if options.json:
        print(json.dumps({"cells": results, "equal": every.count(""), "of": len(every)}))
    else:
        print(f"\n{show(results, options)}\n{every.count('')} of {len(every)} equal bit for bit")
    return int(any(every))


if __name__ == "__main__":
    raise SystemExit(main())
