"""What a run says: rich on a terminal, plain lines in a file, and only from rank 0.

Text is never read as markup (`[gMASK]` stays `[gMASK]`). Inside `json_output` standard output belongs
to the JSON alone, and everything else, also what libraries print, goes to standard error.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from finetune import launcher
from finetune.language import sentence, width, word

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.text import Text

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOST = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESTALE)
"""Who reads the output is gone: `| head` has ended, the terminal or its connection was closed."""
_SHOWN = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}
"""Control characters as pictures of them: those that a terminal would obey, or that turn lines around."""
_ENDLESS = re.compile(r"[^\s，。；：、]{1000,}")
"""A word that nobody reads to its end, such as a tensor's name of 200,000 characters."""
PLAIN_PROGRESS_SECONDS = 5.0
"""In a log file a progress line appears at most this often."""

_redirected = False
_warned: set[str] = set()
_tolerates_loss = False


def is_rank0() -> bool:
    """True on the one process that talks: rank 0, or a run without a launcher."""
    return launcher.rank() == 0


def on_terminal() -> bool:
    """True where a person watches, so that colours and moving bars make sense."""
    return _stream().isatty() and os.environ.get("TERM") != "dumb"


def shown(text: str) -> str:
    """The text as it may reach a terminal, each character in its place: nothing in it is obeyed."""
    return text.translate(_SHOWN)


def _told(text: str) -> str:
    """A message in the user's language, in which no name of a stranger's takes pages."""
    return _ENDLESS.sub(lambda name: f"{name[0][:500]}…{name[0][-200:]}", sentence(text))


def say(text: str | Text = "") -> None:
    """One line (or several) for the user; a rich Text keeps its colours on a terminal."""
    if not is_rank0():
        return
    if on_terminal():
        _rich().print(_shown(text), soft_wrap=True)
    else:
        _write(_stream(), str(text))


def warn(text: str) -> None:
    """A line that should not be overlooked; on standard error."""
    if not is_rank0():
        return
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from rich.text import Text

        line = Text.assemble((word("warning: "), "bold yellow"), shown(_told(text)))
        _rich(stderr=True).print(line, soft_wrap=True)
    else:
        _write(sys.stderr, word("warning: ") + _told(text))


def warn_once(text: str) -> None:
    """The same, but a text that was said before is not repeated."""
    if text not in _warned:
        _warned.add(text)
        warn(text)


def error(text: str) -> None:
    """Why the program ends; on standard error, by whoever calls."""
    _write(sys.stderr, word("error: ") + _told(text))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Rows under headers; a column of numbers, or of rich Texts that ask for it, is aligned right.

    Rich Texts keep their colours on a terminal.
    """
    if not is_rank0():
        return
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    numeric = [
        bool(rows)
        and all(
            isinstance(c, (int, float)) or getattr(c, "justify", None) == "right" for c in column
        )
        for column in (zip(*rows, strict=True) if rows else [()] * len(headers))
    ]
    if on_terminal():
        _rich_table(headers, rows, numeric)
    else:
        _write(_stream(), "\n".join(_plain_table(headers, cells, numeric)))


class ProgressBar:
    """A count that moves towards `total`; made by `progress`."""

    def __init__(self, total: int | None, label: str) -> None:
        self.total = total
        self.label = label
        self.done = 0
        self._begin = self._last = time.monotonic()
        self._said: int | None = None
        self._bar: tuple[Progress, TaskID] | None = None

    def advance(self, n: int = 1, note: str = "") -> None:
        """Counts `n` more; `note` replaces the words behind the label."""
        self.done += n
        if self._bar is not None:
            bar, task = self._bar
            label = shown(f"{self.label} {note}".rstrip())
            bar.update(task, completed=self.done, description=label)
        elif is_rank0() and time.monotonic() - self._last >= PLAIN_PROGRESS_SECONDS:
            self._last = time.monotonic()
            self._said = self.done
            _write(_stream(), self._line(note))

    def finish(self) -> None:
        """In a log file, the last line of a count that had lines before."""
        if is_rank0() and self._said not in (None, self.done):
            _write(_stream(), self._line())

    def _line(self, note: str = "") -> str:
        spent = time.monotonic() - self._begin
        text = f"{self.label}: {self.done}"
        if self.total:
            text += f"/{self.total} ({100 * self.done // self.total} %)"
            if self.done:
                text += f", {duration(spent / self.done * (self.total - self.done))} left"
        return f"{text}, {duration(spent)} so far" + (f", {note}" if note else "")


@contextmanager
def progress(total: int | None, label: str) -> Iterator[ProgressBar]:
    """A moving bar on a terminal; elsewhere a line every few seconds at most. `total` None: unknown."""
    bar_or_lines = ProgressBar(total, label)
    if not (is_rank0() and on_terminal()):
        yield bar_or_lines
        bar_or_lines.finish()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeftColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeLeftColumn(),
    )
    with Progress(*columns, console=_rich(), transient=True) as bar:
        bar_or_lines._bar = (bar, bar.add_task(shown(label), total=total))
        yield bar_or_lines


def duration(seconds: float) -> str:
    """Seconds as people write them: `42 s`, `3:07`, `1:02:05`."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


@contextmanager
def json_output(enabled: bool = True) -> Iterator[Callable[[Any], None]]:
    """Gives `emit(value)`, one JSON text per line on standard output, from rank 0 only.

    A dataclass is emitted as a mapping, a path as text.

    While it is open, file descriptor 1 leads to standard error: nothing that a library (or a child
    process) prints can get between the JSON. With `enabled` False, `emit` does nothing.
    """
    global _redirected
    if not enabled:
        yield lambda value: None
        return
    python_stdout, was_redirected = sys.stdout, _redirected
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    sys.stdout, _redirected = sys.stderr, True
    try:
        with os.fdopen(os.dup(real), "wb") as pipe:

            def emit(value: Any) -> None:
                if is_rank0():
                    text = json.dumps(value, ensure_ascii=False, default=_as_json)
                    pipe.write(text.encode() + b"\n")
                    pipe.flush()

            yield emit
    finally:
        sys.stdout, _redirected = python_stdout, was_redirected
        os.dup2(real, 1)
        os.close(real)


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _stream() -> TextIO:
    return sys.stderr if _redirected else sys.stdout


def _write(stream: TextIO, text: str) -> None:
    with _output(stream):
        stream.write(shown(text) + "\n")
        stream.flush()


@contextmanager
def _output(stream: TextIO) -> Iterator[None]:
    """Writing to `stream`; in a run that tolerates it, a lost or full output ends nothing."""
    try:
        yield
    except OSError as error:
        if not _tolerates_loss or error.errno not in (*NO_SPACE, *LOST):
            raise
        if error.errno in LOST:
            _discard(stream)
            if stream is not sys.stderr:
                warn(f"the output is gone ({error.strerror}); the run goes on without it")


def _discard(stream: TextIO) -> None:
    """What is still to be written to `stream`, by whomever, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def open_missing_streams() -> None:
    """Standard streams that were closed at the start lead nowhere; no file gets their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def tolerate_lost_output() -> None:
    """From here on the output is a log; a full disk, a closed pipe, a terminal that goes end nothing."""
    global _tolerates_loss
    _tolerates_loss = True


def flush_at_exit() -> None:
    """Write what is left, so that a lost or full log does not decide the exit code."""
    for stream in (sys.stdout, sys.stderr) if _tolerates_loss else ():
        try:
            stream.flush()
        except OSError as error:
            if error.errno in (*NO_SPACE, *LOST):
                _discard(stream)


class _Lasting:
    """The output as rich writes to it; see `_output`."""

    def __init__(self, stderr: bool) -> None:
        self._stderr = stderr

    def write(self, text: str) -> int:
        with _output(self._stream):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _output(self._stream):
            self._stream.flush()

    @property
    def _stream(self) -> TextIO:
        return sys.stderr if self._stderr else sys.stdout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_consoles: dict[bool, Console] = {}


def _rich(stderr: bool = False) -> Console:
    """The rich console of a stream; one object each, so that lines pass above a moving bar."""
    stderr = stderr or _redirected
    if stderr not in _consoles:
        from rich.console import Console

        out: Any = _Lasting(stderr)
        _consoles[stderr] = Console(file=out, markup=False, emoji=False, highlight=False)
    return _consoles[stderr]


def _shown(text: str | Text) -> Text:
    """A rich Text, as `shown` has it."""
    from rich.text import Text

    if isinstance(text, str):
        return Text(shown(text))
    made = text.copy()
    made.plain = shown(made.plain)
    return made


def _rich_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], numeric: Sequence[bool]
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=SIMPLE_HEAD)
    for header, right in zip(headers, numeric, strict=True):
        grid.add_column(Text(shown(header)), justify="right" if right else "left", overflow="fold")
    for row in rows:
        grid.add_row(
            *(
                _shown(cell if isinstance(cell, Text) else "" if cell is None else str(cell))
                for cell in row
            )
        )
    _rich().print(grid)


def _plain_table(
    headers: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool]
) -> list[str]:
    widths = [max(map(width, column)) for column in zip(headers, *cells, strict=True)]
    lines = []
    for row in [headers, ["-" * columns for columns in widths], *cells]:
        padded = []
        for cell, columns, right in zip(row, widths, numeric, strict=True):
            blank = " " * (columns - width(cell))
            padded.append(blank + cell if right else cell + blank)
        lines.append("  ".join(padded).rstrip())
    return lines
