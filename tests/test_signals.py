"""A first signal is honoured at the end of the step, a second one at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.distributed.signals import StopFlag

LOOP = """
import sys, time
from finetune.distributed.signals import StopFlag
with StopFlag() as stop:
    print("ready", flush=True)
    while not stop.agree(lambda mine: mine):
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(float(sys.argv[1]))
    print("saved", flush=True)
sys.exit(stop.exit_code)
"""


def start(seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(seconds)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_lets_the_step_end(number: int, code: int) -> None:
    process = start(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert output == "asked\nsaved\n"
    assert process.returncode == code


def test_the_second_signal_stops_at_once() -> None:
    process = start(30)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=10)
    assert output == ""
    assert "at once" in errors
    assert process.returncode == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_launcher_s_echo_is_not_a_second_wish(number: int, code: int) -> None:
    process = start(0.3)
    process.send_signal(number)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert output == "saved\n"
    assert process.returncode == code


def test_no_signal_means_exit_code_0_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopFlag() as stop:
        assert (stop.is_set, stop.exit_code) == (False, 0)
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_a_signal_in_one_process_stops_all_with_the_same_code() -> None:
    here, there = StopFlag(), StopFlag()
    with here:
        os.kill(os.getpid(), signal.SIGTERM)
    assert not here.is_set  # the other process has not heard of it, and would go on
    numbers = [here.heard or 0, there.heard or 0]
    assert here.agree(lambda mine: max([mine, *numbers]))
    assert there.agree(lambda mine: max([mine, *numbers]))
    assert (here.exit_code, there.exit_code) == (143, 143)


def test_without_a_signal_all_agree_to_go_on() -> None:
    stop = StopFlag()
    assert not stop.agree(lambda mine: mine)
    assert not stop.is_set
