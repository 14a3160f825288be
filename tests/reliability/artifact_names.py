"""Names that a shell, a format string or a careless join would trip over: they are only names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.reliability.frame import Case
from tests.reliability.places import command, dialogues_file, glm_folder

NAMES = {
    "unicode": "模型 é 😀",
    "spaces": " a  b ",
    "quotes": 'it\'s "so"',
    "a command": ";$(touch LEFT)`touch LEFT`|touch LEFT",
    "200 characters": "x" * 200,
    "a line break": "a\nb",
    "a format": "%s{0}{name}%(x)d",
    "dashes": "--output",
    "brackets": "a[1]*?",
    "a backslash": "a\\b",
    "a hidden one": ".run",
    "a staging folder's": "staging-checkpoint-1",
}


def works(name: str, folder: Path) -> None:
    """Data, model, run, prediction and merged model all bear the name; the run also goes on."""
    import os
    import shutil

    import runs

    home = folder / name
    home.mkdir()
    os.chdir(folder)
    model = Path(shutil.copytree(glm_folder(), home / f"model {name}"))
    data = Path(shutil.copy(dialogues_file(), home / f"{name}.jsonl"))
    for steps in (1, 2):
        settings = runs.config(model, data, home / f"run {name}", training__max_steps=steps)
        (folder / "x.yaml").write_text(json.dumps(settings))
        ended, said = command("train", folder / "x.yaml")
        assert ended == 0, said[-1500:]
    run = home / f"run {name}"
    assert (run / "checkpoint-2/manifest.json").is_file()
    out = home / f"merged {name}"
    ended, said = command("merge", run, "--output", out, "--no-check")
    assert ended == 0, said[-1500:]
    ask = home / f"ask {name}.jsonl"
    ask.write_text('{"prompt": "the quick"}\n')
    replies = home / f"replies {name}.jsonl"
    words = ("--data", ask, "--output", replies, "--max-new-tokens", 1)
    ended, said = command("predict", out, *words)
    assert ended == 0, said[-1500:]
    assert replies.is_file()
    assert not (folder / "LEFT").exists()
    assert sorted(path.name for path in folder.iterdir()) == sorted([name, "x.yaml"])


def cases() -> Iterator[Case]:
    """Every name."""
    glm_folder()
    dialogues_file()
    for what, name in NAMES.items():
        yield Case(f"names: {what}", partial(works, name))
