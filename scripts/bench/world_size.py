"""Checkpoints resumed at another number of processes: what goes on, what is refused and how.

    python scripts/bench/world_size.py [--json]

Plain data parallel: a run of two processes is stopped at its middle and resumed by one and by four,
batch size or accumulation changed so that the global batch stays; every later step must see the same
samples, and losses and final weights must be those of the run without a stop up to float noise.
ZeRO-2: the same is refused, with what to do about it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import cells
from cells import Cell

STEPS, STOP = 6, 3
# processes, batch size, accumulation: always 8 examples a step
PLACES = {"two": (2, 2, 2), "one": (1, 4, 2), "four": (4, 1, 2), "one_by_one": (1, 1, 8)}
BAR = 1e-5


def cell(name: str, place: str, model: Path, data: Path, folder: Path, **more: Any) -> Cell:
    """A run of the eight-example steps in some place."""
    import runs

    processes, batch_size, accumulation = PLACES[place]
    settings = runs.config(
        model, data, folder / name, method__dropout=0.0, training__max_steps=STEPS,
        training__save_every_steps=STOP, training__batch_size=batch_size,
        training__gradient_accumulation_steps=accumulation, **more,
    )  # fmt: skip
    return Cell(name, settings, processes)


def steps_of(one: Cell, folder: Path) -> list[list[int]]:
    """The samples of every step, whoever saw them."""
    steps = cells.samples(one, folder)
    return [sorted(sample for process in step for sample in process) for step in steps]


def resumed(whole: Cell, place: str, model: Path, data: Path, folder: Path) -> dict[str, Any]:
    """The differences of a run that goes on in another place."""
    import runs

    name = f"to-{place}"
    saved = f"checkpoint-{STOP}"
    shutil.copytree(folder / whole.name / saved, folder / name / saved)
    part = cell(name, place, model, data, folder)
    if problem := cells.run(part, folder):
        return {"problem": problem}
    left, right = (runs.weights(folder / n / f"checkpoint-{STEPS}") for n in (whole.name, name))
    losses = [runs.history(folder / n) for n in (whole.name, name)]
    return {
        "same_samples": steps_of(part, folder) == steps_of(whole, folder)[STOP:],
        "loss": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "weights": max(float((left[key] - right[key]).abs().max()) for key in left),
    }


def measure(folder: Path) -> dict[str, Any]:
    """All of it."""
    import runs
    import tiny

    os.environ["FINETUNE_CACHE"] = str(folder / "cache")
    model = tiny.save_model(folder / "model", "chatglm")
    data = runs.write_dialogues(folder / "train.jsonl", 21)
    cells.warm_up(model)
    whole = cell("whole", "two", model, data, folder)
    if problem := cells.run(whole, folder):
        raise SystemExit(problem)
    found: dict[str, Any] = {
        place: resumed(whole, place, model, data, folder) for place in PLACES if place != "two"
    }
    sharded = cell("sharded", "two", model, data, folder, deepspeed__zero_stage=2)
    if problem := cells.run(sharded, folder):
        raise SystemExit(problem)
    other = cell("sharded", "one", model, data, folder, deepspeed__zero_stage=2)
    cells.run(other, folder)
    log = (folder / "sharded.0.log").read_text(encoding="utf-8")
    found["refusal"] = log.partition("error: ")[2].strip()
    return found


def main() -> int:
    """Print the table; 1 when something differs or is not refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(Path(temporary))
    refusal = found.pop("refusal")
    good = bool(refusal) and all(
        result.get("same_samples") and result["loss"] <= BAR and result["weights"] <= BAR
        for result in found.values()
    )
    if options.json:
        print(json.dumps({"places": found, "refusal": refusal, "good": good}))
        return int(not good)
    rows = [
        [f"{PLACES[place]}", json.dumps(result.get("same_samples")), *(
            f"{result[key]:.0e}" if key in result else result["problem"] for key in ("loss", "weights")
        )]
        for place, result in found.items()
    ]  # fmt: skip
    heads = ["processes, batch size, accumulation", "same samples", "loss", "weights"]
    print(
        f"from {PLACES['two']} without DeepSpeed to\n{cells.table(heads, rows)}\n\nZeRO-2: {refusal}"
    )
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())
