"""Files, locks and journals: what is written is whole or absent, by one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from disk_faults import ended_at

from finetune import console
from finetune.errors import ConfigError, OutputInUseError
from finetune.storage import cache, files, folders, journal, lock
from finetune.storage.outputs import check_output

ROOT = Path(__file__).parent.parent


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def make_link(path: Path) -> None:
    (path.parent / "elsewhere").write_text("mine")
    path.symlink_to(path.parent / "elsewhere")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


ODD: dict[str, Callable[[Path], Any]] = {
    "a link": make_link,
    "a link to nowhere": lambda path: path.symlink_to(path.parent / "nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a folder": lambda path: path.mkdir(),
}
WRITERS: dict[str, Callable[[Path], Any]] = {
    "write_file": lambda path: files.write_file(path, "new"),
    "staged_file": lambda path: files.staged_file(path).__enter__(),
    "whole_binary": lambda path: files.whole_binary(path).__enter__(),
    "check_output": lambda path: check_output(path, [], overwrite=True, is_ours=lambda _: True),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("writer", WRITERS)
def test_no_writer_takes_the_place_of_anything_but_a_file(
    tmp_path: Path, writer: str, kind: str
) -> None:
    output = tmp_path / "out"
    ODD[kind](output)
    before = output.lstat()
    with pytest.raises(ConfigError, match=f"{output} is {' '.join(kind.split()[:2])}"):
        WRITERS[writer](output)
    assert os.path.samestat(output.lstat(), before)
    assert not [name for name in names(tmp_path) if name.startswith(".staging")]
    if kind == "a link":
        assert (tmp_path / "elsewhere").read_text() == "mine"


@pytest.mark.parametrize("name", ["out", "模" * 85, "x" * 255])
def test_a_file_of_any_allowed_name_is_written_and_nothing_is_left_beside(
    tmp_path: Path, name: str
) -> None:
    files.write_file(tmp_path / name, "one")
    files.write_file(tmp_path / name, "two")
    assert names(tmp_path) == {name}
    assert (tmp_path / name).read_text() == "two"


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    files.write_file(tmp_path / "out", "old")

    def fail() -> None:
        with files.whole_file(tmp_path / "out") as file:
            file.write("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out").read_text() == "old"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is synced, and `rename`, in order."""
    found: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def synced(descriptor: int) -> None:
        found.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.partition(".staging-")[2]
                     or Path(f"/proc/self/fd/{descriptor}").readlink().name)  # fmt: skip
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda *a: (found.append("rename"), rename(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (found.append("rename"), replace(*a)))
    return found


def test_a_file_is_durable_before_it_has_its_name(tmp_path: Path, events: list[str]) -> None:
    files.write_file(tmp_path / "best.json", "{}")
    assert events[0].startswith("best.json.")
    assert events[1:] == ["rename", tmp_path.name]


def test_a_cache_entry_is_durable_before_it_has_its_name(tmp_path: Path, events: list[str]) -> None:
    def build(folder: Path) -> dict[str, Any]:
        (folder / "content").write_text("x")
        return {"a": 1}

    assert cache.open_or_build(tmp_path, "key", build).facts == {"a": 1}
    assert events == ["content", "manifest.json", "key", "rename", tmp_path.name]


# --- left behind ---------------------------------------------------------------------------------

HOLD_PART = (
    "import sys, time; from pathlib import Path; from finetune.storage import files\n"
    "with files.staged_file(Path(sys.argv[1])) as part:\n"
    "    part.write_text('half'); print('held', flush=True); time.sleep(60)\n"
)


def test_temporary_files_of_killed_writers_are_swept_and_those_of_live_ones_stay(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_PART, str(tmp_path / "out")], stdout=subprocess.PIPE, cwd=ROOT
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        [part] = names(tmp_path)
        (tmp_path / ".predictions-4.jsonl.99.part").write_text("of an earlier version")
        (tmp_path / ".hidden").write_text("mine")
        assert files.sweep(tmp_path) == [".predictions-4.jsonl.99.part"]
        writer.kill()
    assert files.sweep(tmp_path) == [part]
    assert names(tmp_path) == {".hidden"}


# --- locks ---------------------------------------------------------------------------------------


def no_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(console, "_warned", set())


NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF]


@pytest.fixture(params=["locks", *NO_LOCKS])
def kind_of_lock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param != "locks":
        no_locks(monkeypatch, request.param)
    return request.param


def test_one_holds_a_lock_until_it_lets_go(tmp_path: Path, kind_of_lock: Any) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file", tmp_path / "folder"):
        held = lock.try_lock(path)
        assert held is not None
        assert lock.is_held(path)
        assert lock.try_lock(path) is None
        held.release()
        assert not lock.is_held(path)
        again = lock.try_lock(path)
        assert again is not None
        again.release()
    assert names(tmp_path) == {"file", "folder"}


def test_without_file_locks_a_dead_owner_counts_for_nothing_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_locks(monkeypatch, errno.ENOLCK)
    if (child := os.fork()) == 0:
        lock.try_lock(tmp_path / "file")
        os._exit(9)
    os.waitpid(child, 0)
    capsys.readouterr()
    assert (tmp_path / ".file.owner").exists()
    assert not lock.is_held(tmp_path / "file")
    for _ in range(2):
        held = lock.try_lock(tmp_path / "file")
        assert held is not None
        held.release()
    assert capsys.readouterr().err.count("no file locks") == 1


def test_an_owner_on_another_machine_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_locks(monkeypatch, errno.ENOLCK)
    (tmp_path / ".file.owner").write_text("process 7 on elsewhere, started 1\n")
    assert lock.try_lock(tmp_path / "file") is None
    assert lock.holder(tmp_path / "file") == "process 7 on elsewhere"


@pytest.mark.parametrize("kind", ["a link", "a link to nowhere", "a pipe", "a socket"])
def test_a_lock_never_follows_a_link_nor_opens_a_device(tmp_path: Path, kind: str) -> None:
    ODD[kind](tmp_path / ".lock")
    with pytest.raises((ConfigError, OSError)):
        lock.try_lock(tmp_path / ".lock")
    if kind == "a link":
        assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_file_system_that_cannot_sync_folders_is_said_once_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsync = os.fsync

    def refused(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    monkeypatch.setattr(console, "_warned", set())
    for _ in range(3):
        files.write_file(tmp_path / "out", "x")
        with folders.staged(tmp_path / "folder", replace=True) as stage:
            (stage / "a").write_text("x")
    assert capsys.readouterr().err.count("cannot force names to the disk") == 2  # of two folders


# --- journals ------------------------------------------------------------------------------------

ROWS = [{"n": n} for n in range(5)]
TAILS = {
    "half a line": b'{"n": 5',
    "NULs": b"\0" * 64 + b"\n",
    "no object": b"[]\n",
    "text": b"x\n",
}


def test_the_name_of_a_new_journal_is_on_the_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(journal, "fsync_folder", synced.append)
    journal.append(tmp_path / "rows.jsonl", ROWS)
    assert synced == [tmp_path]
    journal.append(tmp_path / "rows.jsonl", ROWS)
    journal.append(tmp_path / "others.jsonl", ROWS, durable=False)
    assert synced == [tmp_path]


def test_a_last_line_without_its_line_break_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    journal.append(path, ROWS)
    with path.open("ab") as file:
        file.write(b'{"n": 5}')  # what comes next would stand on this line
    assert journal.recover(path, lambda row: row["n"]) == [0, 1, 2, 3, 4]
    journal.append(path, [{"n": 9}])
    assert [row["n"] for row in journal.rows(path)] == [0, 1, 2, 3, 4, 9]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("multiple", "kept"), [(1, 5), (2, 4), (6, 0)])
def test_only_whole_groups_of_whole_lines_are_kept(
    tmp_path: Path, tail: str, multiple: int, kept: int
) -> None:
    path = tmp_path / "rows.jsonl"
    journal.append(path, ROWS)
    with path.open("ab") as file:
        file.write(TAILS[tail] + b'{"n": 6}\n')
    found = journal.recover(path, lambda row: row["n"], multiple=multiple)
    assert found == [0, 1, 2, 3, 4][:kept]
    assert list(journal.rows(path)) == ROWS[:kept]
    journal.append(path, [{"n": 9}])
    assert list(journal.rows(path)) == [*ROWS[:kept], {"n": 9}]


def test_a_line_that_the_disk_had_no_room_for_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    journal.append(path, ROWS)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        journal.append(path, [{"n": 9}])
    monkeypatch.undo()
    assert list(journal.rows(path)) == ROWS


def start(output: Path, identity: str = "this", **options: bool) -> journal.ResumableOutput:
    made = journal.ResumableOutput(output, identity, **options)
    made.before = made.open(lambda row: row["n"])  # type: ignore[attr-defined]
    return made


def test_an_output_goes_on_behind_the_lines_of_the_same_command_only(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    first = start(output)
    first.journal.append(ROWS)
    first.close()
    again = start(output)
    assert again.before == [0, 1, 2, 3, 4]  # type: ignore[attr-defined]
    again.close()
    other = start(output, "that")
    assert other.before == []  # type: ignore[attr-defined]
    other.journal.append(ROWS[:1])
    other.finish()
    assert list(journal.rows(output)) == ROWS[:1]
    assert names(tmp_path) == {"out.jsonl"}


def test_one_process_writes_an_output(tmp_path: Path) -> None:
    first = start(tmp_path / "out.jsonl")
    with pytest.raises(OutputInUseError) as caught:
        start(tmp_path / "out.jsonl")
    assert caught.value.exit_code == 7
    first.finish()
    start(tmp_path / "out.jsonl").close()


def test_somebody_elses_part_file_is_not_emptied(tmp_path: Path) -> None:
    part = tmp_path / "out.jsonl.part"
    part.write_text("mine")
    with pytest.raises(ConfigError, match="did not write it"):
        start(tmp_path / "out.jsonl")
    assert part.read_text() == "mine"
    start(tmp_path / "out.jsonl", overwrite=True).finish()
    assert names(tmp_path) == {"out.jsonl"}


def write_all(output: Path) -> None:
    work = start(output)
    work.journal.append(ROWS[:3])
    work.journal.append(ROWS[3:])
    work.finish()


def test_killed_at_any_change_an_output_has_all_lines_once(tmp_path: Path) -> None:
    for last in range(100):
        folder = tmp_path / str(last)
        folder.mkdir()
        output = folder / "out.jsonl"
        code = ended_at(last, partial(write_all, output))
        work = start(output)
        work.journal.append(ROWS[len(work.before) :])  # type: ignore[attr-defined]
        work.finish()
        files.sweep(folder)
        assert list(journal.rows(output)) == ROWS
        assert names(folder) == {"out.jsonl"}
        if code == 0:
            break
        assert code == 9
    assert last > 8
