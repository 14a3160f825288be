"""Runs of strangers, looked at: `runs`, `status`, `board` and `compare` on folders that anybody wrote."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.reliability.frame import Case
from tests.reliability.places import command, trained
from tests.reliability.strangers_folders import ODD

Make = Callable[[Path], object]


def _sparse(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 2 * 10**9)


FILES: dict[str, Make] = {
    **ODD,
    "2 GB of zeros": _sparse,
    "a million lines": lambda path: path.write_text('{"step": 1, "loss": 1}\n' * 10**6),
    "brackets": lambda path: path.write_text("[" * 10**6),
    "UTF-16": lambda path: path.write_bytes('{"step": 1}'.encode("utf-16")),
    "a folder": lambda path: path.mkdir(),
    "numbers that are none": lambda path: path.write_text('{"step": NaN, "loss": Infinity}\n'),
    "a number of 10^5 digits": lambda path: path.write_text(
        '{"step": ' + "9" * 10**5 + ', "loss": 1}\n'
    ),
    "values of other kinds": lambda path: path.write_text(
        '{"step": "x", "loss": [], "time": {}}\n[1]\n5\nnull\n'
    ),
    "control characters": lambda path: path.write_text(
        '{"step": 1, "loss": 1, "eval_\\u001b]52;c;QQ\\u0007": 2, "kind": "\\u001b[2J"}\n'
    ),
}
PLACES = ("metrics.jsonl", "config.yaml", "data.json", "best.json", ".lock",
          "checkpoint-2/trainer_state.json", "predictions-2.jsonl")  # fmt: skip
COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "runs": lambda run, _: ("runs", run.parent),
    "status": lambda run, _: ("status", run),
    "board": lambda run, out: ("board", run.parent, "--output", out),
    "compare": lambda run, out: ("compare", run, "--output", out),
}


def looked_at(place: str, make: Make, name: str, folder: Path) -> None:
    """Shown or refused in words, at once; nothing of the disk beside the run, no control character."""
    run = Path(shutil.copytree(trained("lora"), folder / "runs/one"))
    file = run / place
    file.unlink(missing_ok=True)
    make(file)
    code, said = command(*COMMANDS[name](run, folder / "out"))
    assert "Traceback" not in said, said[-1500:]
    assert code in (0, 2, 3), (code, said[-500:])
    assert not {"\x1b", "\x07"} & set(said), said[-500:]


def cases() -> Iterator[Case]:
    """Every file of a run as everything that it is not, looked at."""
    trained("lora")
    for place in PLACES:
        for what, make in FILES.items():
            for name in COMMANDS if place == "metrics.jsonl" else ("status", "board"):
                run = partial(looked_at, place, make, name)
                yield Case(f"looking: {name}, {place} is {what}", run, seconds=30.0)
