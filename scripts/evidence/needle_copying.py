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
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from made_pages import put

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
TRAINED = 512
"""Tokens of the longest text that is trained."""
MOST = 38
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


def run(*words: str) -> None:
    """A program of ours; ends with its exit code when it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def write_rows(file: Path, found: Iterator[dict[str, Any]]) -> None:
    """One row a line, unless the file is there."""
    if not file.is_file():
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)


def trained(folder: Path, steps: int, texts: int) -> Path:
    """The checkpoint at the end of the run, which goes on where it was interrupted."""
    write_rows(folder / "train.jsonl", islice(rows("train"), texts))
    write_rows(folder / "held_out.jsonl", islice(rows("held out"), 200))
    if not (folder / "model").is_dir():
        run("scripts/fixtures/small_glm.py", f"{folder}/model", f"{folder}/held_out.jsonl")
    target = folder / f"run/checkpoint-{steps}"
    if not target.is_dir():
        (folder / "config.yaml").write_text(json.dumps(config(folder, steps)), encoding="utf-8")
        run("finetune.py", "train", f"{folder}/config.yaml")
    return target


def asked(folder: Path, name: str, models: list[Path], *words: str) -> Any:
    """What `finetune evaluate` wrote about these models."""
    from finetune.evaluation.schema import read_evaluation

    if not (folder / name).is_dir():
        run("finetune.py", "evaluate", *map(str, models), *words, "--output", str(folder / name))
    return read_evaluation(folder / name)


def told(found: Any) -> list[str]:
    """The map of each model as a table: depth by length, the share found in both languages together."""
    from finetune.evaluation.tasks import needle

    lines = []
    for target in found.targets:
        cells: dict[tuple[int, int], list[float]] = {}
        for name, value in found.needles[target.name].items():
            _, length, depth = name.split(":")
            cells.setdefault((int(length), int(depth)), []).append(value)
        lengths = sorted({length for length, _ in cells})
        lines += [f"| {target.name}, depth | {' | '.join(f'{length:,} tokens' for length in lengths)} |", "|---" * (len(lengths) + 1) + "|"]  # fmt: skip
        for depth in needle.DEPTHS:
            shares = [sum(cells[length, depth]) / len(cells[length, depth]) for length in lengths]
            lines.append(f"| {depth} % | {' | '.join(f'{share:.0f}' for share in shares)} |")
        whole = [target.scores[f"{needle.PREFIX}/{length}"] for length in lengths]
        lines.append(f"| all depths | {' | '.join(f'**{one.value:.0f}**' for one in whole)} |")
        lines.append("")
    return lines


def main() -> None:
    """Make the model and its texts, train, ask, and print the map."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/needle"))
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--texts", type=int, default=20000, help="trained on (20000)")
    parser.add_argument("--write", action="store_true", help="put the map into docs/")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    target = trained(folder, given.steps, given.texts)
    surely = asked(folder, "inside", [target], "--generate", "--max-new-tokens", "8", "--data", f"{folder}/held_out.jsonl")  # fmt: skip
    right = surely.targets[0].scores["exact_match"]
    found = asked(folder, "map", [target, folder / "model"], "--needle", ASKED)
    inside = f"{right.value:.1f} % ({right.low:.1f} to {right.high:.1f}) of {right.n} fresh texts of at most {TRAINED} tokens"  # fmt: skip
    made = "\n".join([*told(found), inside])
    print(made)
    if given.write:
        put(ROOT / "docs/evaluation.md", BEGIN, made, END)


if __name__ == "__main__":
    main()
