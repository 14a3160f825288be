"""Does a tiny GLM-4V learn from pixels? Train from scratch on shapes, then ask with images blanked.

Prints the share of held-out questions that are answered exactly, by subject: with the images, by the
same model with every image replaced by white paper, and by whoever always gives the commonest
answer. About five minutes of one CPU core.

    python scripts/evidence/learn_from_pixels.py runs/pixels
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


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


def blanked(folder: Path, asked: Path) -> Path:
    """The questions of a file, with white paper for every image."""
    (folder / "blank/images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (112, 112), "white").save(folder / "blank/images/white.png")
    rows = [json.loads(line) for line in asked.open(encoding="utf-8")]
    for row in rows:
        row["messages"][0]["image"] = "images/white.png"
    path = folder / "blank/held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*arguments: str) -> None:
    """One finetune command."""
    subprocess.run([sys.executable, "finetune.py", *arguments], cwd=ROOT, check=True)


def answers(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """(answer, right answer) by question, in a folder that `finetune evaluate` wrote."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in next(folder.rglob("*.jsonl")).open(encoding="utf-8"):
        row = json.loads(line)
        question = row["prompt"].split("<|end_of_image|>")[1].split("<|assistant|>")[0]
        found.setdefault(question, []).append((row["prediction"].strip(), row["reference"]))
    return found


def shares(asked: dict[str, list[tuple[str, str]]]) -> dict[str, float]:
    """Per cent of right answers, by question and of all."""
    pairs = asked | {"all": [pair for each in asked.values() for pair in each]}
    return {name: 100 * sum(a == b for a, b in each) / len(each) for name, each in pairs.items()}


def guessed(asked: dict[str, list[tuple[str, str]]]) -> dict[str, list[tuple[str, str]]]:
    """The same questions, all answered with what is right most often."""
    return {
        name: [(Counter(b for _, b in each).most_common(1)[0][0], b) for _, b in each]
        for name, each in asked.items()
    }


def main() -> None:
    """Make the data and the model, train, ask twice."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    given = parser.parse_args()
    folder = given.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    here = [sys.executable, str(ROOT / "scripts/fixtures/make_shapes.py"), str(folder / "data")]
    subprocess.run([*here, "--train", "4000", "--held-out", "400"], check=True)
    model = [sys.executable, str(ROOT / "scripts/fixtures/tiny_glm4v.py"), str(folder / "model")]
    text = ["--text", str(folder / "data/train.jsonl"), "--layers", "3"]
    subprocess.run([*model, *text], check=True)
    (folder / "config.yaml").write_text(json.dumps(config(folder, given.steps)), encoding="utf-8")
    run("train", str(folder / "config.yaml"))
    target = str(folder / f"run/checkpoint-{given.steps}")
    asked = folder / "data/held_out.jsonl"
    questions = {"seen": asked, "blanked": blanked(folder, asked)}
    for name, path in questions.items():
        run("evaluate", target, "--data", str(path), "--output", str(folder / name))
    seen, blank = (answers(folder / name) for name in questions)
    columns = [shares(one) for one in (seen, blank, guessed(seen))]
    print(f"{'question':14}  with images  blanked  commonest answer")
    for name in columns[0]:
        print(f"{name:14}  " + "  ".join(f"{column[name]:7.1f} %" for column in columns))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{(spent.ru_utime + spent.ru_stime) / 60:.1f} minutes of CPU")


if __name__ == "__main__":
    main()
