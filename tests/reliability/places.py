"""What many cases share: the light process, folders with a tokenizer or a model, a config."""

from __future__ import annotations

import contextlib
import io
import json
import os
import traceback
from functools import cache
from pathlib import Path
from typing import Any

from tests.reliability.frame import in_fork
from tests.reliability.light import Light
from tests.reliability.tiny_runs import mutate

_FOLDERS: list[Path] = []


def prepare(folder: Path) -> None:
    """Begin a suite: `folder` is where what its cases share is put. Call it before the cases fork."""
    _FOLDERS[:] = [folder]
    os.environ["FINETUNE_CACHE"] = str(folder / "cache")
    light()
    mutate()


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


def command(*words: object) -> tuple[int, str]:
    """Exit code of a command in this process, and all that it said; a traceback ends with 1."""
    from finetune.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc(file=said)
            code = 1
    return code, said.getvalue()


def trained(name: str, **changes: Any) -> Path:
    """A run of two steps with a checkpoint after each, made once in a fork of its own."""
    import runs

    run_dir = shared(f"runs/{name}")
    if not run_dir.exists():
        settings = runs.config(
            glm_folder(), dialogues_file(), run_dir, training__max_steps=2,
            training__save_every_steps=1, **{k: v for k, v in changes.items() if "__" in k},
        )  # fmt: skip
        settings |= {key: value for key, value in changes.items() if "__" not in key}
        shared("runs").mkdir(exist_ok=True)
        shared(f"runs/{name}.yaml").write_text(json.dumps(settings))
        problem = in_fork(lambda _: str(command("train", shared(f"runs/{name}.yaml"))), seconds=200)
        assert problem.startswith("(0, "), problem
    return run_dir


@cache
def glm_folder() -> Path:
    """A tiny glm checkpoint, with everything imported that its runs need."""
    import cells
    import tiny

    folder = tiny.save_model(shared("glm"), "glm")
    cells.warm_up(folder)
    return folder


@cache
def dialogues_file() -> Path:
    """A dozen dialogues."""
    import runs

    return runs.write_dialogues(shared("train.jsonl"), 12)
