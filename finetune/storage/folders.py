"""Folders that are whole or absent, verified before use.

A folder is built beside its final place as ``.staging-NAME``: every file hashed and fsynced, then
``manifest.json`` (size and SHA-256 of each file), then one rename that makes it visible. Whoever opens it
later can tell a whole folder from a torn one. No torch here.

    runs/lora/
        config.yaml  best.json
        checkpoint-500/     manifest.json and whatever the trainer wrote
        .staging-NAME       a save that did not finish; removed at the next start
        .replaced-NAME      the old folder while a new one of the same name takes its place
        .trash-NAME         a deletion that did not finish; removed at the next start
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.console import NO_SPACE
from finetune.errors import CheckpointError, SpaceError
from finetune.storage.manifest import MANIFEST as MANIFEST
from finetune.storage.manifest import fsync_folder, recorded_files, walk
from finetune.storage.manifest import seal as seal
from finetune.storage.manifest import verify as verify

STAGING, REPLACED, TRASH = ".staging-", ".replaced-", ".trash-"

FINE, NO_ROOM, FAILED = 0, 1, 2
"""How a process fared in a part of a save; the worst of all processes counts."""

# How safetensors (Rust) and torch.save (C++) word a full disk; neither raises OSError.
_NO_SPACE_TEXT = re.compile(
    r"os error (28|122|27)\b|No space left|File too large|quota exceeded"
    r"|PytorchStreamWriter failed|unexpected pos|iostream error",
    re.IGNORECASE,
)


@contextmanager
def staged(
    final: Path,
    *,
    leader: bool = True,
    worst: Callable[[int], int] = int,
    replace: bool = False,
) -> Iterator[Path]:
    """The staging folder of ``final``: committed when the block ends, removed when it fails.

    With several processes each enters the block; ``leader`` is true in one of them, and
    ``worst(outcome)`` waits for all and gives the largest outcome: a save fails everywhere or
    nowhere, and for want of space everywhere alike.
    ``replace`` allows a folder of that name to be there already.
    """
    stage, lock = stage_path(final), -1
    try:
        with together(worst, final):
            if leader:
                lock = open_stage(final, replace=replace)
        with together(worst, final):
            if not stage.is_dir():
                raise CheckpointError(
                    f"{stage} was made by process 0 and this process cannot see it; "
                    "put training.output_dir on storage that every machine of the run shares"
                )
            yield stage
        with together(worst, final):
            if leader:
                commit(stage, final, replace=replace)
    except BaseException as error:
        reason = _space_error(error, final, stage)
        if lock >= 0:
            # What cannot be removed now is removed at the next start.
            with suppress(OSError):
                shutil.rmtree(stage, ignore_errors=True)
        if reason is not None:
            raise reason from error
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def stage_path(final: Path) -> Path:
    """Where ``final`` is built: beside it, so that one rename can put it in place."""
    return final.parent / f"{STAGING}{final.name}"


def open_stage(final: Path, *, replace: bool = False) -> int:
    """An empty staging folder for ``final``, locked; returns the lock's file descriptor."""
    if os.path.lexists(final) and not replace:
        raise CheckpointError(f"{final} exists already; choose another place or remove it first")
    stage = stage_path(final)
    stage.mkdir(exist_ok=True)
    lock = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for entry in list(stage.iterdir()):
            _remove(entry)
    except BlockingIOError:
        os.close(lock)
        raise CheckpointError(f"another process is writing {final} at this moment") from None
    except BaseException:
        os.close(lock)
        raise
    return lock


def commit(stage: Path, final: Path, *, replace: bool = False) -> None:
    """Make ``stage`` whole (fsync, manifest last) and visible as ``final`` by one rename.

    A writer that knows the hashes of its files may have sealed it already.
    A folder of that name is set aside first and removed afterwards; a crash between the two
    renames is undone by ``clean``.
    """
    if not (stage / MANIFEST).exists():
        seal(stage)
    aside = final.parent / f"{REPLACED}{final.name}"
    if os.path.lexists(final):
        if not replace:
            raise CheckpointError(f"{final} exists already; choose another place")
        final.rename(aside)
    stage.rename(final)
    fsync_folder(final.parent)
    if os.path.lexists(aside):
        delete(aside)


def amend(folder: Path, name: str, text: str) -> None:
    """The checkpoint ``folder``, which verifies, with another text in its file ``name``.

    Whole at every moment. The other files are linked, not copied and hashed again: they may be
    hundreds of gigabytes. Only one process may call it.
    """
    known = {file: entry for file, entry in recorded_files(folder).items() if file != name}
    with staged(folder, replace=True) as stage:
        for file in list(known):
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(folder / file, stage / file)
            except OSError:  # a filesystem without links
                shutil.copyfile(folder / file, stage / file)
                del known[file]
        (stage / name).write_text(text, encoding="utf-8")
        seal(stage, known)


def write_file(path: Path, text: str) -> None:
    """``path`` with ``text``, whole or as it was before, even through a crash."""
    temporary = path.parent / f"{STAGING}{path.name}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def delete(folder: Path) -> None:
    """Remove ``folder``: out of sight by one rename first, so that no half of it can be opened."""
    trash = folder.parent / f"{TRASH}{folder.name}"
    _remove(trash)
    folder.rename(trash)
    fsync_folder(folder.parent)
    _remove(trash)


def clean(run_dir: Path) -> list[str]:
    """Remove what crashes left behind, put back what was set aside; says what was done."""
    done = []
    for path in sorted(run_dir.iterdir()):
        if path.name.startswith(REPLACED):
            final = run_dir / path.name[len(REPLACED) :]
            if os.path.lexists(final):
                _remove(path)
            else:
                path.rename(final)
                done.append(f"put back {final.name}: its replacement was not finished")
        elif path.name.startswith((STAGING, TRASH)) and not _held(path):
            _remove(path)
            done.append(f"removed {path.name}: left over from an interrupted save or deletion")
    fsync_folder(run_dir)
    return done


def _held(path: Path) -> bool:
    """Whether a live process builds this staging folder, such as a merge into the run directory."""
    if path.is_symlink() or not path.is_dir():
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def together(worst: Callable[[int], int], final: Path) -> Iterator[None]:
    """Leave a part of the writing of ``final`` by an exception in every process, or in none.

    A part must not hold collective operations that a failing process would skip.
    """
    try:
        yield
    except BaseException as error:
        worst(NO_ROOM if is_out_of_space(error) else FAILED)
        raise
    if (outcome := worst(FINE)) != FINE:
        kind, what = (SpaceError, "no room") if outcome == NO_ROOM else (CheckpointError, "unable")
        echo = kind(f"{what} to write {final} in another process; earlier ones are untouched")
        echo.is_echo = True
        raise echo


def _space_error(error: BaseException, final: Path, stage: Path) -> SpaceError | None:
    """``error`` as a message about disk space, if that is what it is."""
    if isinstance(error, CheckpointError) or not is_out_of_space(error):
        return None
    with suppress(OSError):
        written = sum((stage / name).stat().st_size for name in walk(stage)[0])
        older = [
            p.parent for p in final.parent.glob(f"*/{MANIFEST}") if p.parent not in (final, stage)
        ]
        newest = max(older, key=lambda folder: folder.stat().st_mtime, default=None)
        needed = sum((newest / n).stat().st_size for n in walk(newest)[0]) if newest else 0
        free = shutil.disk_usage(final.parent).free
        return SpaceError(
            f"no room to write {final}: {written / 1e6:.1f} MB were written, {free / 1e6:.1f} MB are free "
            f"with them{f', and the checkpoint before took {needed / 1e6:.1f} MB' if needed else ''}. "
            "Earlier checkpoints are untouched. Free some space, lower training.keep_checkpoints, "
            "or choose another training.output_dir"
        )
    return SpaceError(f"no room to write {final}; earlier checkpoints are untouched")


def is_out_of_space(error: BaseException | None) -> bool:
    """Whether the disk, a quota or a limit on file sizes is behind `error`."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if not isinstance(error, OSError) and _NO_SPACE_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
