"""One folder per run, written by one run at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune.artifacts import checkpoint
from finetune.errors import ConfigError, RunDirectoryInUseError
from finetune.storage import folders

LOCK = ".lock"
CONFIG = "config.yaml"
DATA = "data.json"


class RunDirectory:
    """A run's folder; open it with ``RunDirectory.open`` and use it as a context manager."""

    def __init__(self, path: Path, lock: int = -1, cleaned: tuple[str, ...] = ()) -> None:
        self.path = path
        self.cleaned = cleaned
        """What an interrupted run had left behind and was tidied away, one sentence each."""
        self._lock = lock
        _OPEN.add(self)

    @classmethod
    def open(cls, path: str | Path, *, leader: bool = True) -> RunDirectory:
        """The folder at ``path``, made if needed, locked and tidied by the leading process.

        Raises RunDirectoryInUseError while another live run holds it; the lock of a killed run is
        gone with its process. ConfigError when the folder cannot be made or written.
        """
        path = Path(path)
        if not leader:
            return cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path / LOCK, path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(
                f"training.output_dir: {str(path)!r} cannot be used as a run directory "
                f"({reason}); choose a folder that can be written"
            ) from error
        try:
            return cls(path, lock, tuple(folders.clean(path)))
        except BaseException:
            os.close(lock)
            raise

    def checkpoints(self) -> list[Path]:
        """Its checkpoints, oldest first, good or not."""
        return checkpoint.checkpoints(self.path)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of an optimizer step belongs."""
        return self.path / f"checkpoint-{step}"

    def write_config(self, text: str) -> Path:
        """The resolved config as the first file of a run."""
        folders.write_file(self.path / CONFIG, text)
        return self.path / CONFIG

    def write_data(self, counts: Mapping[str, Any]) -> Path:
        """What became of the data's rows, for reports."""
        text = json.dumps(counts, ensure_ascii=False, indent=1)
        folders.write_file(self.path / DATA, text + "\n")
        return self.path / DATA

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _lock(file: Path, run_dir: Path) -> int:
    """A descriptor that holds the lock; it is released by closing it or by the process's end."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 512, 0).decode("utf-8", "replace").strip()
        os.close(descriptor)
        raise RunDirectoryInUseError(
            f"{run_dir} is in use by {holder or 'another process'}; "
            "wait for it, stop it, or choose another training.output_dir"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


_OPEN: weakref.WeakSet[RunDirectory] = weakref.WeakSet()


def _release_in_child() -> None:
    # A forked loader worker shares the lock and could outlive a killed run.
    for directory in _OPEN:
        directory.close()


os.register_at_fork(after_in_child=_release_in_child)
