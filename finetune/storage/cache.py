"""Tokenised data between runs: whole entries under the hash of what made them, or nothing.

An entry is the sealed folder `<root>/<key>/` with the builder's files; one that no longer matches its
manifest is built again. One process builds, the others wait on a lock: no torch.distributed is needed,
and a killed holder frees it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import console, launcher
from finetune.errors import DataError, SpaceError
from finetune.storage import folders
from finetune.storage.lock import is_held, locked
from finetune.storage.manifest import recorded, seal, verify

_POLL_SECONDS = 0.05
_RANK_0_HEAD_START_SECONDS = 60.0
"""How long the other ranks of a machine leave the work, and with it the progress shown, to the first."""


@dataclass(frozen=True)
class Entry:
    """A whole, verified entry; `facts` is what its builder returned."""

    folder: Path
    facts: Mapping[str, Any]


def default_root() -> Path:
    """`$FINETUNE_CACHE`, else `~/.cache/glm4-finetune`, else a private folder for temporary files.

    The last one serves a user without a home, such as one that a container was told by number only.
    """
    if configured := os.environ.get("FINETUNE_CACHE"):
        return Path(configured)
    try:
        usual = Path.home() / ".cache" / "glm4-finetune"
    except RuntimeError:  # neither HOME nor an entry in the user database
        return private_folder("there is no home folder")
    if not _can_be_made(usual):
        return private_folder(f"{usual} cannot be written")
    return usual


def key_of(parts: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of everything that decides what an entry holds."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def known(root: Path, key: str) -> Entry | None:
    """The entry of `key` if it is there and whole."""
    folder = root / key
    if not folder.is_dir() or verify(folder):
        return None
    return Entry(folder, recorded(folder).facts)


def open_or_build(root: Path, key: str, build: Callable[[Path], Mapping[str, Any]]) -> Entry:
    """The entry of `key`, built by `build(staging folder)` when it is absent or damaged.

    `build` writes its files into the folder and returns JSON-able facts for the manifest.
    """
    folder, lock = root / key, root / f"{key}.lock"
    if not folder.is_dir() or verify(folder):
        with _explained(root):
            root.mkdir(parents=True, exist_ok=True)
        _wait_for_first_rank(folder, lock)
        with ExitStack() as held:
            with _explained(root):
                waiting = f"waiting for another process that is preparing tokenised data {folder}"
                held.enter_context(locked(lock, waiting))
            _build_missing(folder, build)
    return Entry(folder, recorded(folder).facts)


def _build_missing(folder: Path, build: Callable[[Path], Mapping[str, Any]]) -> None:
    if folder.is_dir():
        problems = verify(folder)
        if not problems:  # built by another process while this one waited
            return
        console.warn(
            f"tokenised data {folder} is damaged ({'; '.join(problems)}); preparing it again"
        )
        shutil.rmtree(folder)
    folders.sweep(folder.parent)
    try:
        with folders.staged(folder) as stage:
            facts = build(stage)
            seal(stage, facts=facts)
    except SpaceError as error:
        raise DataError(
            f"{folder.parent}: no space left for tokenised data ({error.__cause__}); make room, or set "
            "data.cache_dir or FINETUNE_CACHE to a folder on another disk"
        ) from error


@contextmanager
def _explained(root: Path) -> Iterator[None]:
    """DataError naming the option for a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{root}: cannot keep tokenised data here ({error.strerror}); "
            "set data.cache_dir or FINETUNE_CACHE to a folder that you can write to"
        ) from error


def _wait_for_first_rank(folder: Path, lock: Path) -> None:
    """On the other ranks of a machine: until the first one builds or has built, a minute at most."""
    if launcher.local_rank() == 0:
        return
    deadline = time.monotonic() + _RANK_0_HEAD_START_SECONDS
    before = _identity(folder)  # of a damaged entry, which the first rank replaces
    while time.monotonic() < deadline and _identity(folder) == before and not is_held(lock):
        time.sleep(_POLL_SECONDS)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Another value once the folder is another one; None while there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _can_be_made(folder: Path) -> bool:
    """Whether a folder is there and can be written, or can be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def private_folder(reason: str) -> Path:
    """A folder of this user for temporary files; DataError when somebody else could write there."""
    owner = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"glm4-finetune-{owner}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise DataError(
            f"there is no folder for the cache ({reason}, {folder}: {error.strerror}); "
            "set FINETUNE_CACHE to one that you can write to"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or found.st_mode & 0o022:
        raise DataError(
            f"there is no folder for the cache ({reason}, and others may write to {folder}); "
            "set FINETUNE_CACHE to one of your own"
        )
    console.warn_once(f"{reason}: the cache is kept in {folder}; FINETUNE_CACHE names another")
    return folder
