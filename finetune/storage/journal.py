"""JSON lines that grow while work goes on and outlive a kill: only whole lines count."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from finetune.errors import ConfigError, OutputInUseError, SpaceError
from finetune.storage.disk import is_disk_error
from finetune.storage.files import file_digest, fsync_folder, json_line, sweep, write_file
from finetune.storage.lock import Lock, try_lock

T = TypeVar("T")
LONGEST_LINE = 64 << 20
"""Bytes; what is longer was not written here."""


def append(path: Path, rows: Iterable[Mapping[str, Any]], *, durable: bool = True) -> None:
    """Adds lines to `path`, all or none; they are on the disk when this returns.

    Not `durable`: they are with the system, so that a kill leaves them and a power cut may not.
    """
    text = memoryview("".join(map(json_line, rows)).encode())
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    is_new = not path.exists()
    with os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while text:
                text = text[file.write(text) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(size)  # no half of a line
            raise
    if durable and is_new:
        fsync_folder(path.parent)


def rows(path: Path) -> Iterator[Any]:
    """The whole lines of a file, up to the first that is torn or no JSON; none without a file."""
    for _, row in _whole_lines(path):
        yield row


def recover(path: Path, of: Callable[[Any], T], *, multiple: int = 1) -> list[T]:
    """`of(row)` of every whole line; what follows the first line that is not whole is cut off.

    Args:
        path: the file; it need not be there.
        of: what is wanted of a row; a row for which it raises KeyError, TypeError or ValueError is not whole.
        multiple: a number of lines that belong together; only whole groups are kept.
    """
    found: list[T] = []
    ends = [0]
    for size, row in _whole_lines(path):
        try:
            found.append(of(row))
        except (KeyError, TypeError, ValueError):
            break
        ends.append(ends[-1] + size)
    kept = len(found) // multiple * multiple
    if path.is_file() and path.stat().st_size != ends[kept]:
        with path.open("rb+") as file:
            file.truncate(ends[kept])
            os.fsync(file.fileno())
    return found[:kept]


def _whole_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Bytes and value of each line."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # such as the NULs that a power cut leaves
                return
            yield len(line), row


class Journal:
    """Rows that grow in a file window by window; batches of the next window lie in `<file>.batches`.

    A window is a number of rows that are made together; the last one may have fewer.
    """

    def __init__(self, path: Path, window: int = 1) -> None:
        self.path = path
        self._window = window
        self._batches = path.with_name(f"{path.name}.batches")
        self._number = 0

    def open(self, of: Callable[[Any], T]) -> list[T]:
        """`of(row)` of the rows of whole windows; all that follows is cut off."""
        found = recover(self.path, of, multiple=self._window)
        self._number = len(found)
        return found

    def batches(self) -> dict[int, Any]:
        """What `note` kept of the window that comes next, by number."""
        noted = [row for row in rows(self._batches) if row.get("behind") == self._number]
        return {row["batch"]: row["rows"] for row in noted}

    def note(self, batch: int, found: Any) -> None:
        """Keeps a batch of the window that comes next; it is on the disk when this returns."""
        self._add(self._batches, [{"behind": self._number, "batch": batch, "rows": found}])

    def append(self, window: Iterable[Mapping[str, Any]]) -> None:
        """Adds a window; it is on the disk when this returns.

        Raises:
            SpaceError: the disk is full or fails; the rows before are kept.
        """
        self._number += self._add(self.path, window)
        self._batches.unlink(missing_ok=True)

    def finish(self, output: Path) -> None:
        """Gives the file its name."""
        self.path.touch()
        self.path.replace(output)
        self.discard()

    def restart(self) -> None:
        """Forgets every row."""
        os.truncate(self.path, 0)
        self._batches.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes the file, if it is there, and what lies beside it."""
        self.path.unlink(missing_ok=True)
        self._batches.unlink(missing_ok=True)

    def _add(self, path: Path, lines: Iterable[Mapping[str, Any]]) -> int:
        listed = list(lines)
        try:
            append(path, listed)
        except OSError as error:
            if not is_disk_error(error):
                raise
            raise SpaceError(
                f"{path} cannot be written ({error.strerror}); what was written before is kept. "
                "Free some space and give the same command again; it goes on from there"
            ) from error
        return len(listed)


class ResumableOutput:
    """A JSONL file that grows in `<output>.part`, locked, and takes its name when all is there.

    `<output>.part.json` says which command its lines belong to: the same one goes on behind them.
    """

    def __init__(
        self, output: Path, identity: str, *, window: int = 1, overwrite: bool = False
    ) -> None:
        self.output = output
        self.part = output.with_name(output.name + ".part")
        self.journal = Journal(self.part, window)
        self._label = output.with_name(output.name + ".part.json")
        self._identity = identity
        self._overwrite = overwrite
        self._lock: Lock | None = None
        self._is_done = False

    def open(self, of: Callable[[Any], T]) -> list[T]:
        """`of(row)` of the lines that this very command wrote before; the file is ours from now on.

        Raises:
            OutputInUseError: another process writes it at this moment.
            ConfigError: there is a part file that this program did not write.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._lock = try_lock(self.part)
        if self._lock is None:
            raise OutputInUseError(
                f"another process is writing {self.output} at this moment; wait for it, or choose "
                "another --output"
            )
        sweep(self.output.parent, self._label.name)
        label = self._read_label()
        if label.get("identity") != self._identity:
            self._start_anew(is_ours=bool(label))
            return []
        if label.get("sha256") and not self.part.stat().st_size:  # ended before it tidied up
            self._is_done = self.output.is_file() and file_digest(self.output) == label["sha256"]
        return recover(self.output, of) if self._is_done else self.journal.open(of)

    def finish(self) -> None:
        """Gives the file its name."""
        if self._is_done:
            self.journal.discard()
        else:
            self._write_label({"sha256": file_digest(self.part)})
            self.journal.finish(self.output)
            fsync_folder(self.output.parent)
        self._label.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Lets others write it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _start_anew(self, *, is_ours: bool) -> None:
        if self.part.stat().st_size and not is_ours and not self._overwrite:
            self.close()
            raise ConfigError(
                f"{self.part} is there, and this program did not write it; move it away, choose "
                "another --output, or say --overwrite"
            )
        self.journal.restart()
        self._write_label({})

    def _read_label(self) -> dict[str, Any]:
        try:
            found = json.loads(self._label.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write_label(self, more: Mapping[str, Any]) -> None:
        write_file(self._label, json_line({"identity": self._identity, **more}))
