"""Paths in a configuration, in data and on the command line that lead nowhere, outside, or to what is no file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from row_files import GOOD

from tests.reliability.frame import Case
from tests.reliability.input_images import _row, _seeing_folder
from tests.reliability.places import light, write_config

LONG = "x" * 300


def _tree(folder: Path) -> None:
    """What the paths below meet."""
    (folder / "train.jsonl").write_text(GOOD)
    (folder / "empty").mkdir()
    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipe.jsonl")
    os.mkfifo(folder / "pipes/a.jsonl")
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nowhere.jsonl")


# Option -> paths of it, each with what is said; every option is a key of the YAML file.
TRAIN: dict[str, str] = {
    "": "'' is not a path",
    "a\0b": "holds a NUL",
    "https://example.org/a.jsonl": "is a URL; download the file",
    "s3://bucket/a.jsonl": "is a URL",
    "file:///etc/passwd": "is a URL",
    "../../nowhere/train.jsonl": "does not exist",
    "/nowhere/train.jsonl": "does not exist",
    "trian.jsonl": "did you mean train.jsonl?",
    "*.parquet": "no file matches",
    "empty": "holds no",
    "pipes": "is not a regular file",
    "pipe.jsonl": "neither a regular file nor a folder",
    "/dev/zero": "neither a regular file nor a folder",
    "loop": "is a link to nowhere",
    "gone": "is a link to nowhere",
    LONG: "cannot be opened",
    "train.jsonl/x": "does not exist",
    "~/train.jsonl": "does not exist",
    "$HOME/train.jsonl": "does not exist",
}
MODEL = {
    "./nowhere": "not a directory",
    "/nowhere/model": "not a directory",
    "./train.jsonl": "not a directory",
    "/dev/null": "not a directory",
    "./" + LONG: "not a directory",
    "./a\0b": "holds a NUL",
    "": "must not be empty",
}
OUTPUT = {
    "train.jsonl": "cannot be used as a run directory",
    "train.jsonl/run": "cannot be used as a run directory",
    "/proc/run": "cannot be used as a run directory",
    LONG: "cannot be used as a run directory",
    "a\0b": "holds a NUL",
    "": "must not be empty",
}
IMAGES = {
    "../outside.png": "is outside",
    "/etc/hostname": "is outside",
    "inner/../../outside.png": "is outside",
    "https://example.org/x.png": "is a URL; only files and data URLs are opened",
    "file:///etc/passwd": "is a URL; only files and data URLs are opened",
    "data:image/png;base64,AAAA": "image",
    "pipe.jsonl": "it is not a file",
    "/dev/zero": "is outside",
    "loop": "there is no such file",
    LONG: "File name too long",
    "": "image is neither a path nor",
}


def _shown(path: str) -> str:
    return f"{path[:20]}…" if len(path) > 60 else path.replace("\0", "NUL") or "nothing"


def option(key: str, path: str, said: str, folder: Path) -> None:
    """The option is named with its line, what it says, and the reason."""
    _tree(folder)
    write_config(folder, **{"train": "train.jsonl", key: path})
    outcome = light().run("train", "x.yaml", cwd=folder)
    outcome.refused(key.replace("__", "."), said)
    if key != "training__output_dir":
        assert f"x.yaml:{2 if key == 'model__path' else 4}: " in outcome.err, outcome.err


def image(path: str, said: str, folder: Path) -> None:
    """The row is named with its line, the path and the reason; nothing outside is opened."""
    home = folder / "home"
    home.mkdir()
    _tree(home)
    Image.new("RGB", (2, 2)).save(folder / "outside.png")
    (home / "rows.jsonl").write_text(_row(path))
    write_config(home, "rows.jsonl", model__path=str(_seeing_folder()))
    light().run("train", "x.yaml", cwd=home).refused("rows.jsonl:1: ", said)


def every_path_at_once(folder: Path) -> None:
    """Model, data, validation and DeepSpeed file in one message."""
    changes = {"data__validation": ["b.jsonl", "c.jsonl"], "deepspeed__config": "ds.json"}
    write_config(folder, "a.jsonl", model__path="./nowhere", **changes)
    said = (
        "x.yaml:2: model.path: not a directory, and not a hub id like org/name: ./nowhere",
        "x.yaml:4: data.train: a.jsonl does not exist",
        "x.yaml:5: data.validation[0]: b.jsonl does not exist",
        "x.yaml:5: data.validation[1]: c.jsonl does not exist",
        "deepspeed.config: ds.json is not a file",
    )
    light().run("train", "x.yaml", cwd=folder).refused(*said)


def _config_file(path: str, said: str, folder: Path) -> None:
    _tree(folder)
    os.mkfifo(folder / "pipe.yaml")
    (folder / "folder.yaml").mkdir()
    write_config(folder, "train.jsonl")
    light().run("train", path, cwd=folder).refused(said)


CONFIG_FILE = {
    "y.yaml": "no such file",
    "pipe.yaml": "is not a regular file",
    "folder.yaml": "is a folder",
    "/dev/zero.yaml": "no such file",
    f"{LONG}.yaml": "no such file",
    "a\0b.yaml": "embedded null byte",
}


def benign(name: str, folder: Path) -> None:
    """A file of an odd name, a link, a link to a folder: read like any other."""
    target = folder / "elsewhere"
    target.mkdir()
    (target / "rows.jsonl").write_text(GOOD)
    path = folder / name
    if name.startswith("link"):
        path.symlink_to(target if name.endswith("folder") else target / "rows.jsonl")
    else:
        path.write_text(GOOD)
    seen = light().run("data", "check", "--json", path, cwd=folder)
    assert seen.code == 0, seen.err
    report: dict[str, Any] = json.loads(seen.out)
    assert (report["num_bad"], report["sources"][0]["dialogues"]) == (0, 1)
    seen.cheap()


BENIGN = (
    "with space.jsonl", "中文.jsonl", "qu'o\"te.jsonl", "$(x);y.jsonl", "-flag.jsonl", "new\nline.jsonl",
    "odd[1].jsonl", "%s{0}.jsonl", "é" * 120 + ".jsonl", "link to a file.jsonl", "link to a folder",
)  # fmt: skip


def cases() -> Iterator[Case]:
    """Every path."""
    _seeing_folder()
    tables = {"data__train": TRAIN, "model__path": MODEL, "training__output_dir": OUTPUT}
    for key, table in tables.items():
        for path, said in table.items():
            name = f"paths: {key.replace('__', '.')} {_shown(path)}"
            yield Case(name, partial(option, key, path, said))
    for path, said in IMAGES.items():
        yield Case(f"paths: image {_shown(path)}", partial(image, path, said))
    for path, said in CONFIG_FILE.items():
        yield Case(f"paths: configuration {_shown(path)}", partial(_config_file, path, said))
    for name in BENIGN:
        yield Case(f"paths: benign {_shown(name)!r}", partial(benign, name))
    yield Case("paths: all that lead nowhere at once", every_path_at_once)
