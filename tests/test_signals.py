"""A first signal is honoured at the end of the step, a second urgent one at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from finetune.distributed import signals
from finetune.distributed.signals import StopFlag

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
USR1, USR2, XCPU = signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU


class Ended(BaseException):
    """What os._exit would do."""


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[StopFlag]:
    def leave(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", leave)
    stop = StopFlag().install()
    yield stop
    stop.uninstall()


@pytest.mark.parametrize("number", [TERM, INT, HUP, USR1, USR2, XCPU])
def test_the_first_signal_is_a_request_that_sets_the_exit_code(
    stop: StopFlag, number: signal.Signals
) -> None:
    signal.raise_signal(number)
    assert stop.local_signal == number
    assert not stop.is_set  # the other processes have not heard of it, and would go on
    stop.sync()
    assert (stop.is_set, stop.exit_code) == (True, 128 + number)


@pytest.mark.parametrize(
    ("first", "second", "ends"),
    [
        (INT, INT, True),
        (TERM, INT, True),
        (HUP, INT, True),
        (TERM, TERM, True),
        (INT, TERM, True),
        (USR1, TERM, False),  # SLURM's notice, then its end of time
        (HUP, TERM, False),
        (XCPU, XCPU, False),  # the kernel sends one every second
        (HUP, HUP, False),
        (TERM, USR1, False),
        (TERM, HUP, False),
    ],
)
def test_only_an_urgent_second_signal_ends_at_once(
    stop: StopFlag,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    first: signal.Signals,
    second: signal.Signals,
    ends: bool,
) -> None:
    monkeypatch.setattr(signals, "ECHO", -1.0)
    signal.raise_signal(first)
    if ends:
        with pytest.raises(Ended, match=str(128 + second)):
            signal.raise_signal(second)
        assert "stopping at once, without saving" in capfd.readouterr().err
    else:
        signal.raise_signal(second)
        assert stop.local_signal == first


@pytest.mark.parametrize("number", [TERM, INT])
def test_a_launcher_s_echo_is_not_a_second_wish(stop: StopFlag, number: signal.Signals) -> None:
    signal.raise_signal(number)
    signal.raise_signal(TERM)
    assert stop.local_signal == number


@pytest.mark.parametrize(
    ("second", "after", "ends"),
    [(TERM, 4.9, False), (TERM, 5.1, True), (INT, 0.0, True), (USR1, 9.0, False)],
)
def test_a_launcher_echoes_within_five_seconds_and_a_person_s_ctrl_c_is_no_echo(
    stop: StopFlag, second: signal.Signals, after: float, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    signal.raise_signal(TERM)
    now[0] += after
    if ends:
        with pytest.raises(Ended):
            signal.raise_signal(second)
    else:
        signal.raise_signal(second)
    assert stop.local_signal == TERM


def test_a_clock_that_is_set_back_between_two_signals_changes_nothing(
    stop: StopFlag, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1e9]
    monkeypatch.setattr(signals.time, "time", lambda: now[0])
    monkeypatch.setattr(signals.time, "monotonic", lambda: 6.0 if now[0] < 1e9 else 0.0)
    signal.raise_signal(TERM)
    now[0] -= 3600
    with pytest.raises(Ended):
        signal.raise_signal(TERM)


def test_a_second_signal_ends_at_once_though_the_terminal_is_gone(
    stop: StopFlag, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(file: int, text: bytes) -> None:
        raise OSError

    monkeypatch.setattr(signals.os, "write", gone)
    signal.raise_signal(INT)
    with pytest.raises(Ended, match="130"):
        signal.raise_signal(INT)


def test_nohup_s_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        stop = StopFlag().install()
        signal.raise_signal(HUP)
        assert stop.local_signal is None
        stop.uninstall()
        assert signal.getsignal(HUP) == signal.SIG_IGN
    finally:
        signal.signal(HUP, before)


def test_no_signal_means_exit_code_0_and_the_old_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    stop = StopFlag().install()
    assert (stop.sync(3), stop.is_set, stop.exit_code) == (3, False, 0)
    assert all(signal.getsignal(number) != old for number, old in before.items())
    stop.uninstall()
    assert {number: signal.getsignal(number) for number in before} == before


def test_what_was_agreed_stays_agreed_though_nobody_says_it_again(stop: StopFlag) -> None:
    signal.raise_signal(TERM)
    stop.sync()
    stop.local_signal = None  # as in a process that got none
    assert (stop.sync(), stop.exit_code) == (0, 143)


def test_a_signal_in_one_process_stops_all_with_the_same_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, there = StopFlag(), StopFlag()
    here.local_signal = TERM
    asked = [[0, TERM], [1, 0]]  # what the two processes bring to the reduction
    monkeypatch.setattr(signals, "reduce_max", lambda values: [max(pair) for pair in zip(*asked, strict=True)])  # fmt: skip
    assert (here.sync(0), there.sync(1)) == (1, 1)
    assert (here.exit_code, there.exit_code) == (143, 143)
