"""Checkpoints resumed at another number of processes, without DeepSpeed and under ZeRO.

    python scripts/bench/world_size.py [--json]

A run of two processes is stopped at its middle and resumed by one and by four, batch size or
accumulation changed so that the global batch stays; every later step must see the same samples, and
losses and final weights must be those of the run without a stop up to float noise.
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
SUBJECTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "LoRA": ({}, ("one", "four", "one_by_one")),
    "LoRA, ZeRO-2": ({"deepspeed__zero_stage": 2}, ("one", "four")),
    "prefix, ZeRO-3": ({"deepspeed__zero_stage": 3, "method__kind": "ptuning_v2"}, ("four",)),
    "full, ZeRO-1": ({"deepspeed__zero_stage": 1, "method__kind": "full"}, ("one",)),
    "full, ZeRO-3": ({"deepspeed__zero_stage": 3, "method__kind": "full"}, ("one", "four")),
}
BAR = 1e-5


def cell(name: str, place: str, model: Path, data: Path, folder: Path, **more: Any) -> Cell:
    """A run of the eight-example steps in some place."""
    import closeness
    import runs

    processes, batch_size, accumulation = PLACES[place]
    settings = runs.config(
        model, data, folder / name, training__max_steps=STEPS, training__save_every_steps=STOP,
        training__batch_size=batch_size, training__gradient_accumulation_steps=accumulation,
        **closeness.SMOOTH_STEPS, **more,
    )  # fmt: skip
    kind = settings["method"]["kind"]
    settings["method"] = {"kind": kind} | ({"rank": 4, "dropout": 0.0} if kind == "lora" else {})
    return Cell(name, settings, processes)


def steps_of(one: Cell, folder: Path) -> list[list[int]]:
    """The samples of every step, whoever saw them."""
    steps = cells.samples(one, folder)
    return [sorted(sample for process in step for sample in process) for step in steps]


def resumed(whole: Cell, part: Cell, folder: Path) -> dict[str, Any]:
    """The differences of a run that goes on in another place."""
    import runs

    name, saved = part.name, f"checkpoint-{STOP}"
    shutil.copytree(folder / whole.name / saved, folder / name / saved)
    if problem := cells.run(part, folder):
        return {"problem": problem}
    left, right = (trained(folder / n / f"checkpoint-{STEPS}") for n in (whole.name, name))
    losses = [runs.history(folder / n) for n in (whole.name, name)]
    return {
        "same_samples": steps_of(part, folder) == steps_of(whole, folder)[STOP:],
        "loss": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "weights": max(float((left[key] - right[key]).abs().max()) for key in left),
    }


def trained(checkpoint: Path) -> dict[str, Any]:
    """The weights of an adapter, or of a whole model."""
    from safetensors.torch import load_file

    return load_file(next(checkpoint.glob("*model.safetensors")))


def measure(folder: Path) -> dict[str, Any]:
    """All of it."""
    import runs
    import tiny

    os.environ["FINETUNE_CACHE"] = str(folder / "cache")
    model = tiny.save_model(folder / "model", "chatglm")
    data = runs.write_dialogues(folder / "train.jsonl", 21)
    cells.warm_up(model)
    found = {}
    for subject, (changes, places) in SUBJECTS.items():
        whole = cell(subject, "two", model, data, folder, **changes)
        if problem := cells.run(whole, folder):
            raise SystemExit(problem)
        for place in places:
            part = cell(f"{subject} to {place}", place, model, data, folder, **changes)
            found[part.name] = resumed(whole, part, folder)
    return found


def main() -> int:
    """Print the table; 1 when something differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(Path(temporary))
    good = all(
        result.get("same_samples") and result["loss"] <= BAR and result["weights"] <= BAR
        for result in found.values()
    )
    if options.json:
        print(json.dumps({"places": found, "good": good}))
        return int(not good)
    rows = [
        [name, f"{PLACES[name.rpartition(' ')[2]]}", json.dumps(result.get("same_samples")), *(
            f"{result[key]:.0e}" if key in result else result["problem"] for key in ("loss", "weights")
        )]
        for name, result in found.items()
    ]  # fmt: skip
    heads = ["", "processes, batch size, accumulation", "same samples", "loss", "weights"]
    print(f"from {PLACES['two']}\n{cells.table(heads, rows)}")
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())
