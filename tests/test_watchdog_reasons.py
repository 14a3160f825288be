"""What ends a run of several processes: the reason that is heard, the thread, who stops and comes again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch.distributed as dist
from test_watchdog import watching

from finetune.distributed import position, watchdog
from finetune.errors import DataError, FinetuneError, ProcessError

# --- why a run ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("heard", [True, False])
def test_who_waited_in_vain_hears_the_reason_or_finds_out_who_is_missing(
    heard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = watching(monkeypatch, rank=1)
    monkeypatch.setattr(watch, "_who_is_missing", lambda: "process 2 is hanging")
    if heard:
        watch._store.set("failed", '["row 7", 3]')
    lost = RuntimeError("Connection closed by peer")
    reason = watch.reason_for(lost)
    expected = ("row 7", 3) if heard else ("process 2 is hanging", 1)
    assert (type(reason), str(reason), reason.exit_code) == (ProcessError, *expected)
    assert watch._store.check(["waiting/1"])  # whoever else waits knows that this one does
    assert watch._has_said
    assert watch._store["failed"].startswith(b'["row 7"' if heard else b'["process 2')


def test_a_reason_that_comes_while_it_is_waited_for_is_heard_and_none_is_no_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = watching(monkeypatch)
    slept: list[float] = []
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += 1
        if clock[0] == 3:
            watch._store.set("failed", '["row 7", 3]')

    monkeypatch.setattr(watchdog.time, "sleep", sleep)
    assert watch._heard(2.5) is not None  # looked at once more behind the end of the time
    assert len(slept) == 3
    del watch._store["failed"]
    clock[0] = 10
    assert watch._heard(2.0) is None
    assert clock[0] == 12


def test_an_echo_without_a_reason_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watching(monkeypatch)
    echo = FinetuneError("SIGTERM")
    echo.is_echo = True
    assert watch.reason_for(echo) is echo
    assert "failed" not in watch._store


@pytest.mark.parametrize("error", [DataError("row 7"), RuntimeError("gloo: broken pair")])
def test_without_the_store_process_0_or_the_launcher_is_gone(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = watching(monkeypatch, rank=1)

    def gone(*_: Any) -> None:
        raise RuntimeError("Broken pipe")

    monkeypatch.setattr(watch._store, "compare_set", gone)
    monkeypatch.setattr(watch._store, "set", gone)
    reason = watch.reason_for(error)
    assert str(reason) == "process 0 is gone, or the launcher is"
    assert (type(reason), reason.exit_code) == (ProcessError, 1)


def test_a_process_that_is_gone_is_named_before_one_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = watching(monkeypatch)
    monkeypatch.setattr(watch, "_who_is_gone", lambda: "process 1 is gone")
    monkeypatch.setattr(watch, "_behind", lambda **_: [2])
    assert watch._who_is_missing() == "process 1 is gone"
    watch._store.add("beat/1", 1)
    monkeypatch.setattr(position, "waited", lambda: 1e9)
    watch._look_after_others()
    assert watch._store["failed"] == b'["process 1 is gone", 1]'


@pytest.mark.parametrize(("minutes", "quiet", "told"), [(0.5, 31.0, True), (0.5, 29.0, False), (5.0, 61.0, True)])  # fmt: skip
def test_a_quiet_process_is_looked_for_after_a_minute_or_a_shorter_timeout_and_not_each_second(
    minutes: float, quiet: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looks = [0.0], [0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    watch = watching(monkeypatch)
    watch._minutes = minutes

    def look() -> str:
        looks[0] += 1
        return ""  # it holds the lock, and goes on

    monkeypatch.setattr(watch, "_who_is_gone", look)
    watch._store.add("beat/1", 1)
    watch._look_after_others()
    for later in (0.0, 0.2, 0.4):
        clock[0] = quiet + later
        watch._look_after_others()
    assert looks == [int(told)]
    assert "failed" not in watch._store


@pytest.mark.parametrize(("patient", "told"), [(0.0, False), (500.0, True)])
def test_who_waits_for_a_disk_says_who_stands_still_for_the_whole_timeout(
    patient: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(position, "waited_patiently", lambda: patient)
    monkeypatch.setattr(position, "passed", lambda: 5)
    watch = watching(monkeypatch)
    monkeypatch.setattr(watch, "_who_is_gone", lambda: "")
    watch._store.set("passed/1", "5 0")
    watch._store.set("passed/2", "4 7")
    for now in (0, 60, 119):
        clock[0] = now
        watch._store.add("beat/1", 1)
        watch._look_after_others()
        assert "failed" not in watch._store
    clock[0] = 120
    watch._store.add("beat/1", 1)
    watch._look_after_others()
    assert ("failed" in watch._store) is told
    assert (watch._came == {}) is (not told)
    if told:
        assert b"process 2 is hanging: the others have waited 2 minutes" in watch._store["failed"]


# --- the thread ---------------------------------------------------------------------------------------


def test_the_thread_goes_on_where_the_store_is_busy_and_saves_itself_where_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = watching(monkeypatch)
    events: list[str] = []
    errors: list[Any] = [dist.DistStoreError("busy"), None, dist.DistNetworkError("gone")]

    def beat(key: str, more: int) -> int:
        if error := errors.pop(0):
            raise error
        return 1

    monkeypatch.setattr(watch._store, "add", beat)
    monkeypatch.setattr(watch, "_look_after_others", lambda: events.append("looked"))
    monkeypatch.setattr(watch, "_left_alone", lambda: events.append("alone"))
    watch._look()
    assert events == ["looked", "alone"]
    assert errors == []


@pytest.mark.parametrize("has_said", [False, True])
def test_a_process_that_is_ended_says_why_once_and_with_the_code_of_the_reason(
    has_said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events: ClassVar[list[Any]] = []
    monkeypatch.setattr(watchdog.console, "flush_at_exit", lambda: events.append("flushed"))
    monkeypatch.setattr(watchdog.os, "_exit", events.append)
    watch = watching(monkeypatch)
    watch._has_said = has_said
    watch._end("row 7", 3)
    assert events == ["flushed", 3]
    assert ("row 7" in capsys.readouterr().err) is not has_said


class Watch:
    """A watchdog that gives `reason` for every error."""

    def __init__(self, minutes: float, stop: Any) -> None:
        Watch.events = [minutes]

    def reason_for(self, error: BaseException) -> BaseException:
        return Watch.reason or error

    def stop(self) -> None:
        Watch.events.append("stop")

    events: ClassVar[list[Any]] = []
    reason: BaseException | None = None


@pytest.mark.parametrize("reason", [None, ProcessError("process 1 failed")])
@pytest.mark.parametrize("fails", [False, True])
def test_a_watched_block_meets_the_others_at_its_end_or_raises_the_first_reason(
    fails: bool, reason: ProcessError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(watchdog, "Watchdog", Watch)
    monkeypatch.setattr(watchdog.dist, "barrier", lambda: Watch.events.append("met"))
    monkeypatch.setattr(Watch, "reason", reason)
    error = DataError("row 7")

    def block() -> None:
        with watchdog.watching(2.5, SimpleNamespace()):  # type: ignore[arg-type]
            if fails:
                raise error

    if not fails:
        block()
        assert Watch.events == [2.5, "met", "stop"]
        return
    with pytest.raises(FinetuneError) as caught:
        block()
    assert caught.value is (reason or error)
    assert caught.value.__cause__ is (error if reason else None)
    assert Watch.events == [2.5, "stop"]


def test_one_process_is_watched_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "Watchdog", lambda *_: pytest.fail("nobody is there"))
    with watchdog.watching(2.5, SimpleNamespace()):  # type: ignore[arg-type]
        pass


def test_a_stopped_process_is_told_from_one_that_is_killed_by_the_signs_that_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGSTOP: silent for longer than SILENCE, and there again before anybody gives it up."""
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    watch = watching(monkeypatch)
    stopped_until = [50.0]

    def sleep(seconds: float) -> None:
        clock[0] += 0.005
        if clock[0] >= stopped_until[0]:
            watch._store.add("beat/1", 1)
        watch._store.add("beat/2", 1)

    monkeypatch.setattr(watchdog.time, "sleep", sleep)
    watch._store.add("beat/1", 1)
    watch._look_after_others()
    clock[0] = 45.0
    watch._look_after_others()
    assert "failed" not in watch._store  # not yet QUIET
    clock[0] = 61.0  # it was continued meanwhile, and its thread has not come to a sign yet
    watch._look_after_others()
    assert "failed" not in watch._store
    stopped_until[0] = 1e9  # stopped again, for good
    for now in (200.0, 261.0):
        clock[0] = now
        watch._look_after_others()
    assert b"process 1 is gone without a word" in watch._store["failed"]
