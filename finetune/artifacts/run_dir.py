"""One folder per run, written by one run at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune.artifacts.checkpoint import checkpoints
from finetune.artifacts.names import (
    ADAPTER_CONFIG,
    BEST,
    MODEL_CONFIG,
    RUN_CONFIG,
    RUN_DATA,
    RUN_METRICS,
)
from finetune.errors import ConfigError, RunDirectoryInUseError
from finetune.storage import folders
from finetune.storage.files import kind_of, refuse_odd, write_file
from finetune.storage.lock import Lock, holder, is_held, this_process, try_lock

LOCK = ".lock"


class RunDirectory:
    """A run's folder; open it with ``RunDirectory.open`` and use it as a context manager."""

    def __init__(self, path: Path, lock: Lock | None = None, cleaned: tuple[str, ...] = ()) -> None:
        self.path = path
        self.cleaned = cleaned
        """What an interrupted run had left behind and was tidied away, one sentence each."""
        self._lock = lock

    @classmethod
    def open(cls, path: str | Path, *, is_rank0: bool = True) -> RunDirectory:
        """The folder at ``path``, made if needed, locked and tidied by the leading process.

        Raises RunDirectoryInUseError while another live run holds it; the lock of a killed run is
        gone with its process. ConfigError when the folder cannot be made or written.
        """
        path = Path(path)
        if not is_rank0:
            return cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            _refuse_others(path)
            lock = _lock(path / LOCK, path)
        except (OSError, ValueError) as error:
            raise _unusable(path, error) from error
        try:
            _refuse_odd_files(path)
            return cls(path, lock, tuple(folders.clean(path)))
        except BaseException:
            lock.release()
            raise

    @staticmethod
    def user(path: Path) -> str | None:
        """Which live run holds the folder at ``path``, in words; None for none. ConfigError as `open`."""
        try:
            return holder(path / LOCK) if is_held(path / LOCK) else None
        except (OSError, ValueError) as error:
            raise _unusable(path, error) from error

    def write_config(self, text: str) -> Path:
        """The resolved config as the first file of a run."""
        write_file(self.path / RUN_CONFIG, text)
        return self.path / RUN_CONFIG

    def write_data(self, counts: Mapping[str, Any]) -> Path:
        """What became of the data's rows, for reports."""
        text = json.dumps(counts, ensure_ascii=False, indent=1)
        write_file(self.path / RUN_DATA, text + "\n")
        return self.path / RUN_DATA

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _lock(file: Path, run_dir: Path) -> Lock:
    """The lock on the folder; it is released by `release` or by the process's end."""
    refuse_odd(file)
    lock = try_lock(file)
    if lock is None:
        raise RunDirectoryInUseError(
            f"{run_dir} is in use by {holder(file)}; "
            "wait for it, stop it, or choose another training.output_dir"
        )
    lock.note(f"{this_process()}\n")
    return lock


def _refuse_others(run_dir: Path) -> None:
    """ConfigError for a folder that no run began, where a run would write over somebody's files."""
    if os.path.lexists(run_dir / LOCK) or checkpoints(run_dir):
        return
    mine = (RUN_CONFIG, RUN_DATA, BEST, RUN_METRICS)
    if taken := [name for name in (MODEL_CONFIG, ADAPTER_CONFIG) if (run_dir / name).exists()]:
        raise ConfigError(
            f"training.output_dir: {run_dir} holds a model ({taken[0]}), which would be taken for a run "
            "from then on; choose another folder"
        )
    if taken := [name for name in mine if os.path.lexists(run_dir / name)]:
        raise ConfigError(
            f"training.output_dir: {run_dir} is not a run directory, and a run would write over "
            f"{', '.join(taken)} in it; choose another folder"
        )


def _refuse_odd_files(run_dir: Path) -> None:
    """ConfigError for a link, a device or the like where the run will write a file."""
    for path in run_dir.iterdir():
        kind = kind_of(path)
        if kind not in ("", "a folder") and path.name.endswith((".json", ".jsonl", ".yaml")):
            raise ConfigError(
                f"training.output_dir: {path} is {kind}, and a run would write there; remove it, or "
                "choose another folder"
            )


def _unusable(path: Path, error: OSError | ValueError) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return ConfigError(
        f"training.output_dir: {str(path)!r} cannot be used as a run directory "
        f"({reason}); choose a folder that can be written"
    )
