"""Does a model tell its pictures apart? A tiny GLM-4.1V learns which of three pictures shows a colour.

The three are shown together, or one after the other in several turns, with text between them. The text
model learns from scratch over a random vision encoder that is frozen, what that sees being kept on disk.
It is asked held-out questions, then the same with the pictures of each dialogue in another order. A guess
is right for one in three. A few minutes of one CPU core.

    python scripts/evidence/which_picture.py runs/pictures
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

from make_shapes import COLOURS, KINDS, draw_shape

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


def draw_pictures(
    folder: Path, name: str, chooser: random.Random, each: int
) -> dict[str, list[str]]:
    """Paths of `each` pictures of every colour: a shape of any kind, size and place, in any format."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[str]] = {}
    for colour, fill in COLOURS.items():
        for number in range(each):
            width, height = chooser.choice([(28, 28), (56, 28), (28, 56)])
            paper = chooser.randint(225, 255)
            image = Image.new("RGB", (width, height), (paper, paper, paper))
            size = chooser.randint(18, 25)
            left, top = chooser.randint(1, width - size - 1), chooser.randint(1, height - size - 1)
            box = (left, top, left + size, top + size)
            draw_shape(ImageDraw.Draw(image), chooser.choice(KINDS), box, fill)
            path = folder / f"{name}_{colour}_{number}.png"
            image.save(path)
            found.setdefault(colour, []).append(f"images/{path.name}")
    return found


def shown(number: int, path: str) -> list[dict[str, str]]:
    """The parts of a message that show a picture."""
    return [{"type": "text", "text": f" {number}"}, {"type": "image", "image": path}]


def dialogue(pictures: dict[str, list[str]], chooser: random.Random, kind: str) -> Row:
    """Three pictures of different colours and a question; of `kind` together, turns or colour."""
    colours = chooser.sample(list(COLOURS), 3)
    paths = [chooser.choice(pictures[colour]) for colour in colours]
    asked = chooser.randrange(3)
    question, answer = f" Which is {colours[asked]}?", f"{asked + 1}"
    if kind == "colour":
        question, answer = f" What colour is {asked + 1}?", colours[asked]
    parts = [shown(number, path) for number, path in enumerate(paths, 1)]
    ask = [{"type": "text", "text": question}]
    turns = [parts[0] + parts[1] + parts[2] + ask]
    if kind == "turns":  # where a turn ends says nothing of the answer
        first = chooser.choice([1, 2])
        turns = [
            [part for shows in parts[:first] for part in shows],
            [part for shows in parts[first:] for part in shows] + ask,
        ]
    messages: list[Row] = []
    for turn in turns[:-1]:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "seen"}]
    messages += [{"role": "user", "content": turns[-1]}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def write(path: Path, rows: list[Row]) -> Path:
    """The rows as a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shuffled(row: Row) -> Row:
    """The dialogue with its pictures in another order, none where it was."""
    again = json.loads(json.dumps(row))
    parts = [
        part
        for message in again["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]
    paths = [part["image"] for part in parts]
    for part, path in zip(parts, paths[1:] + paths[:1], strict=True):
        part["image"] = path
    return dict(again)


def config(folder: Path, steps: int) -> Row:
    """The run, as a YAML file would say it (JSON is YAML)."""
    return {
        "model": {"path": f"{folder}/model", "freeze": ["vision"]},
        "data": {
            "train": f"{folder}/data/train.jsonl", "max_length": 128, "train_on": "last_reply",
            "cache_dir": f"{folder}/cache", "cache_image_features": True,
        },
        "method": {"kind": "full"},
        "training": {
            "output_dir": f"{folder}/run", "max_steps": steps, "batch_size": 64,
            "learning_rate": 3e-3, "warmup_steps": 60, "weight_decay": 0.01,
            "log_every_steps": 25, "save_every_steps": 100000, "report_to": [],
        },
        "evaluation": {"max_new_tokens": 4, "batch_size": 100},
    }  # fmt: skip


def run(*arguments: str) -> None:
    """One finetune command."""
    subprocess.run([sys.executable, "finetune.py", *arguments], cwd=ROOT, check=True)


def share(folder: Path) -> float:
    """Per cent of right answers in a folder that `finetune evaluate` wrote."""
    rows = [json.loads(line) for line in next(folder.rglob("*.jsonl")).open(encoding="utf-8")]
    return 100 * sum(row["prediction"].strip() == row["reference"] for row in rows) / len(rows)


def main() -> int:
    """Make data and model, train, ask; 1 when it has not learnt to tell them apart."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--family", default="glm4v")
    given = parser.parse_args()
    folder = given.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    data = folder / "data"
    chooser = random.Random(0)
    drawn = {name: draw_pictures(data / "images", name, chooser, 40) for name in ("train", "held")}
    kinds = ["together", "turns", "colour"]
    train = [dialogue(drawn["train"], chooser, kinds[n % 3]) for n in range(24000)]
    write(data / "train.jsonl", train)
    make = [sys.executable, "scripts/fixtures/tiny_grids.py", str(folder / "model")]
    make += ["--text", str(data / "train.jsonl"), "--family", given.family]
    subprocess.run(make, cwd=ROOT, check=True)
    (folder / "config.yaml").write_text(json.dumps(config(folder, given.steps)), encoding="utf-8")
    run("train", str(folder / "config.yaml"))
    target = str(folder / f"run/checkpoint-{given.steps}")
    found: dict[str, float] = {}
    for kind in ("together", "turns"):
        rows = [dialogue(drawn["held"], chooser, kind) for _ in range(200)]
        for name, asked in ((kind, rows), (f"{kind}, shuffled", [shuffled(row) for row in rows])):
            file = write(data / f"{name.replace(', ', '_')}.jsonl", asked)
            run(
                "evaluate", target, "--data", str(file), "--output", str(folder / file.stem),
                "--replies", "last_reply",
            )  # fmt: skip
            found[name] = share(folder / file.stem)
    for name, value in found.items():
        print(f"{name:22} {value:6.1f} %")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{(spent.ru_utime + spent.ru_stime) / 60:.1f} minutes of CPU")
    told = all(value <= 40 if "shuffled" in name else value >= 90 for name, value in found.items())
    return int(not told)


if __name__ == "__main__":
    raise SystemExit(main())
