"""Files of folders that others made: opened only where they are plain files of that folder."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from finetune.errors import ModelError

LARGEST_JSON = 256 << 20
"""Bytes; a tokenizer.json or an index of a large model has a tenth of it."""


def check_plain(path: Path, *, largest: int | None = None) -> None:
    """Refuse a file that is a device, a pipe or a socket, or a link that leads out of its folder.

    One that is read whole is refused above `largest` bytes, too.

    The hub's cache is made of links: `snapshots/REVISION/NAME` to `blobs/HASH` of the same model.

    Raises:
        ModelError: `path` is no plain file of its folder. A file that is not there is no problem.
    """
    try:
        kind, size = path.stat().st_mode, path.stat().st_size
        folder, target = path.parent.resolve(), path.resolve()
    except FileNotFoundError:
        if path.is_symlink():
            raise ModelError(
                f"{path} is a link to what is not there; copy the file again"
            ) from None
        return
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        raise ModelError(
            f"{path} cannot be read ({error}); check the path and its permissions"
        ) from error
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise ModelError(f"{path} is not a plain file (a device, a pipe or a socket); remove it")
    if largest is not None and size > largest:
        raise ModelError(f"{path} is larger than {largest >> 20} MiB; copy it again")
    if not path.is_symlink() or target.is_relative_to(folder):
        return
    if folder.parent.name == "snapshots" and target.is_relative_to(folder.parent.parent / "blobs"):
        return
    raise ModelError(f"{path} is a link that leads out of its folder; copy the file in its place")


def check_folder(folder: Path) -> None:
    """Refuse a folder that libraries are to open when one of its files is not plain.

    Raises:
        ModelError: see `check_plain`.
    """
    try:
        names = sorted(folder.iterdir())
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    for path in names:
        if path.is_symlink() or not path.is_dir():
            check_plain(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model, an adapter or a checkpoint.

    Raises:
        ModelError: There is no such file, or it holds something else.
    """
    check_plain(path, largest=LARGEST_JSON)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}; copy the whole folder again") from None
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged (it holds no object); copy it again")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is no file."""
    return read_json(path) if path.is_file() or path.is_symlink() else {}
