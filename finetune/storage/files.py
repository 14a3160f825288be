"""Single files that are whole or absent, durable once they have their name.

A file is written under a temporary name beside its place, `.staging-NAME.RANDOM`, which its writer
keeps locked: what a killed writer left behind is told by a lock that nobody holds, and swept away.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from finetune import console
from finetune.errors import ConfigError
from finetune.storage.lock import is_held, try_lock

STAGING = ".staging-"
_LONGEST_NAME = 200  # bytes; file systems end at 255, and the temporary name is longer
# `.NAME.PID.part` and `tmpRANDOM` are what earlier versions wrote.
_OLD_STAGING = re.compile(r"\..+\.\d+\.part")
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


_moved = 0


def moved(size: int = 0) -> int:
    """Bytes of checkpoints that this process has hashed so far, `size` more: its disk is at work."""
    global _moved
    _moved += size
    return _moved


def json_line(value: Any) -> str:
    """One line of a JSONL file."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces (about 1 GB/s)."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def kind_of(path: Path) -> str:
    """`a link`, `a device` and so on; empty for a regular file and for a free name."""
    try:
        mode = stat.S_IFMT(path.lstat().st_mode)
    except FileNotFoundError:
        return ""
    return "" if mode == stat.S_IFREG else _KINDS.get(mode, "no regular file")


def refuse_odd(path: Path, *, inside: Path | None = None) -> None:
    """ConfigError when `path` is anything but a regular file or a free name.

    A rename would put a file in the place of a device, a pipe or a link. A file or a link to nowhere
    where a folder of the path should be is named, too, and any link on the way from the folder `inside`.
    """
    for folder in reversed(path.parents):
        if inside is not None and inside in folder.parents and folder.is_symlink():
            raise ConfigError(
                f"{folder} is a link to {folder.readlink()}, and {path} would be written through it; "
                "remove the link"
            )
        if os.path.lexists(folder) and not folder.is_dir():
            raise ConfigError(
                f"{folder} is {kind_of(folder) or 'a file'} and no folder, so {path} cannot be "
                "written; choose another name"
            )
    if kind := kind_of(path):
        leads = f" to {path.readlink()}; name the file itself" if kind == "a link" else ""
        raise ConfigError(
            f"{path} is {kind}{leads}; an output must be a regular file or a new name"
        )


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what the block writes there becomes `path`, synced, at its end.

    For libraries that write to a path. Raises ConfigError when `path` is a link, a device or the like.
    """
    refuse_odd(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, lock = _new_part(path)
    try:
        yield part
        _sync(part)
        part.replace(path)
        fsync_folder(path.parent)
    finally:
        with suppress(OSError):  # what cannot be removed now is swept at the next start
            part.unlink()
        lock.release()


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file that takes its name only once all of it is written and synced."""
    with staged_file(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        yield file


@contextmanager
def whole_binary(path: Path) -> Iterator[BinaryIO]:
    """The same for bytes."""
    with staged_file(path) as part, part.open("wb") as file:
        yield file


def second_name(file: Path, name: Path) -> bool:
    """Give a file another name, under which it stays when the first one goes.

    False where the disk cannot; FileNotFoundError when the file has gone.
    """
    name.unlink(missing_ok=True)
    try:
        os.link(file, name)
    except FileNotFoundError:
        raise
    except OSError:
        return False
    return True


def write_file(path: Path, text: str) -> None:
    """`path` with `text`, whole or as it was before, even through a crash."""
    with whole_file(path) as file:
        file.write(text)


def sweep(folder: Path, name: str = "") -> list[str]:
    """Removes temporary files that no live process writes, of a file `name` or of all; their names."""
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_ours = path.name.startswith(f"{STAGING}{name}") or (
            not name and _OLD_STAGING.fullmatch(path.name)
        )
        if not is_ours or path.is_symlink() or not path.is_file():
            continue
        with suppress(OSError):  # of another user, or gone meanwhile
            if not is_held(path):
                path.unlink()
                removed.append(path.name)
    return removed


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut, where the file system can.

    Some network and FUSE file systems cannot sync a folder; that is said once.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        console.warn_once(
            f"{folder}: this file system cannot force names to the disk ({error.strerror}); a power "
            "cut may undo the last save"
        )
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new_part(path: Path) -> tuple[Path, Any]:
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    while True:
        part = path.with_name(f"{STAGING}{name}.{secrets.token_hex(4)}")
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        # A sweep that came between takes the file away: then another name is tried.
        if (lock := try_lock(part, make=False)) is not None:
            return part, lock
