"""This checkout beside another one, on a CPU: preparing, a step, replies, memory, in turns.

    git worktree add /tmp/before COMMIT
    python scripts/bench/against.py /tmp/before [--rounds 3] [--rows 100000]

prepare   the quickstart's dialogues, repeated to so many rows, in a cache that is empty, and one step; less
          the same of 40 rows
predict   replies of 32 tokens to 600 dialogues less those to 40, as the command is typed, for each of the 560
step      404 steps of the quickstart on its tiny model less 4, for each of the 400
memory    the most that either process took

CPU seconds of the whole process tree of the command, medians of the rounds. 1 when a ratio is above 1.05,
which is the noise of two rounds of one checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOISE = 1.05
FEW_ROWS, SHORT, LONG = 40, 4, 404
ASKED = 600
Figures = dict[str, float]


def train(checkout: Path, folder: Path, *overrides: str) -> Figures:
    """CPU seconds and MB of one run of the quickstart's configuration without evaluation."""
    command = [
        sys.executable, "-m", "finetune", "train", "configs/quickstart.yaml", "deepspeed=null",
        f"model.path={folder / 'model'}", f"data.cache_dir={tempfile.mkdtemp(dir=folder)}",
        f"training.output_dir={tempfile.mkdtemp(dir=folder)}/run", "training.num_epochs=null",
        "data.validation=null", "evaluation.at_start=false", "training.save_every_steps=100000", *overrides,
    ]  # fmt: skip
    return run(checkout, command)


def run(checkout: Path, command: list[str]) -> Figures:
    """CPU seconds and MB of a command of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as said:
        running = subprocess.Popen(command, cwd=checkout, env=environment, stdout=said, stderr=said)
        _, status, used = os.wait4(running.pid, 0)
        said.seek(0)
        if status:
            raise SystemExit(f"{checkout}: ended with {status}:\n{said.read().decode()[-3000:]}")
    return {"cpu": used.ru_utime + used.ru_stime, "mb": used.ru_maxrss / 1024}


def predict(checkout: Path, folder: Path, name: str) -> Figures:
    """The same of `finetune predict` on the rows of a file."""
    command = [
        sys.executable, "-m", "finetune", "predict", str(folder / "model"), "--max-new-tokens", "32",
        "--data", str(folder / f"{name}.jsonl"), "--output", f"{tempfile.mkdtemp(dir=folder)}/replies.jsonl",
    ]  # fmt: skip
    return run(checkout, command)


def measure(checkout: Path, folder: Path) -> Figures:
    """One round."""
    one = "training.max_steps=1"
    few = train(checkout, folder, one, f"data.train={folder / 'few.jsonl'}")
    many = train(checkout, folder, one, f"data.train={folder / 'many.jsonl'}")
    short, long = (train(checkout, folder, f"training.max_steps={n}") for n in (SHORT, LONG))
    first, asked = predict(checkout, folder, "few"), predict(checkout, folder, "asked")
    return {
        "predict, CPU ms a reply": 1000 * (asked["cpu"] - first["cpu"]) / (ASKED - FEW_ROWS),
        "predict, MB": asked["mb"],
        "predict, start and 40 replies, CPU s": first["cpu"],
        "prepare, CPU s": many["cpu"] - few["cpu"],
        "prepare, MB": many["mb"],
        "step, CPU ms": 1000 * (long["cpu"] - short["cpu"]) / (LONG - SHORT),
        "step, MB": long["mb"],
        "start, one step and a save, CPU s": few["cpu"],
    }


def main() -> int:
    """Measure in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("other", type=Path, help="a folder with another version of this repository")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make = [sys.executable, "scripts/fixtures/quickstart_model.py", str(folder / "model"), "--tiny"]  # fmt: skip
        subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
        lines = (ROOT / "data/support_desk/train.jsonl").read_text(encoding="utf-8").splitlines()
        for name, number in (("few", FEW_ROWS), ("asked", ASKED), ("many", asked.rows)):
            rows = [lines[n % len(lines)] + "\n" for n in range(number)]
            if name == "asked":  # no two prompts alike: of one that was answered some is remembered
                rows = [
                    row.replace('"content": "', f'"content": "{n}. ', 1)
                    for n, row in enumerate(rows)
                ]
            (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        found: dict[Path, list[Figures]] = {ROOT: [], asked.other.resolve(): []}
        for _ in range(asked.rounds):
            for checkout, rounds in found.items():
                rounds.append(measure(checkout, folder))
    ours, theirs = (
        {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        for rounds in found.values()
    )
    ratios = {key: ours[key] / theirs[key] for key in ours}
    if asked.json:
        print(json.dumps({"ours": ours, "other": theirs, "ratios": ratios}))
    else:
        print("| | here | there | ratio |\n|---|---|---|---|")
        for key, ratio in ratios.items():
            print(f"| {key} | {ours[key]:.2f} | {theirs[key]:.2f} | {ratio:.2f} |")
    return int(max(ratios.values()) > NOISE)


if __name__ == "__main__":
    raise SystemExit(main())
