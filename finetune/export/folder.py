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

import numpy as np

from finetune import console
from finetune.artifacts.names import (
    BASE_RECORD,
    MANIFEST,
    MODEL_CARD,
    RUN_RECORD,
    TRAINER_STATE,
    WEIGHTS_INDEX,
)
from finetune.artifacts.weights import TensorInfo, read_shard
from finetune.errors import ConfigError, ModelError, SpaceError
from finetune.export.adapter import Update
from finetune.export.checks import ProductCheck
from finetune.export.numbers import Floats, to_float32
from finetune.export.shards import CancelledError, Output, ShardPlan, write_shard
from finetune.storage import folders
from finetune.storage.manifest import seal

_WORKERS = 2
_SPARE = 16 << 20  # bytes beside the weights
_SAMPLE = 64  # bytes that are read back from each end of what was copied
_BACK = 2  # rows that are read back from each end of a matrix that was computed
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
def written(plan: FolderPlan, out: Path, label: str, *, check: bool = True) -> Iterator[Path]:
    """The staged folder with all of ``plan`` in it; sealed and put in place when the block ends.

    Raises SpaceError before the first byte when the disk is too small.

    Args:
        plan: What it will hold.
        out: Where it will be.
        label: What the progress bar says of its bytes.
        check: Read every tensor's ends back from the disk, by the written headers.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_place(out, error) from error
    for line in folders.sweep(out.parent, names=[*_CARRIED, "*.safetensors", MODEL_CARD]):
        console.say(line)
    _check_space(plan, out)
    with folders.staged(out) as stage:
        known = _write(plan, stage, label)
        if check:
            for shard in plan.shards:
                _check_written(shard, stage / shard.name)
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
    for error in sorted(errors, key=lambda error: isinstance(error, CancelledError)):
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


def _check_written(plan: ShardPlan, file: Path) -> int:
    """Read a written shard back by its own header; returns the number of tensors that were compared.

    Raises:
        ModelError: A tensor is not there, or is another.
    """
    found = {tensor.name: tensor for tensor in read_shard(file).tensors}
    wanted = {output.name: output for output in plan.outputs}
    if found.keys() != wanted.keys():
        raise _wrong(sorted(found.keys() ^ wanted.keys())[0])
    for name, output in wanted.items():
        tensor = found[name]
        if (tensor.dtype, tensor.shape) != (output.dtype, output.shape):
            raise _wrong(name)
        if output.update is not None:
            _check_rows(output, output.update, tensor)
        elif all(source.dtype == output.dtype for source in output.sources):
            _check_bytes(output, tensor)
    return len(wanted)


def _check_rows(output: Output, update: Update, tensor: TensorInfo) -> None:
    """The first and the last rows of a matrix, both read from the disk."""
    (source,) = output.sources
    rows = tensor.shape[0]
    checks = ProductCheck(output.name, update, output.dtype)
    for first, last in ((0, min(_BACK, rows)), (max(0, rows - _BACK), rows)):
        before, after = (_read_rows(one, first, last) for one in (source, tensor))
        factors = None
        if update.magnitude is not None:
            factors = update.apply(slice(first, last), before.copy(), np.empty_like(before))
        checks.after(first, checks.before(before), after, factors)


def _check_bytes(output: Output, tensor: TensorInfo) -> None:
    """The start and the end of everything that was copied or given."""
    place = tensor.start
    if output.constant and _bytes(tensor, place, len(output.constant)) != output.constant:
        raise _wrong(output.name)
    place += len(output.constant)
    for source in output.sources:
        size = min(_SAMPLE, source.size)
        for offset in (0, source.size - size):
            if _bytes(tensor, place + offset, size) != _bytes(source, source.start + offset, size):
                raise _wrong(output.name)
        place += source.size


def _read_rows(tensor: TensorInfo, first: int, last: int) -> Floats:
    part = tensor.rows(first, last)
    return to_float32(_bytes(part, part.start, part.size), part.dtype, part.shape)


def _bytes(tensor: TensorInfo, place: int, size: int) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(place)
        return file.read(size)


def _wrong(name: str) -> ModelError:
    return ModelError(
        f"{name} was not written as planned (read back from the disk); nothing was kept. "
        "Look at the disk, and please report this"
    )
