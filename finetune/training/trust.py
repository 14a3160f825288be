"""Which checkpoint may be resumed: one that this user wrote, and whose states are what a run writes.

DeepSpeed's own states are pickles; we open them with `weights_only=True` (`training.sharded_engine`),
and all the same only our own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from finetune.artifacts import checkpoint
from finetune.errors import CheckpointError, FinetuneError, is_out_of_memory
from finetune.storage.disk import is_disk_error
from finetune.storage.manifest import walk

SHARDS = "global_step"


def check_owner(run_dir: Path, resume: str) -> None:
    """CheckpointError when a checkpoint that `training.resume` may mean has states that others wrote.

    Only folders with DeepSpeed's states are looked at. That they are whole is checked by their
    manifest when they are chosen; a manifest says nothing about who wrote them.
    """
    if resume == "never":
        return
    folders = checkpoint.checkpoints(run_dir) if resume == "auto" else [Path(resume)]
    for folder in folders:
        if folder.is_dir() and any(folder.glob(f"{SHARDS}*")):
            _refuse_others(folder, [folder, *(folder / name for name in walk(folder)[0])])


def _refuse_others(folder: Path, paths: Sequence[Path]) -> None:
    user = os.getuid()
    for path in paths:
        found = path.lstat()
        writable = found.st_mode & 0o002
        if found.st_uid != user or writable:
            whose = "anybody can write to" if writable else f"user {found.st_uid} wrote"
            raise CheckpointError(
                f"{folder} holds optimizer states of DeepSpeed, which are pickles, and {whose} "
                f"{path.name}; resume only from a checkpoint of your own, or say that you trust this "
                "one with --trust-checkpoint"
            )


@contextmanager
def opening(folder: str | None, *, begun: Callable[[], bool]) -> Iterator[None]:
    """CheckpointError for whatever `folder` makes the libraries raise before the first step.

    Its manifest was right, so it holds what its writer put there; that need not be states of a run.
    """
    try:
        yield
    except Exception as error:
        if folder is None or begun() or isinstance(error, FinetuneError):
            raise
        if is_out_of_memory(error) or is_disk_error(error):
            raise
        said = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder} is whole but cannot be opened ({type(error).__name__}: {said[:200]}); its "
            "states are not those that a run writes. Name another checkpoint with training.resume"
        ) from error
