"""What is said: by rank 0 only, for a person or a log file, and beside JSON."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import console


@pytest.fixture
def terminal(monkeypatch):
    """Pretends that a person watches."""
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    monkeypatch.setattr(console, "_consoles", {})
    monkeypatch.setenv("COLUMNS", "100")


def test_only_rank_0_talks(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    console.say("a")
    console.warn("b")
    console.table(["c"], [[1]])
    with console.progress(1, "d") as meter, console.json_output() as emit:
        meter.advance()
        emit({"e": 1})
    assert capfd.readouterr() == ("", "")


def test_text_is_never_read_as_markup(terminal, capsys):
    console.say("[gMASK]<sop> [bold]not bold[/bold] :smile:")
    console.table(["[x]"], [["[/x]"]])
    out = capsys.readouterr().out
    assert "[gMASK]<sop> [bold]not bold[/bold] :smile:\n" in out
    assert "[x]" in out
    assert "[/x]" in out


def test_a_long_line_is_not_broken_on_a_terminal(terminal, capsys):
    console.say("x" * 300)
    assert capsys.readouterr().out == "x" * 300 + "\n"


def test_a_plain_table_is_aligned_also_in_chinese(capsys):
    console.table(["file", "rows"], [["你好", 5], ["abcdef", 12]])
    assert capsys.readouterr().out == (
        "file    rows\n"
        "------  ----\n"
        "你好       5\n"
        "abcdef    12\n"
    )  # fmt: skip


def test_in_a_log_file_progress_is_a_line_every_few_seconds_at_most(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress(100, "rows") as meter:
        for _ in range(100):
            now += 0.1875  # 18.75 seconds in all
            meter.advance()
    assert capsys.readouterr().out.splitlines() == [
        "rows: 27/100 (27 %), 14 s left, 5 s so far",
        "rows: 54/100 (54 %), 9 s left, 10 s so far",
        "rows: 81/100 (81 %), 4 s left, 15 s so far",
        "rows: 100/100 (100 %), 0 s left, 19 s so far",
    ]


def test_progress_of_an_unknown_total_is_a_count(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress(None, "rows") as meter:
        now = 61.0
        meter.advance(5, "still going")
    assert capsys.readouterr().out == "rows: 5, 1:01 so far, still going\n"


def test_with_json_standard_output_holds_only_json_whoever_prints(capfd):
    with console.json_output() as emit:
        console.say("talk")
        print("a library")
        os.write(1, b"a library in C\n")
        subprocess.run(["echo", "a child"], check=True)
        emit({"分数": 1.5})
    console.say("back")
    out, err = capfd.readouterr()
    assert out == '{"分数": 1.5}\nback\n'
    assert sorted(err.splitlines()) == ["a child", "a library", "a library in C", "talk"]


def test_durations_are_written_as_people_write_them():
    assert [console.duration(s) for s in (0.4, 59.6, 187, 3725)] == [
        "0 s", "1:00", "3:07", "1:02:05",
    ]  # fmt: skip


def test_a_log_on_a_full_disk_does_not_end_the_program_and_other_output_does() -> None:
    script = (
        "import sys; from finetune import console\n"
        "if sys.argv[1] == 'log': console.tolerate_lost_output()\n"
        "console.say('a line'); console.flush_at_exit(); sys.exit(6)\n"
    )
    codes = {}
    for kind in ("log", "result"):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run([sys.executable, "-c", script, kind], stdout=full, stderr=subprocess.DEVNULL)  # fmt: skip
        codes[kind] = done.returncode
    assert codes["log"] == 6
    assert codes["result"] != 6


LINES = """
import os, sys
from finetune import console
console.open_missing_streams()
if sys.argv[1] == "a run":
    console.tolerate_lost_output()
if sys.argv[2] == "closed pipe":
    os.dup2(pipe := os.pipe()[1], 1)
    os.close(pipe - 1)
if sys.argv[2] == "a terminal that goes":
    ours, theirs = os.openpty()
    os.dup2(theirs, 1)
    os.dup2(theirs, 2)
    os.environ["TERM"] = "xterm"
    os.close(theirs)
    console.say("while it is there")
    os.close(ours)
for number in range(3):
    console.say(f"line {number}")
    console.warn("of a warning")
    console.table(["a"], [["b"]])
with console.progress(9, "counting") as bar:
    bar.advance(9)
print("by others", flush=True)
console.flush_at_exit()
os._exit(6)
"""


@pytest.mark.parametrize("way", ["closed pipe", "a terminal that goes", "closed at the start"])
def test_a_run_outlives_whoever_reads_its_output(way: str) -> None:
    command = [sys.executable, "-c", LINES, "a run", way]
    if way == "closed at the start":
        command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    assert subprocess.run(command, capture_output=True).returncode == 6


def test_another_command_ends_with_its_reader() -> None:
    command = [sys.executable, "-c", LINES, "a command", "closed pipe"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (1, 120)  # 120: Python could not flush its output at the end
    assert "BrokenPipeError" in done.stderr


def test_a_lost_output_is_said_on_the_other_one() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LINES, "a run", "closed pipe"], capture_output=True, text=True
    )
    assert done.stderr.count("the output is gone") == 1
    assert "the run goes on" in done.stderr


EVIL = "\x1b]52;c;aGk=\x07\x1b[2J\r\x9b1m\u202eabc"


@pytest.mark.parametrize("watched", [True, False])
def test_control_characters_are_shown_and_never_obeyed(watched, monkeypatch, capsys):
    from rich.text import Text

    monkeypatch.setattr(console, "on_terminal", lambda: watched)
    monkeypatch.setattr(console, "_consoles", {})
    monkeypatch.setenv("COLUMNS", "200")
    styled = Text(EVIL, "green")
    for say in (console.say, console.warn, console.error):
        say(EVIL)
    console.say(styled)
    console.table([EVIL], [[EVIL], [styled]])
    said = "".join(capsys.readouterr())
    assert not {"\x07", "\r", "\x9b", "\u202e"} & set(said)
    assert "\x1b]" not in said
    assert "\x1b[2J" not in said
    assert said.count("␛]52;c;aGk=␇␛[2J␍") >= 5
    assert styled.plain == EVIL.replace("\x07", "").replace("\r", "")  # as rich itself keeps it


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("said", [console.warn, console.error])
def test_a_name_of_a_stranger_takes_no_pages(said, language, monkeypatch, capsys):
    monkeypatch.setenv("FINETUNE_LANG", language)
    said(f"{'x' * 200_000}: correct it, {'y' * 999} stays, and {'z' * 1000}")
    told = capsys.readouterr().err
    assert len(told) < 3000
    assert "y" * 999 in told
    assert f"{'x' * 500}…{'x' * 199}:" in told
    assert "correct it" in told
