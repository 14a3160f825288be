"""The commands that write files, as many cases call them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from tests.reliability.places import command, dialogues_file, glm_folder, trained


def state(path: Path) -> tuple[Any, ...] | None:
    """What a name leads to, without opening a pipe or a device."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    text = path.read_bytes() if stat.S_ISREG(found.st_mode) else b""
    return found.st_ino, found.st_mode, text


def refused(code: int, said: str, *words: str, codes: tuple[int, ...] = (2,)) -> None:
    assert "Traceback" not in said, said[-1500:]
    assert code in codes, (code, said[-800:])
    for word in words:
        assert word in said, (word, said[-800:])


EVALUATION = ("evaluation.json", "scores.json", "predictions.jsonl", "manifest.json", "predictions/glm.jsonl")  # fmt: skip
RUN = (".lock", "config.yaml", "data.json", "metrics.jsonl", "best.json")


def ask(folder: Path, count: int = 3) -> Path:
    """A file of questions."""
    path = folder / "ask.jsonl"
    path.write_text("".join(f'{{"prompt": "the quick {n}"}}\n' for n in range(count)))
    return path


def predict(data: Path | str, output: Path, *more: object) -> tuple[int, str]:
    return command("predict", glm_folder(), "--data", data, "--output", output,
                   "--max-new-tokens", 2, "--batch-size", 1, *more)  # fmt: skip


def evaluate(output: Path, *more: object) -> tuple[int, str]:
    return command("evaluate", glm_folder(), "--data", dialogues_file(), "--output", output,
                   "--max-new-tokens", 2, "--max-samples", 4, *more)  # fmt: skip


def config(folder: Path, **changes: Any) -> Path:
    settings = json.loads(trained("lora").with_suffix(".yaml").read_text())
    settings["training"]["output_dir"] = str(folder / "run")
    for key, value in changes.items():
        section, _, name = key.partition("__")
        settings.setdefault(section, {})[name] = value
    path = folder / "x.yaml"
    path.write_text(json.dumps(settings))
    return path


def write(writer: str, folder: Path, *more: str) -> tuple[int, str]:
    if writer == "predict":
        return predict(ask(folder), folder / "out.jsonl", *more)
    if writer == "evaluate":
        return evaluate(folder / "eval", *more)
    return command("train", config(folder))


PLACES = {
    "predict": ("out.jsonl",),
    "evaluate": tuple(f"eval/{name}" for name in EVALUATION),
    "train": tuple(f"run/{name}" for name in RUN),
}
