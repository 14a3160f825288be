"""What a tiny GLM-4V reads off eye charts: check, train, evaluate, merge, predict, all on real input.

The data is a folder with train.jsonl, dev.jsonl and images (charts of 1920 x 1920 pixels whose
letters are 90 to 12 pixels wide, and rows of plain text among them). A random model of image size
224 is trained on it from scratch, then once more with LoRA. Exact answers are counted for the
trained model with the charts, for the same with white paper instead, and for the merged adapter.

    python scripts/evidence/eye_chart.py DATA runs/eye_chart
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from learn_from_pixels import ROOT, blanked, run

SIZE = 224


def config(folder: Path, data: Path, model: Path, name: str, **method: Any) -> Path:
    """The YAML file of one run (JSON is YAML)."""
    training = {"batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 20, "weight_decay": 0.01}
    sections = {
        "model": {"path": str(model)},
        "data": {
            "train": str(data / "train.jsonl"), "validation": str(data / "dev.jsonl"),
            "max_length": 1024, "cache_dir": str(folder / "cache"),
        },
        "method": method,
        "training": training | {
            "output_dir": str(folder / name), "num_epochs": 12 if name == "full" else 2,
            "log_every_steps": 25, "save_every_steps": 100000, "report_to": [],
        },
        "evaluation": {"max_new_tokens": 12, "batch_size": 50},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(sections, indent=1), encoding="utf-8")
    return path


def last(run_dir: Path) -> str:
    """The newest checkpoint of a run."""
    return str(max(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))


def right(folder: Path) -> str:
    """How many answers are exact in a folder that `finetune evaluate` wrote.

    Only the first question of a chart needs eyes: the later ones show the right row in their prompt.
    """
    file = next(folder.rglob("*.jsonl"))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    first = [row for row in rows if row["prompt"].count("<|assistant|>") == 1]
    late = [row for row in rows if row not in first]
    counts = [
        f"{sum(r['prediction'].strip() == r['reference'] for r in part):3} of {len(part)}"
        for part in (first, late)
    ]
    return f"rows read {counts[0]}, later questions {counts[1]}"


def main() -> None:
    """All commands, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="a folder with train.jsonl, dev.jsonl and images/")
    parser.add_argument("folder", type=Path, help="made anew; everything is written there")
    given = parser.parse_args()
    data, folder = given.data.resolve(), given.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train, dev = str(data / "train.jsonl"), str(data / "dev.jsonl")
    make = [sys.executable, str(ROOT / "scripts/fixtures/tiny_glm4v.py"), str(folder / "model")]
    text = ["--text", train, "--layers", "3", "--size", str(SIZE)]
    subprocess.run([*make, *text], check=True)
    run("data", "check", train, dev, "--model", str(folder / "model"))
    run("train", str(config(folder, data, folder / "model", "full", kind="full")))
    trained = last(folder / "full")
    blank = blanked(folder, data / "dev.jsonl")
    for name, path in (("seen", dev), ("blanked", str(blank))):
        run("evaluate", trained, "--data", path, "--output", str(folder / name))
    lora = config(folder, data, Path(trained), "lora", kind="lora", rank=8)
    run("train", str(lora))
    merged = str(folder / "merged")
    run("merge", str(folder / "lora"), "--output", merged)
    run("predict", merged, "--data", dev, "--output", str(folder / "merged.jsonl"))
    run("evaluate", merged, "--data", dev, "--output", str(folder / "after_lora"))
    for what, name in (("charts", "seen"), ("white paper", "blanked"), ("merged", "after_lora")):
        print(f"{what:12} {right(folder / name)}")


if __name__ == "__main__":
    main()
