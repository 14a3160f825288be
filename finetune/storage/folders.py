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

import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType

from finetune.errors import CheckpointError, ConfigError, OutputInUseError, SpaceError
from finetune.storage import files
from finetune.storage.disk import is_disk_error, is_out_of_space
from finetune.storage.files import STAGING, file_digest, fsync_folder, refuse_odd
from finetune.storage.lock import Lock, is_held, try_lock
from finetune.storage.manifest import MANIFEST as MANIFEST
from finetune.storage.manifest import Files as Files
from finetune.storage.manifest import noted_files, recorded, walk
from finetune.storage.manifest import seal as seal
from finetune.storage.manifest import verify as verify

REPLACED, TRASH, READY = ".replaced-", ".trash-", ".ready-files"

FINE, NO_ROOM, FAILED = 0, 1, 2
"""How a process fared in a part of a save; the worst of all processes counts."""


@contextmanager
def staged(
    final: Path,
    *,
    is_rank0: bool = True,
    reduce_max: Callable[[int], int] = int,
    replace: bool = False,
    known: Files | None = None,
) -> Iterator[Path]:
    """The staging folder of ``final``: committed when the block ends, removed when it fails.

    With several processes each enters the block; ``is_rank0`` is true in one of them, and
    ``reduce_max(outcome)`` waits for all and gives the largest outcome: a save fails everywhere or
    nowhere, and for want of space everywhere alike.
    ``replace`` allows a folder of that name to be there already.
    ``known`` is filled in the block with size and SHA-256 of files that need not be read again.
    """
    stage = stage_path(final)
    lock: Lock | None = None
    try:
        with together(reduce_max, final):
            if is_rank0:
                lock = open_stage(final, replace=replace)
        with together(reduce_max, final):
            if not stage.is_dir():
                raise CheckpointError(
                    f"{stage} was made by process 0 and this process cannot see it; "
                    "put training.output_dir on storage that every machine of the run shares"
                )
            with _ended_by_signals():
                yield stage
        with together(reduce_max, final):
            if is_rank0:
                commit(stage, final, replace=replace, known=known)
    except BaseException as error:
        reason = _space_error(error, final, stage)
        if lock is not None:
            # What cannot be removed now is removed at the next start.
            with suppress(OSError):
                shutil.rmtree(stage, ignore_errors=True)
        if reason is not None:
            raise reason from error
        raise
    finally:
        if lock is not None:
            lock.release()


def stage_path(final: Path) -> Path:
    """Where ``final`` is built: beside it, so that one rename can put it in place."""
    return final.parent / f"{STAGING}{final.name}"


def open_stage(final: Path, *, replace: bool = False) -> Lock:
    """An empty staging folder for ``final``, locked.

    Raises:
        OutputInUseError: Another process is writing ``final``.
        CheckpointError: There is something of that name already.
    """
    if os.path.lexists(final) and not replace:
        raise CheckpointError(f"{final} exists already; choose another place or remove it first")
    stage = stage_path(final)
    if stage.is_symlink() or (stage.exists() and not stage.is_dir()):
        raise CheckpointError(f"{stage} is in the way; remove it")
    while True:
        stage.mkdir(exist_ok=True)
        lock = try_lock(stage, make=False)
        if lock is not None:
            break
        if is_held(stage):
            raise OutputInUseError(
                f"another process is writing {final} at this moment; wait for it"
            )
    try:
        for entry in list(stage.iterdir()):
            _remove(entry)
    except BaseException:
        lock.release()
        raise
    return lock


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A signal that would end the process at once ends the block first, so that it is tidied up.

    Only what nobody handles: training has its own way of ending.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    unhandled = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in unhandled:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in unhandled:
            signal.signal(number, signal.SIG_DFL)


def commit(stage: Path, final: Path, *, replace: bool = False, known: Files | None = None) -> None:
    """Make ``stage`` whole (fsync, manifest last) and visible as ``final`` by one rename.

    A writer that knows the hashes of its files may have sealed it already.
    A folder of that name is set aside first and removed afterwards; a crash between the two
    renames is undone by ``clean``.
    """
    if not (stage / MANIFEST).exists():
        seal(stage, known)
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
    manifest = recorded(folder)
    known = {file: entry for file, entry in manifest.files.items() if file != name}
    with staged(folder, replace=True) as stage:
        for file in list(known):
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(folder / file, stage / file)
            except OSError:  # a filesystem without links
                shutil.copyfile(folder / file, stage / file)
                del known[file]
        (stage / name).write_text(text, encoding="utf-8")
        seal(stage, known, facts=manifest.facts)


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
    done += sweep(run_dir)
    fsync_folder(run_dir)
    return done


def sweep(folder: Path, *, names: Sequence[str] | None = None) -> list[str]:
    """Remove staging folders, deletions and temporary files that no live process works on.

    With ``names``, patterns of file names, only staging folders that hold nothing else: in a folder
    of the user's, where somebody else may use such a name.
    """
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_ours = path.name.startswith((STAGING, TRASH)) and path.is_dir()
        if is_ours and names is not None:
            is_ours = not path.is_symlink() and all(
                any(fnmatch(file.name, pattern) for pattern in names) for file in path.rglob("*")
            )
        if is_ours and (path.is_symlink() or not is_held(path)):
            _remove(path)
            removed.append(path.name)
    removed += files.sweep(folder) if names is None else []
    return [f"removed {name}: left over from an interrupted save or deletion" for name in removed]


@contextmanager
def result_files(
    folder: Path,
    *,
    belongs: Callable[[str], bool],
    ours: Collection[str] = (),
    overwrite: bool = False,
) -> Iterator[Path]:
    """A staging folder whose files take their places in ``folder`` together when the block ends.

    They are sealed first; then one rename decides that they are the result, and moving them is
    finished by whoever comes next (``finish_result``) when a kill cuts it short. The manifest in
    ``folder`` names them. Files of an earlier result are replaced, and removed where the new one
    has none of that name.

    Raises:
        OutputInUseError: Another process is writing there.
        ConfigError: A file that is none of an earlier result is in the way. ``ours`` names some
            that are, in a folder without a manifest; ``belongs`` tells what such a result may hold, so
            that what another command wrote, such as a checkpoint, is not taken for an earlier one.
    """
    refuse_another_result(folder, belongs)
    folder.mkdir(parents=True, exist_ok=True)
    with _held_folder(folder):
        _move_in(folder)
        sweep(folder)
        stage = folder / f"{STAGING}files"
        stage.mkdir()
        try:
            with _ended_by_signals():
                yield stage
            seal(stage)
            if not overwrite:
                refuse_others(folder, recorded(stage).files, ours)
            for name in recorded(stage).files:
                refuse_odd(folder / name, inside=folder)
            stage.rename(folder / READY)
            fsync_folder(folder)
        finally:
            with suppress(OSError):
                _remove(stage)
        _move_in(folder)


def finish_result(folder: Path) -> list[str]:
    """Everything that is wrong with a result written by ``result_files``; a cut-short one is finished.

    A folder without a manifest is one of an older version, of which nothing is known.
    """
    if (folder / READY).is_dir():
        with _held_folder(folder):
            _move_in(folder)
    files.sweep(folder)
    return verify(folder, others_allowed=True) if (folder / MANIFEST).exists() else []


@contextmanager
def _held_folder(folder: Path) -> Iterator[None]:
    lock = try_lock(folder.resolve(), make=False)
    if lock is None:
        raise OutputInUseError(
            f"another process is writing to {folder} at this moment; wait for it, or choose another "
            "folder"
        )
    with lock:
        yield


def refuse_another_result(folder: Path, belongs: Callable[[str], bool]) -> None:
    """ConfigError for a folder whose manifest names files that do not belong to such a result."""
    foreign = [name for name in noted_files(folder) if not belongs(name)]
    if foreign:
        raise ConfigError(
            f"{folder} is what another command wrote ({foreign[0]} and {len(foreign) - 1} more files), "
            "and would be replaced; choose another --output"
        )


def refuse_others(folder: Path, names: Collection[str], ours: Collection[str] = ()) -> None:
    """ConfigError when one of ``names`` is there and is of no result that ``result_files`` wrote."""
    noted = noted_files(folder)
    earlier = {*noted, MANIFEST} if noted else set()
    for name in (*names, MANIFEST):
        if name not in ours and name not in earlier and os.path.lexists(folder / name):
            raise ConfigError(
                f"{folder / name} is there, and this program did not write it; choose another "
                "--output, or say --overwrite"
            )


def _move_in(folder: Path) -> None:
    ready = folder / READY
    if not ready.is_dir() or ready.is_symlink():
        return
    if (ready / MANIFEST).is_file():
        names = recorded(ready).files
        for name in names:  # a stranger may have made this folder
            refuse_odd(ready / name, inside=ready)
        for name in (*names, *_obsolete(folder, names)):
            refuse_odd(folder / name, inside=folder)
        for name in names:
            if (ready / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (ready / name).replace(folder / name)
        for name, (_, digest) in _obsolete(folder, names).items():
            if (folder / name).is_file() and file_digest(folder / name) == digest:
                (folder / name).unlink()
        for parent in {(folder / name).parent for name in names if (folder / name).exists()}:
            fsync_folder(parent)
        (ready / MANIFEST).replace(folder / MANIFEST)
        fsync_folder(folder)
    _remove(ready)


def _obsolete(folder: Path, names: Collection[str]) -> dict[str, tuple[int, str]]:
    """Files of the earlier result that the new one has not."""
    return {name: entry for name, entry in noted_files(folder).items() if name not in names}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def together(reduce_max: Callable[[int], int], final: Path) -> Iterator[None]:
    """Leave a part of the writing of ``final`` by an exception in every process, or in none.

    A part must not hold collective operations that a failing process would skip.
    """
    try:
        yield
    except BaseException as error:
        reduce_max(NO_ROOM if is_disk_error(error) else FAILED)
        raise
    if (outcome := reduce_max(FINE)) != FINE:
        kind, what = (SpaceError, "no room") if outcome == NO_ROOM else (CheckpointError, "unable")
        echo = kind(f"{what} to write {final} in another process; earlier ones are untouched")
        echo.is_echo = True
        raise echo


def _space_error(error: BaseException, final: Path, stage: Path) -> SpaceError | None:
    """``error`` as a message about the disk, if that is what it is."""
    if isinstance(error, CheckpointError) or not is_disk_error(error):
        return None
    if not is_out_of_space(error):
        return SpaceError(f"unable to write {final} ({error}); earlier checkpoints are untouched")
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
            "Earlier checkpoints are untouched. Free some space or write elsewhere; of a run, lower "
            "training.keep_checkpoints or choose another training.output_dir"
        )
    return SpaceError(f"no room to write {final}; earlier checkpoints are untouched")
