"""What is said where, and which error ends a program how, rule by rule."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune import console, errors
from finetune.errors import is_out_of_memory
from finetune.report.charts import Point

EXIT_CODES = {
    "FinetuneError": 1, "ConfigError": 2, "DataError": 2, "ModelError": 2, "CheckpointError": 3, "NonFiniteError": 4,
    "OutOfMemoryError": 5, "SpaceError": 6, "ProcessError": 1, "OutputInUseError": 7, "RunDirectoryInUseError": 7, "RequirementError": 8,
}  # fmt: skip


def test_every_error_ends_the_program_with_its_own_code() -> None:
    found = {name: kind.exit_code for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert found == EXIT_CODES
    assert errors.ProcessError("x", 9).exit_code == 9


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True), (type("OutOfMemoryError", (Exception,), {})(), True),
        *((RuntimeError(text), True) for text in (
            "can't allocate memory", "DefaultCPUAllocator: Cannot allocate memory", "CUDA out of memory", "std::bad_alloc",
            "CUBLAS_STATUS_ALLOC_FAILED")),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True), (ValueError("out of memory"), False),
        (RuntimeError("another"), False), (OSError(errno.EIO, "x"), False),
    ],
)  # fmt: skip
def test_memory_that_ran_out_is_known_by_whoever_says_it(error: Any, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory


class Failing(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [*console.LOST, *console.NO_SPACE, errno.EPERM])
@pytest.mark.parametrize("tolerated", [True, False])
def test_a_lost_or_full_output_ends_only_what_does_not_tolerate_it(
    number: int, tolerated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    discarded: list[Any] = []
    monkeypatch.setattr(console, "_tolerates_loss", tolerated)
    monkeypatch.setattr(console, "warn", told.append)
    monkeypatch.setattr(console, "_discard", discarded.append)
    stream = Failing(number)
    if not tolerated or number == errno.EPERM:
        with pytest.raises(OSError, match=os.strerror(number)):
            console._write(stream, "x")
        return
    console._write(stream, "x")
    lost = number in console.LOST
    assert discarded == [stream] * lost
    assert [text.startswith("the output is gone") for text in told] == [True] * lost
    monkeypatch.setattr(sys, "stderr", Failing(number))
    told.clear()
    console._write(sys.stderr, "x")
    assert told == []


def test_whoever_reads_the_output_may_be_gone_in_these_ways() -> None:
    assert set(console.LOST) == {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESTALE}
    assert set(console.NO_SPACE) == {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def test_a_warning_is_repeated_only_by_warn_and_only_on_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_warned", set())
    for _ in range(2):
        console.warn_once("once")
        console.warn("twice")
    assert [capsys.readouterr().err.count(word) for word in ("once",)] == [1]
    console.warn("twice")
    monkeypatch.setenv("RANK", "1")
    console.warn("never")
    console.warn_once("never either")
    assert capsys.readouterr().err.count("\n") == 1
    console.error("always")
    assert "always" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1:00"), (65, "1:05"), (3599, "59:59"), (3600, "1:00:00"), (3661, "1:01:01"), (90_000, "25:00:00")],
)  # fmt: skip
def test_a_duration_has_two_digits_behind_each_colon(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_progress_tells_how_much_is_left_and_the_end_only_where_it_was_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress(10, "quick") as meter:
        meter.advance(10)
    assert capsys.readouterr().out == ""
    with console.progress(10, "slow") as meter:
        now = 10.0
        meter.advance(4, "going")
        meter.advance(6)
    assert capsys.readouterr().out.splitlines() == [
        "slow: 4/10 (40 %), 15 s left, 10 s so far, going",
        "slow: 10/10 (100 %), 0 s left, 10 s so far",
    ]
    with console.progress(5, "told") as meter:
        now = 30.0
        meter.advance(5)
    assert capsys.readouterr().out.count("\n") == 1


def test_control_characters_are_pictures_and_no_others() -> None:
    assert console.shown("\x00\x1f\x7f\t\n a\x80\x9f\u202a\u202e\u2066\u2069é") == (
        "\u2400\u241f\u2421\t\n a\ufffd\ufffd\ufffd\ufffd\ufffd\ufffdé"
    )


def test_json_comes_at_once_and_standard_output_is_itself_again_afterwards(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before, number = sys.stdout, len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with console.json_output() as emit:
        assert console._stream() is sys.stderr
        emit({"path": Path("a"), "é": 1})
        assert capfd.readouterr().out == '{"path": "a", "é": 1}\n'
        with pytest.raises(TypeError, match="set has no JSON form"):
            emit({1})
        with pytest.raises(TypeError, match="type has no JSON form"):
            emit(Point)
        emit(Point(1.0, 2.0))
        assert capfd.readouterr().out == '{"x": 1.0, "y": 2.0, "low": null, "high": null}\n'
    assert sys.stdout is before
    assert console._stream() is sys.stdout
    assert len(os.listdir("/proc/self/fd")) == number  # noqa: PTH208
    with console.json_output(enabled=False) as emit:
        emit(1)
        print("mine")
    assert capfd.readouterr().out == "mine\n"


def test_a_column_of_numbers_or_of_texts_that_ask_for_it_stands_on_the_right(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.text import Text

    right, left = Text("7", justify="right"), Text("x", justify="left")
    console.table(
        ["n", "longer", "text"], [[1, right, left], [100, Text("77", justify="right"), "y"]]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "  1       7  x"
    assert lines[3] == "100      77  y"


def test_a_dumb_terminal_is_none_and_a_moving_bar_says_what_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for term, watched in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", term)
        assert console.on_terminal() is watched
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert not console.on_terminal()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "_consoles", {})
    monkeypatch.setenv("COLUMNS", "100")
    with console.progress(4, "rows") as meter:
        meter.advance(3, "loss 1")
        assert meter._bar is not None
        bar, task = meter._bar
        assert (bar.tasks[task].completed, bar.tasks[task].total) == (3, 4)
        assert bar.tasks[task].description == "rows loss 1"
        assert not bar.columns[0].markup  # type: ignore[union-attr]
        assert bar.live.transient
        meter.advance()
        assert (bar.tasks[task].completed, bar.tasks[task].description) == (4, "rows")
    capsys.readouterr()
    console.table(["a", "b"], [["x", None], ["y", 12]])
    said = capsys.readouterr().out
    assert "None" not in said
    assert "12" in said


def test_streams_that_were_closed_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    console.open_missing_streams()
    assert sys.stdin.read() == ""
    for stream in (sys.stdout, sys.stderr):
        assert stream.write("x") == 1
        stream.close()
    sys.stdin.close()


def test_a_warning_on_a_terminal_is_bold_and_of_the_same_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(console, "_consoles", {})
    monkeypatch.setenv("TERM", "xterm")
    console.warn("[bold] " + "x" * 300 + "\x1b[2J")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("[bold] " + "x" * 300 + "␛[2J\n"), "in one line, and nothing is obeyed"
    assert "warning: " in err
    monkeypatch.setenv("TERM", "dumb")
    console.warn("plain")
    assert capsys.readouterr().err == "warning: plain\n"


def test_beside_json_a_terminals_table_goes_to_the_other_stream(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    monkeypatch.setattr(console, "_consoles", {})
    with console.json_output() as emit:
        console.table(["a"], [["in the middle"]])
        console.say("said")
        emit([1])
    console.table(["a"], [["behind"]])
    out, err = capfd.readouterr()
    assert "in the middle" in err
    assert "said\n" in err
    assert out.startswith("[1]\n")
    assert "behind" in out
    assert "in the middle" not in out


def test_at_the_end_only_a_log_that_is_lost_or_full_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    discarded: list[Any] = []
    monkeypatch.setattr(console, "_discard", discarded.append)

    class Late(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "full")

    late = Late()
    monkeypatch.setattr(sys, "stdout", late)
    monkeypatch.setattr(console, "_tolerates_loss", False)
    console.flush_at_exit()
    assert discarded == []
    monkeypatch.setattr(console, "_tolerates_loss", True)
    console.flush_at_exit()
    assert discarded == [late]
    lasting = console._Lasting(stderr=False)
    assert lasting.write("abc") == 3
    lasting.flush()
    assert lasting.getvalue() == "abc", "as the stream itself has it"
