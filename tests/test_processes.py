"""Processes of one run agree on an error, and on whose it is."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.distributed import processes
from finetune.distributed.processes import fail_together, is_lost_connection
from finetune.distributed.watchdog import ProcessError, Watchdog
from finetune.errors import DataError, FinetuneError


def among(monkeypatch: pytest.MonkeyPatch, world: int, others: list[Any]) -> None:
    """This process is number 0 of `world`; the others say what they say."""
    monkeypatch.setattr(processes, "rank_and_world", lambda: (0, world))
    monkeypatch.setattr(
        processes, "any_rank", lambda mine, _: mine or any(one is not None for one in others)
    )
    monkeypatch.setattr(processes, "gather_objects", lambda mine, *_: [mine, *others])


@pytest.mark.parametrize("world", [2, 3])
def test_a_block_fails_here_when_it_failed_in_another_process(
    monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    among(monkeypatch, world, [DataError("row 7 of the other"), *[None] * (world - 2)])
    with pytest.raises(DataError, match="row 7 of the other"), fail_together():
        pass
    with pytest.raises(DataError, match="row 1 of this one"), fail_together():
        raise DataError("row 1 of this one")
    among(monkeypatch, world, [None] * (world - 1))
    with fail_together():
        pass


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    among(monkeypatch, 1, [DataError("of nobody")])
    with fail_together():
        pass


@pytest.mark.parametrize("echo", [True, False])
def test_a_signal_that_follows_another_process_error_tells_of_that_error(
    monkeypatch: pytest.MonkeyPatch, echo: bool
) -> None:
    watch = Watchdog.__new__(Watchdog)
    watch._rank = 0
    told: list[str] = []
    theirs = ProcessError("process 1 failed: no memory")
    monkeypatch.setattr(watch, "_heard", lambda seconds: theirs)
    monkeypatch.setattr(watch, "_report", lambda text, code: told.append(text))
    error = FinetuneError("SIGTERM")
    error.is_echo = echo
    assert not is_lost_connection(error)
    assert watch.reason_for(error) is (theirs if echo else error)
    assert len(told) == (not echo)
