"""Locks, clocks that are set back, and several that want one thing at once."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from examples import LONG, dialogue, tiny_template
from test_storage_rules import sealed

from finetune import console
from finetune.artifacts import checkpoint, weights
from finetune.artifacts.run_dir import LOCK, RunDirectory
from finetune.data.examples.dataset import prepare
from finetune.errors import ConfigError
from finetune.storage import cache, files, folders, journal, lock, manifest
from finetune.storage.outputs import write_marked

# --- locks ---------------------------------------------------------------------------------------


def test_who_only_asks_disturbs_nobody_and_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.touch()
    descriptor = os.open(file, os.O_RDWR)
    lock.fcntl.flock(descriptor, lock.fcntl.LOCK_SH)
    assert not lock.is_held(file), "two may ask at once"
    threading.Timer(0.02, os.close, [descriptor]).start()
    held = lock.try_lock(file)
    assert held is not None
    held.note("process 12345 on a machine\n")
    held.note("short")
    assert file.read_text() == "short"
    assert lock.holder(file) == "short"
    held.release()
    file.write_text("\n")
    assert lock.holder(file) == "another process"
    assert lock.holder(tmp_path / "none") == "another process"


def test_a_short_wait_is_not_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(console, "say", told.append)
    held = lock.try_lock(tmp_path / "a")
    assert held is not None
    threading.Timer(0.02, held.release).start()
    with lock.locked(tmp_path / "a", "waiting"):
        assert lock.is_held(tmp_path / "a")
    assert told == []
    assert not lock.is_held(tmp_path / "a")


def test_a_process_is_looked_for_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lock.is_running(os.getpid())
    assert not lock.is_running(999_999_999)

    def none(*_: object, **__: object) -> str:
        raise OSError(errno.ENOENT, "no /proc")

    monkeypatch.setattr(Path, "read_text", none)
    for error, said_ in ((ProcessLookupError, ""), (PermissionError, "unknown"), (None, "unknown")):

        def kill(process: int, number: int, error: Any = error) -> None:
            assert (process, number) == (7, 0), "0 only asks"
            if error:
                raise error

        monkeypatch.setattr(lock.os, "kill", kill)
        assert lock._started(7) == said_


@pytest.mark.parametrize(("kind", "told"), [("a link", "is a link, which a lock never follows"), ("a pipe", "is not a regular file"), ("a socket", "is not a regular file")])  # fmt: skip
def test_what_is_no_file_to_lock_is_named(tmp_path: Path, kind: str, told: str) -> None:
    from test_storage import ODD

    ODD[kind](tmp_path / "a")
    for ask in (lock.try_lock, lock.is_held):
        with pytest.raises(ConfigError, match=told):
            ask(tmp_path / "a")


# --- a clock that is set back --------------------------------------------------------------------


@contextmanager
def clock_set_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The wall clock goes back an hour whenever somebody looks at it."""
    now = [time.time()]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", back)
        yield


def test_a_clock_set_back_changes_no_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(console, "say", told.append)
    monkeypatch.setattr(lock, "_QUIET_SECONDS", 0.01)
    monkeypatch.setattr(lock, "_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(cache, "_RANK_0_HEAD_START_SECONDS", 0.05)
    monkeypatch.setenv("LOCAL_RANK", "1")
    held = lock.try_lock(tmp_path / "a")
    assert held is not None
    with clock_set_back(monkeypatch):
        threading.Timer(0.1, held.release).start()
        with lock.locked(tmp_path / "a", "waiting"):
            assert told == ["waiting"]
        assert cache.open_or_build(tmp_path, "key", lambda _: {"n": 1}).facts == {"n": 1}
        monkeypatch.setattr(console, "PLAIN_PROGRESS_SECONDS", 0.0)
        with console.progress(2, "rows") as bar:
            bar.advance()
        assert "-" not in bar._line()


def test_a_clock_set_back_makes_no_checkpoint_older_and_sweeps_nothing_that_lives(
    tmp_path: Path,
) -> None:
    now = time.time()
    for step in (
        1,
        2,
        3,
    ):  # each an hour before the one before it, and its manifest before its files
        folder = sealed(tmp_path / f"checkpoint-{step}", x=str(step))
        for name, hour in (("x", step), ("manifest.json", step + 0.5), (".", step)):
            os.utime(folder / name, (now - 3600 * hour,) * 2)
    assert checkpoint.newest_good(tmp_path)[0] == tmp_path / "checkpoint-3"
    assert not manifest.is_untouched(tmp_path / "checkpoint-3"), "so it is read instead"
    done = checkpoint.rotate(tmp_path, 1, whole=tmp_path / "checkpoint-3")
    assert [path.name for path in done.removed] == ["checkpoint-1", "checkpoint-2"]
    assert not done.problem
    with folders.staged(tmp_path / "live") as stage, RunDirectory.open(tmp_path):
        (tmp_path / ".staging-dead").mkdir()
        for name in (stage, tmp_path / LOCK, tmp_path / ".staging-dead"):
            for moment in (now + 86_400, 0):
                os.utime(name, (moment, moment))
                assert RunDirectory.user(tmp_path) is not None
        assert [line.split(":")[0] for line in folders.sweep(tmp_path)] == ["removed .staging-dead"]
        assert stage.is_dir()


# --- four at once --------------------------------------------------------------------------------


def test_four_threads_that_want_one_entry_build_it_once(tmp_path: Path) -> None:
    together, made = threading.Barrier(4), []

    def build(stage: Path) -> dict[str, Any]:
        made.append(stage)
        time.sleep(0.02)
        (stage / "x").write_text("whole")
        return {"n": len(made)}

    def ask(_: int) -> Any:
        together.wait()
        return cache.open_or_build(tmp_path, "key", build)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(ask, range(4)))
    assert len(made) == 1
    assert found == [cache.Entry(tmp_path / "key", {"n": 1})] * 4


def test_four_preparations_of_the_same_data_at_once_read_it_once_and_have_the_same_rows(
    tmp_path: Path,
) -> None:
    template = tiny_template(tmp_path / "tokenizer")
    go, (answers, answer) = tmp_path / "go", os.pipe()

    class Talks:
        def __iter__(self) -> Any:
            with (tmp_path / "reads").open("a") as file:
                file.write("read\n")
            time.sleep(0.05)
            return iter([dialogue(2), dialogue(3)])

    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            with suppress(BaseException):
                while not go.exists():
                    time.sleep(0.002)
                found = prepare(Talks(), template, LONG, key="k", cache_root=tmp_path / "cache")
                ids = [found[n].input_ids.tolist() for n in range(len(found))]
                os.write(answer, f"{found.fingerprint} {hash(str(ids))} {len(found)}\n".encode())
            os._exit(0)
        children.append(child)
    go.touch()
    for child in children:
        os.waitpid(child, 0)
    os.close(answer)
    with os.fdopen(answers, "rb") as file:
        told = file.read().decode().splitlines()
    assert len(told) == 4
    assert len(set(told)) == 1
    assert told[0].endswith(" 2")
    assert (tmp_path / "reads").read_text() == "read\n"


def test_a_fingerprint_reads_every_tensor_of_every_file(tmp_path: Path) -> None:
    from test_artifact_rules import write_tensors

    (tmp_path / "config.json").write_text("{}")
    index = '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    seen = set()
    for a, b in ((0, 0), (1, 0), (0, 1)):
        write_tensors(tmp_path / "1.safetensors", {"a": (3,)}, content=a)
        write_tensors(tmp_path / "2.safetensors", {"b": (300,)}, content=b)
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        seen.add(weights.model_fingerprint(tmp_path))
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert len(seen) == 3


def test_an_output_of_windows_goes_on_behind_whole_ones(tmp_path: Path) -> None:
    for window, kept in ((2, [1, 2]), (1, [1, 2, 3])):
        output = tmp_path / f"{window}.jsonl"
        for rows in ([{"n": 1}, {"n": 2}, {"n": 3}], []):
            growing = journal.ResumableOutput(output, "id", window=window)
            found = growing.open(lambda row: row["n"])
            growing.journal.append(rows)
            growing.close()
        assert found == kept


# --- who builds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["the first has it", "the first is at it", "the first replaced it", "nobody comes"])  # fmt: skip
def test_the_others_of_a_machine_leave_the_work_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder, file, pauses = tmp_path / "key", tmp_path / "key.lock", []
    held: list[Any] = []
    if what == "the first replaced it":
        folder.mkdir()
        os.utime(folder, (1, 1))

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        assert len(pauses) < 3
        if what == "the first has it":
            folder.mkdir()
        elif what == "the first is at it":
            held.append(lock.try_lock(file))
        elif what == "the first replaced it":
            os.utime(folder, (2, 2))
        else:
            monkeypatch.setattr(cache, "time", SimpleNamespace(monotonic=lambda: float("inf")))

    monkeypatch.setattr(cache, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pause))
    monkeypatch.setenv("LOCAL_RANK", "1")
    cache._wait_for_first_rank(folder, file)
    assert pauses == [cache._POLL_SECONDS]
    monkeypatch.setenv("LOCAL_RANK", "0")
    cache._wait_for_first_rank(tmp_path / "other", file)
    assert len(pauses) == 1, "the first waits for nobody"


def test_a_file_that_is_being_written_is_not_swept_and_its_folders_are_made(tmp_path: Path) -> None:
    with files.staged_file(tmp_path / "x/y/z") as part:
        part.write_text("half")
        assert files.sweep(tmp_path / "x/y") == []
    assert (tmp_path / "x/y/z").read_text() == "half"
    assert [path.name for path in (tmp_path / "x/y").iterdir()] == ["z"]


def test_batches_of_a_window_that_is_written_already_are_forgotten(tmp_path: Path) -> None:
    growing = journal.Journal(tmp_path / "a", window=2)
    growing.open(dict)
    growing.note(0, ["x"])
    journal.append(tmp_path / "a", [{"n": 1}, {"n": 2}])  # and was killed before it removed them
    again = journal.Journal(tmp_path / "a", window=2)
    assert again.open(dict) == [{"n": 1}, {"n": 2}]
    assert again.batches() == {}


def test_a_place_for_the_cache_is_asked_whether_it_can_be_written_and_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(cache.os, "access", lambda path, mode: asked.append((path, mode)) or True)  # type: ignore[func-returns-value]
    assert cache._can_be_made(tmp_path / "a/b")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_a_link_to_a_folder_that_is_ready_moves_nothing(tmp_path: Path) -> None:
    outside = sealed(tmp_path / "outside", a="mine")
    folder = sealed(tmp_path / "theirs", b="1")
    (folder / folders.READY).symlink_to(outside)
    folders.finish_result(folder)
    assert (outside / "a").read_text() == "mine"
    assert not (folder / "a").exists()
    assert not manifest.is_untouched(folder), "there is a link in it"
    os.mkfifo(tmp_path / "page.html")
    with pytest.raises(ConfigError, match=r"page\.html is a pipe"):
        write_marked(tmp_path / "page.html", "mark", mark="mark")
