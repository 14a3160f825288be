"""Does a tiny GLM-4V learn from pixels? Train from scratch on shapes, then ask with images blanked.

Prints the share of held-out questions that are answered exactly, by subject: with the images, and
by the same model with every image replaced by white paper. About five minutes of one CPU core.

    python scripts/learn_from_pixels.py runs/pixels
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def config(folder: Path, steps: int) -> dict[str, Any]:
    """The run, as a YAML file would say it (JSON is YAML)."""
    data = {"train": f"{folder}/data/train.jsonl", "validation": f"{folder}/data/held_out.jsonl"}
    return {
        "model": {"path": f"{folder}/model"},
        "data": data | {"max_length": 128, "cache_dir": f"{folder}/cache"},
        "method": {"kind": "full"},
        "training": {
            "output_dir": f"{folder}/run", "max_steps": steps, "batch_size": 16,
            "learning_rate": 1e-3, "warmup_steps": 60, "weight_decay": 0.01,
            "log_every_steps": 25, "save_every_steps": 100000, "report_to": [],
        },
        "evaluation": {"max_new_tokens": 6, "batch_size": 100},
    }  # fmt: skip


def blanked(folder: Path) -> Path:
    """The held-out questions with white paper for every image."""
    (folder / "blank/images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (112, 112), "white").save(folder / "blank/images/white.png")
    rows = [json.loads(line) for line in (folder / "data/held_out.jsonl").open(encoding="utf-8")]
    for row in rows:
        row["messages"][0]["image"] = "images/white.png"
    path = folder / "blank/held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*arguments: str) -> None:
    """One finetune command."""
    subprocess.run([sys.executable, "finetune.py", *arguments], cwd=ROOT, check=True)


def shares(folder: Path) -> dict[str, float]:
    """Per cent of exact answers in a folder that `finetune evaluate` wrote: by question and of all."""
    right, asked = Counter[str](), Counter[str]()
    for line in (folder / "predictions.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        question = row["prompt"].split("<|end_of_image|>")[1].split("<|assistant|>")[0]
        for name in (question, "all"):
            asked[name] += 1
            right[name] += row["prediction"].strip() == row["reference"].strip()
    return {name: 100 * right[name] / asked[name] for name in asked}


def main() -> None:
    """Make the data and the model, train, ask twice."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    given = parser.parse_args()
    folder = given.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    here = [sys.executable, str(ROOT / "scripts/make_shapes.py"), str(folder / "data")]
    subprocess.run([*here, "--train", "4000", "--held-out", "400"], check=True)
    model = [sys.executable, str(ROOT / "scripts/tiny_glm4v.py"), str(folder / "model")]
    text = ["--text", str(folder / "data/train.jsonl"), "--layers", "3"]
    subprocess.run([*model, *text], check=True)
    (folder / "config.yaml").write_text(json.dumps(config(folder, given.steps)), encoding="utf-8")
    run("train", str(folder / "config.yaml"))
    target = str(folder / f"run/checkpoint-{given.steps}")
    questions = {"seen": folder / "data/held_out.jsonl", "blanked": blanked(folder)}
    for name, path in questions.items():
        run("evaluate", target, "--data", str(path), "--output", str(folder / name))
    seen, blank = (shares(folder / name) for name in questions)
    print(f"{'question':14}  with images  blanked")
    for name in seen:
        print(f"{name:14}  {seen[name]:9.1f} %  {blank[name]:5.1f} %")


if __name__ == "__main__":
    main()
