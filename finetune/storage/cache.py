"""Tokenised data between runs: whole entries under the hash of what made them, or nothing.

An entry is the folder `<root>/<key>/` with the builder's files and, written last, `manifest.json`
with their sizes and SHA-256. It is built in a hidden folder beside it, fsynced and renamed, so a
crash leaves no entry; an entry that no longer matches its manifest is built again. One process
builds, the others wait on a file lock: no torch.distributed is needed, and a killed holder frees it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import console
from finetune.errors import DataError

MANIFEST = "manifest.json"
_POLL_SECONDS = 0.05
_QUIET_SECONDS = 1.0
"""How long a lock is waited for before the wait is mentioned."""
_RANK_0_HEAD_START_SECONDS = 60.0
"""How long the other ranks of a machine leave the work, and with it the progress shown, to the first."""


@dataclass(frozen=True)
class Entry:
    """A whole, verified entry; `facts` is what its builder returned."""

    folder: Path
    facts: Mapping[str, Any]


def default_root() -> Path:
    """`$FINETUNE_CACHE`, else `~/.cache/glm4-finetune`."""
    configured = os.environ.get("FINETUNE_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "glm4-finetune"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces (about 1 GB/s)."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def key_of(parts: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of everything that decides what an entry holds."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def open_or_build(root: Path, key: str, build: Callable[[Path], Mapping[str, Any]]) -> Entry:
    """The entry of `key`, built by `build(staging folder)` when it is absent or damaged.

    `build` writes its files flat into the folder and returns JSON-able facts for the manifest.
    """
    folder = root / key
    if not _damage(folder):
        return _read(folder)
    _leave_to_the_first_rank(folder, _lock_path(root, key))
    with _locked(_lock_path(root, key), f"tokenised data {folder}"):
        damage = _damage(folder)
        if not damage:  # built by another process while this one waited
            return _read(folder)
        if folder.exists():
            console.warn(f"tokenised data {folder} is damaged ({damage}); preparing it again")
            shutil.rmtree(folder)
        _build(root, key, build)
    return _read(folder)


def _build(root: Path, key: str, build: Callable[[Path], Mapping[str, Any]]) -> None:
    for leftover in root.glob(f".{key}.*"):  # of a killed builder: the lock is ours
        shutil.rmtree(leftover)
    staging = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=root))
    try:
        facts = build(staging)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(staging.iterdir())
        }
        manifest = staging / MANIFEST
        manifest.write_text(
            json.dumps({"files": files, "facts": facts}, ensure_ascii=False, indent=1),
            encoding="utf-8",
        )
        for path in [*staging.iterdir(), staging]:
            _fsync(path)
        staging.rename(root / key)
        _fsync(root)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{root}: no space left for tokenised data; make room, or set data.cache_dir or "
                "FINETUNE_CACHE to a folder on another disk"
            ) from error
        raise


def _damage(folder: Path) -> str:
    """Why the entry cannot be used; empty when it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
        for name, stated in files:
            if (size := (folder / name).stat().st_size) != stated["bytes"]:
                return f"{name} has {size} bytes, {stated['bytes']} were written"
        for name, stated in files:
            if file_digest(folder / name) != stated["sha256"]:
                return f"the content of {name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    return ""


def _read(folder: Path) -> Entry:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return Entry(folder, manifest["facts"])


def _lock_path(root: Path, key: str) -> Path:
    return root / f"{key}.lock"


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Holds an exclusive lock on `path`; says so once when it has to wait for it."""
    handle = _open_lock(path)
    try:
        started, said = time.monotonic(), False
        while not _try_lock(handle, fcntl.LOCK_EX, path):
            if not said and time.monotonic() - started > _QUIET_SECONDS:
                console.say(f"waiting for another process that is preparing {what}")
                said = True
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(handle)


def _leave_to_the_first_rank(folder: Path, lock: Path) -> None:
    """On ranks but the first of a machine: returns when the work is begun, done, or nobody came."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        return
    handle = _open_lock(lock)
    try:
        deadline = time.monotonic() + _RANK_0_HEAD_START_SECONDS
        before = _identity(folder)  # of a damaged entry, which the first rank replaces
        while time.monotonic() < deadline and _identity(folder) == before:
            if not _try_lock(handle, fcntl.LOCK_SH, lock):
                return
            fcntl.flock(handle, fcntl.LOCK_UN)
            time.sleep(_POLL_SECONDS)
    finally:
        os.close(handle)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Another value once the folder is another one; None while there is none."""
    try:
        stat = folder.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _open_lock(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DataError(
            f"{path.parent}: cannot keep tokenised data here ({error.strerror}); "
            "set data.cache_dir or FINETUNE_CACHE to a folder that you can write to"
        ) from error


def _try_lock(handle: int, kind: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise DataError(
            f"{path}: this file system has no file locks ({error.strerror}); "
            "set data.cache_dir or FINETUNE_CACHE to a folder on another one"
        ) from error
    return True


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
