"""Does the needle's map show where a model's reach ends? Train a small one on copying, then hide numbers.

    python scripts/evidence/needle_copying.py [--folder runs/needle] [--write]

A GLM of about a million parameters is trained from scratch to say the hidden number, in texts of at most
512 tokens that are none of those of the test. `finetune evaluate --needle 256..4k` then asks it and the
same model before training, which cannot do it. 200 fresh texts of at most 512 tokens say how surely it
does inside its trained length. `--write` puts the map into docs/. About ten minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
TRAINED = 512
"""Tokens of the longest text that is trained."""
MOST = 40
"""Sentences of it."""
ASKED = "256..4k"
BEGIN, END = "<!-- made by scripts/evidence/needle_copying.py -->", "<!-- end -->"


def rows(seed: str) -> Iterator[dict[str, Any]]:
    """Texts of few sentences up to the trained length, mostly short, with their numbers; without an end."""
    from finetune.evaluation.tasks import needle

    draw = random.Random(seed)
    while True:
        language = draw.choice(needle.LANGUAGES)
        number, sentences = str(draw.randint(10_000, 99_999)), int(MOST ** draw.random())
        text = [needle.sentence(language, draw) for _ in range(sentences)]
        text.insert(draw.randint(0, sentences), needle.NEEDLES[language].format(number))
        asked = "".join(text) + needle.QUESTIONS[language]
        messages = [("user", asked), ("assistant", number)]
        yield {"messages": [{"role": role, "content": said} for role, said in messages]}


def config(folder: Path, steps: int) -> dict[str, Any]:
    """The run, as a YAML file would say it (JSON is YAML)."""
    return {
        "model": {"path": f"{folder}/model"},
        "data": {"train": f"{folder}/train.jsonl", "max_length": TRAINED, "cache_dir": f"{folder}/cache"},
        "method": {"kind": "full"},
        "training": {
            "output_dir": f"{folder}/run", "max_steps": steps, "batch_size": 32, "learning_rate": 2e-3,
            "warmup_steps": 50, "log_every_steps": 50, "save_every_steps": 100000, "report_to": [],
        },
    }  # fmt: skip


def finetune(*words: str) -> None:
    """Runs a command; ends with its exit code when it fails."""
    done = subprocess.run([sys.executable, "finetune.py", *words], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def write_rows(file: Path, found: Iterator[dict[str, Any]]) -> None:
    """One row a line."""
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)


def main() -> None:
    """Make the model and its texts, train, ask, and print the map."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/needle"), help="made anew")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--texts", type=int, default=20000, help="trained on (20000)")
    parser.add_argument("--write", action="store_true", help="put the map into docs/")
    given = parser.parse_args()
    folder, begun = given.folder.resolve(), time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_rows(folder / "train.jsonl", islice(rows("train"), given.texts))
    write_rows(folder / "held_out.jsonl", islice(rows("held out"), 200))
    made = [sys.executable, "scripts/fixtures/small_glm.py", str(folder / "model"), str(folder / "held_out.jsonl")]  # fmt: skip
    subprocess.run(made, cwd=ROOT, check=True)
    (folder / "config.yaml").write_text(json.dumps(config(folder, given.steps)), encoding="utf-8")
    finetune("train", str(folder / "config.yaml"))


if __name__ == "__main__":
    main()
