"""A planned checkpoint folder -> written whole or not at all, its weights tensor by tensor."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from finetune import console
from finetune.artifacts.names import BASE_RECORD, MANIFEST, RUN_RECORD, TRAINER_STATE, WEIGHTS_INDEX
from finetune.errors import ConfigError, SpaceError
from finetune.export.shards import GivenUpError, ShardPlan, write_shard
from finetune.storage import folders
from finetune.storage.manifest import seal

_WORKERS = 2
_SPARE = 16 << 20  # bytes beside the weights
_CARRIED = ("*.json", "*.jinja", "*.py", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
_LEFT = (MANIFEST, "*.index.json", "adapter_*", BASE_RECORD, RUN_RECORD, TRAINER_STATE)


@dataclass(frozen=True)
class FolderPlan:
    """What a folder will hold."""

    shards: tuple[ShardPlan, ...]
    texts: Mapping[str, str]
    """Files that are written anew, by name."""
    copies: Mapping[str, Path]
    """Files that are carried over byte for byte, by name."""

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(shard.size for shard in self.shards)


def check_output(out: Path, inputs: set[Path]) -> None:
    """Refuse an output that is there already, cannot be there, or lies in what is read."""
    try:
        taken = out.exists() or out.is_symlink()
        folders.stage_path(out).exists()  # its name is longer
    except OSError as error:
        raise _no_place(out, error) from error
    if taken:
        raise ConfigError(f"{out} exists already; choose another --output or remove it first")
    for folder in inputs:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{out} lies inside {folder}, which is read; choose another --output")


def carried(folder: Path) -> dict[str, Path]:
    """Config, tokenizer, template, code and licence files of a model folder, and the index."""
    found = {WEIGHTS_INDEX: folder / WEIGHTS_INDEX} if (folder / WEIGHTS_INDEX).is_file() else {}
    for file in folder.iterdir():
        wanted = any(fnmatch(file.name, pattern) for pattern in _CARRIED)
        if wanted and file.is_file() and not any(fnmatch(file.name, p) for p in _LEFT):
            found[file.name] = file
    return found


@contextmanager
def written(plan: FolderPlan, out: Path, label: str) -> Iterator[Path]:
    """The staged folder with all of ``plan`` in it; sealed and put in place when the block ends.

    Raises SpaceError before the first byte when the disk is too small.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_place(out, error) from error
    _check_space(plan, out)
    with folders.staged(out) as stage:
        known = _write(plan, stage, label)
        yield stage
        seal(stage, known)


def _no_place(out: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{out} cannot be made ({error.strerror}); choose another --output")


def _check_space(plan: FolderPlan, out: Path) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < plan.size + _SPARE:
        raise SpaceError(
            f"{out} needs {plan.size / 1e9:.2f} GB and {out.parent} has {free / 1e9:.2f} GB free; "
            "nothing was written. Free some space or choose another --output"
        )


def _write(plan: FolderPlan, stage: Path, label: str) -> dict[str, tuple[int, str]]:
    """Write everything; size and SHA-256 of the weight files by name."""
    for name, file in plan.copies.items():
        shutil.copyfile(file, stage / name)
    for name, text in plan.texts.items():
        (stage / name).write_text(text, encoding="utf-8")
    stop = threading.Event()
    with _megabytes(plan.size, label) as advance, ThreadPoolExecutor(_WORKERS) as pool:
        futures = [
            pool.submit(write_shard, shard, stage / shard.name, stop=stop, advance=advance)
            for shard in plan.shards
        ]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            stop.set()
            raise
        if any(future.done() and future.exception() for future in futures):
            stop.set()
    errors = [error for future in futures if (error := future.exception())]
    # The one that made the others give up comes first.
    for error in sorted(errors, key=lambda error: isinstance(error, GivenUpError)):
        raise error
    return {shard.name: future.result() for shard, future in zip(plan.shards, futures, strict=True)}


@contextmanager
def _megabytes(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """A progress bar in MB that several threads may advance by bytes."""
    lock, done = threading.Lock(), 0
    with console.progress(total // 1_000_000, f"MB {label}") as meter:

        def advance(size: int) -> None:
            nonlocal done
            with lock:
                meter.advance((done + size) // 1_000_000 - done // 1_000_000)
                done += size

        yield advance
