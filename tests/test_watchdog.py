"""Who looks after the processes of a run: who is gone, who hangs, who is told, who ends last."""

from __future__ import annotations

import signal
import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from finetune.distributed import position, watchdog
from finetune.distributed.processes import is_lost_connection
from finetune.distributed.watchdog import Watchdog
from finetune.errors import DataError, FinetuneError, ProcessError


class Notes(dict[str, bytes]):
    """A store of notes that processes leave for each other."""

    def add(self, key: str, more: int) -> int:
        self[key] = str(int(self.get(key, b"0")) + more).encode()
        return int(self[key])

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self[key] for key in keys]

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self.setdefault(key, value.encode())

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key, default)


def watching(monkeypatch: pytest.MonkeyPatch, rank: int = 0, world: int = 3) -> Any:
    monkeypatch.setattr(watchdog, "BEAT", 0.001)
    monkeypatch.setattr(watchdog, "SILENCE", 0.01)
    watch: Any = Watchdog.__new__(Watchdog)
    watch._rank, watch._others = rank, [other for other in range(world) if other != rank]
    watch._store, watch._minutes, watch._came = Notes(), 2.0, {}
    watch._next, watch._heard_of, watch._has_said = (rank + 1) % world, (0, 0.0), False
    watch._stop, watch._done = SimpleNamespace(local_signal=None), threading.Event()
    return watch


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (DataError("row 7"), "row 7", 3),
        (ValueError("a\nb"), "process 1 failed: ValueError: b", 1),
        (SystemExit(143), "process 1 left before the run was done", 143),
        (KeyboardInterrupt(), "process 1 left before the run was done", 1),
        (SystemExit("text"), "process 1 left before the run was done", 1),
        (SystemExit(0), "process 1 left before the run was done", 1),
        (SystemExit(3), "process 1 left before the run was done", 3),
        (MemoryError(), "process 1 failed: MemoryError: ", 1),
    ],
)
def test_what_ends_a_process_is_told_with_its_exit_code(
    error: BaseException, said: str, code: int
) -> None:
    assert watchdog._said(1, error) == said
    assert watchdog._code(error) == (error.exit_code if isinstance(error, FinetuneError) else code)


def test_the_first_report_of_all_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watching(monkeypatch)
    assert watch._report("mine", 4) is None
    other = watching(monkeypatch, rank=1)
    other._store = watch._store
    heard = other.reason_for(DataError("later"))
    assert (type(heard), str(heard), heard.exit_code) == (ProcessError, "mine", 4)
    assert other._has_said
    mine = DataError("first")
    assert watching(monkeypatch).reason_for(mine) is mine


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo] Connection closed by peer"), True),
        (RuntimeError("Read error: Connection reset by peer"), True),
        (RuntimeError("application timeout caused pair closure"), True),
        (dist.DistBackendError("NCCL"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("gloo"), False),
    ],
)
def test_a_lost_connection_is_told_from_an_error_of_ones_own(error: Exception, lost: bool) -> None:
    assert is_lost_connection(error) is lost


@pytest.mark.parametrize(
    ("gone", "said"),
    [([1], "process 1 is gone"), ([1, 2], "processes 1, 2 are gone"), ([], "")],
)
def test_who_gives_no_sign_of_life_is_gone(
    gone: list[int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = watching(monkeypatch)

    def sleep(seconds: float) -> None:
        for rank in {1, 2} - set(gone):
            watch._store.add(f"beat/{rank}", 1)

    monkeypatch.setattr(watchdog.time, "sleep", sleep)
    found = watch._who_is_gone()
    assert found.startswith(said)
    assert bool(found) is bool(gone)
    assert int(watch._store["beat/0"]) > 0  # who looks must not fall silent


def test_who_did_not_come_to_where_the_others_wait_is_hanging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = watching(monkeypatch)
    monkeypatch.setattr(watch, "_who_is_gone", lambda: "")
    watch._store.set("waiting/2", "")
    expected = "process 1 is hanging: the others have waited 2 minutes (training.process_timeout_minutes)"  # fmt: skip
    assert watch._who_is_missing() == expected
    watch._store.set("waiting/1", "")
    assert "though all of them are there" in watch._who_is_missing()


def test_who_has_passed_fewer_points_is_behind_and_who_moves_bytes_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(position, "passed", lambda: 5)
    watch = watching(monkeypatch)
    watch._store.set("passed/1", "5 0")
    watch._store.set("passed/2", "4 0")
    assert watch._behind() == [2]
    assert watch._behind(still_for=10) == []
    clock[0] = 8
    watch._store.set("passed/2", "4 100")  # it writes
    assert watch._behind(still_for=10) == []
    clock[0] = 17.9
    assert watch._behind(still_for=10) == []
    clock[0] = 18
    assert watch._behind(still_for=10) == [2]


@pytest.mark.parametrize(("waited", "told"), [(107.0, False), (109.0, True)])
def test_who_waits_for_its_device_nearly_as_long_as_is_allowed_says_who_hangs(
    waited: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = watching(monkeypatch)
    monkeypatch.setattr(watch, "_who_is_gone", lambda: "")
    monkeypatch.setattr(position, "waited", lambda: waited)
    monkeypatch.setattr(position, "passed", lambda: 5)
    watch._store.add("beat/1", 1)
    watch._store.set("passed/1", "4 0")
    watch._store.set("passed/2", "5 0")
    watch._look_after_others()
    assert ("failed" in watch._store) is told
    if told:
        assert b"process 1 is hanging" in watch._store["failed"]


@pytest.mark.parametrize(("quiet", "told"), [(59.0, False), (61.0, True)])
def test_the_next_process_is_looked_after_when_it_is_quiet_for_long(
    quiet: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    watch = watching(monkeypatch)
    monkeypatch.setattr(watch, "_who_is_gone", lambda: "process 1 is gone")
    watch._store.add("beat/1", 1)
    watch._look_after_others()  # a sign of life
    clock[0] = quiet
    watch._look_after_others()
    assert ("failed" in watch._store) is told


@pytest.mark.parametrize("signalled", [None, signal.SIGINT])
def test_who_is_left_alone_saves_and_goes_and_is_not_signalled_twice(
    signalled: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    monkeypatch.setattr(watchdog.os, "kill", lambda process, number: sent.append(number))
    watch = watching(monkeypatch)
    watch._stop.local_signal = signalled
    ended: list[Any] = []
    monkeypatch.setattr(watch, "_end", lambda *given: ended.append(given))
    watch._done.set()
    watch._left_alone()
    assert sent == ([] if signalled else [signal.SIGTERM])
    assert ended == []
    watch._done.clear()
    watch._minutes = 0.0001
    watch._left_alone()
    assert ended == [("process 0 is gone, or the launcher is", 143)]


@pytest.mark.parametrize(("rank", "waits"), [(0, 0.04), (1, 0.03)])
def test_a_process_that_does_not_end_by_itself_is_ended_and_the_keeper_of_the_store_last(
    rank: int, waits: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = watching(monkeypatch, rank=rank)
    watch._report("row 7", 3)
    monkeypatch.setattr(watchdog.files, "moved", lambda: 77)
    waited: list[float] = []
    ended: list[Any] = []

    class Done:
        def wait(self, seconds: float) -> bool:
            waited.append(seconds)
            return False

    watch._done = Done()
    monkeypatch.setattr(watch, "_end", lambda *given: (ended.append(given), setattr(watch, "_done", SimpleNamespace(wait=lambda seconds: True))))  # fmt: skip
    watch._look()
    assert ended == [("row 7", 3)]
    assert waited[1] == pytest.approx(waits)
    assert watch._store[f"passed/{rank}"] == f"{position.passed()} 77".encode()


@pytest.mark.parametrize("attempt", [None, "3"])
def test_notes_of_an_attempt_that_torchrun_restarts_are_not_read(
    attempt: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    if attempt is None:
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    else:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "7")
    monkeypatch.setattr(watchdog, "rank_and_world", lambda: (1, 3))
    monkeypatch.setattr(
        watchdog.dist, "TCPStore", lambda *given, **named: (*given, named), raising=False
    )
    monkeypatch.setattr(
        watchdog.dist, "PrefixStore", lambda prefix, store: asked.append((prefix, store)), raising=False,
    )  # fmt: skip
    monkeypatch.setattr(watchdog.threading.Thread, "start", lambda self: None)
    watch = Watchdog(2.0, SimpleNamespace())  # type: ignore[arg-type]
    # Who asks a store that is gone must be done before the launcher ends all of them (30 s).
    seconds = timedelta(seconds=10)
    assert asked == [
        (f"finetune/{attempt or 0}", ("here", 7, {"is_master": False, "timeout": seconds}))
    ]
    assert (watch._next, watch._others, watch._minutes) == (2, [0, 2], 2.0)
    assert watch._thread.daemon  # a process that fails must be able to end
