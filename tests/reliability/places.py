"""What many cases share: the light process, folders with a tokenizer or a model, a config."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from tests.reliability.light import Light

_FOLDERS: list[Path] = []


def prepare(folder: Path) -> None:
    """Begin a suite: `folder` is where what its cases share is put. Call it before the cases fork."""
    _FOLDERS[:] = [folder]
    os.environ["FINETUNE_CACHE"] = str(folder / "cache")
    light()


def shared(name: str) -> Path:
    """A place in the suite's folder."""
    return _FOLDERS[0] / name


@cache
def light() -> Light:
    """One for all cases of a suite; it ends with the suite's process."""
    return Light()


@cache
def tokenizer_folder() -> Path:
    """A checkpoint folder without weights: enough for everything that happens before torch."""
    import tiny

    tiny.save_tokenizer(shared("tokenizer"))
    return shared("tokenizer")


@cache
def model_folder() -> Path:
    """A tiny chatglm checkpoint."""
    import tiny

    return tiny.save_model(shared("model"), "chatglm")


def config(train: str | Path, **changes: Any) -> dict[str, Any]:
    """A complete configuration; `changes` are `section__key=value`."""
    sections: dict[str, Any] = {
        "model": {"path": str(tokenizer_folder())},
        "data": {"train": str(train)},
        "method": {"kind": "lora"},
        "training": {"output_dir": "run", "max_steps": 1, "report_to": []},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    return sections


def write_config(folder: Path, train: str | Path, **changes: Any) -> Path:
    """`config` as x.yaml in `folder`, one line a key."""
    path = folder / "x.yaml"
    lines = []
    for section, values in config(train, **changes).items():
        lines.append(f"{section}:")
        lines += [f"  {key}: {json.dumps(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
