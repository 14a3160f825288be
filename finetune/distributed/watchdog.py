"""The processes of a run look after each other: what ends one ends all, and each says the same.

Every process gives a sign of life each second, in a thread, through the store by which the processes
found each other. A process that fails says why there, and the others stop waiting for it. When one
is gone without a word, the others find out who is silent; when one hangs, who did not come to where
the others waited for `training.process_timeout_minutes`.

Who waits on gloo is told by an exception that something is wrong. NCCL gives none: a process waits for
its accelerator for ever. So the threads watch by themselves, each the process with the next number, and
how long their own process has waited for its accelerator; they end it when it does not end by itself.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from finetune import console
from finetune.distributed import position
from finetune.distributed.processes import is_lost_connection, rank_and_world
from finetune.distributed.signals import StopFlag
from finetune.errors import FinetuneError, ProcessError
from finetune.storage import files

BEAT = 1.0
"""Seconds between two signs of life."""
SILENCE = 5.0
"""Without one for so long a process is gone; it is also how long the others get to end by themselves."""

QUIET = 60.0
"""Seconds without a sign of life after which the thread of another process says that one is gone.

Longer than SILENCE: work that holds Python's lock keeps a thread from giving signs, too.
"""
SHARE = 0.9
"""Of the process timeout: after the whole of it torch's own watchdog ends processes without a reason."""


@contextmanager
def watching(timeout_minutes: float, stop: StopFlag) -> Iterator[None]:
    """In here an error of one process ends all of them, with one reason.

    Raises:
        ProcessError: Another process failed, is gone, or hangs.
    """
    if rank_and_world()[1] == 1:
        yield
        return
    watch = Watchdog(timeout_minutes, stop)
    try:
        yield
        dist.barrier()  # the store may end with the process that ends first
    except BaseException as error:
        if (reason := watch.reason_for(error)) is error:
            raise
        raise reason from error
    finally:
        watch.stop()


class Watchdog:
    """Tells the other processes that this one lives, and finds out which of them does not."""

    def __init__(self, timeout_minutes: float, stop: StopFlag) -> None:
        self._stop = stop
        self._rank, world = rank_and_world()
        self._others = [rank for rank in range(world) if rank != self._rank]
        self._minutes = timeout_minutes
        # torchrun's store outlives an attempt that it restarts.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(  # type: ignore[attr-defined]
            f"finetune/{attempt}",
            dist.TCPStore(  # type: ignore[attr-defined]
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=2 * SILENCE),
            ),
        )
        self._has_said = False
        """Whether the process ends with its reason anyway."""
        self._next = (self._rank + 1) % world
        self._heard_of = 0, time.monotonic()
        """Signs of life of the next process, and since when there were as many."""
        self._came: dict[int, tuple[bytes, float]] = {}
        """How far each other process was when it was last seen to move, and when that was."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No longer watch, and no longer be watched."""
        self._done.set()
        self._thread.join()

    def reason_for(self, error: BaseException) -> BaseException:
        """Why the run ends: `error` itself, or what another process said or became first."""
        self._has_said = True
        try:
            if getattr(error, "is_echo", False):
                return self._heard(SILENCE) or error
            if not is_lost_connection(error):
                return self._report(_said(self._rank, error), _code(error)) or error
            self._store.set(f"waiting/{self._rank}", "")
            if (heard := self._heard(SILENCE)) is not None:
                return heard
            found = self._who_is_missing()
            return self._report(found, 1) or ProcessError(found)
        except RuntimeError:  # the store is gone, and process 0 or the launcher with it
            return ProcessError("process 0 is gone, or the launcher is", exit_code=1)

    def _report(self, text: str, code: int) -> ProcessError | None:
        """The first report of all processes; None when it is this one."""
        mine = json.dumps([text, code])
        first = self._store.compare_set("failed", "", mine).decode()
        return None if first == mine else ProcessError(*json.loads(first))

    def _heard(self, seconds: float) -> ProcessError | None:
        """The first report, if there is one within `seconds`."""
        until = time.monotonic() + seconds
        while not (there := self._store.check(["failed"])) and time.monotonic() < until:
            time.sleep(BEAT / 4)
        return ProcessError(*json.loads(self._store.get("failed"))) if there else None

    def _who_is_gone(self) -> str:
        before = {rank: self._store.add(f"beat/{rank}", 0) for rank in self._others}
        until = time.monotonic() + SILENCE
        while time.monotonic() < until:  # the thread that looks must not fall silent itself
            self._store.add(f"beat/{self._rank}", 1)
            time.sleep(BEAT)
        gone = [rank for rank in self._others if self._store.add(f"beat/{rank}", 0) == before[rank]]
        if not gone:
            return ""
        return f"{_named(gone)} gone without a word: killed (by a lack of memory?), or the machine is down"  # fmt: skip

    def _who_is_missing(self) -> str:
        if found := self._who_is_gone():
            return found
        return self._hanging(
            [rank for rank in self._others if not self._store.check([f"waiting/{rank}"])]
        )

    def _hanging(self, absent: list[int]) -> str:
        return (
            f"{_named(absent)} hanging: the others have waited {self._minutes:g} minutes "
            "(training.process_timeout_minutes)"
            if absent
            else "the connection between the processes was lost, though all of them are there"
        )

    def _look_after_others(self) -> None:
        """Report what no exception will say: a process that is gone, one that hangs."""
        beats, since = self._heard_of
        now = self._store.add(f"beat/{self._next}", 0)
        if now != beats:
            self._heard_of = now, time.monotonic()
        elif time.monotonic() - since > min(QUIET, 60 * self._minutes):
            if found := self._who_is_gone():
                self._report(found, 1)
            self._heard_of = beats, time.monotonic()
        limit = 60 * self._minutes
        if position.waited() > SHARE * limit:
            self._report(self._who_is_gone() or self._hanging(self._behind()), 1)
        if not position.waited_patiently():
            self._came.clear()
        elif standing := self._behind(still_for=limit):
            self._report(self._who_is_gone() or self._hanging(standing), 1)

    def _behind(self, still_for: float = 0.0) -> list[int]:
        """Who has passed fewer points, and of those who neither passes one nor moves a byte so long."""
        now = time.monotonic()
        came = self._store.multi_get([f"passed/{rank}" for rank in self._others])
        for rank, text in zip(self._others, came, strict=True):
            if self._came.get(rank, (b"", now))[0] != text:
                self._came[rank] = text, now
        return [
            rank
            for rank, (text, since) in self._came.items()
            if now - since >= still_for and int(text.split()[0]) < position.passed()
        ]

    def _look(self) -> None:
        """The thread: gives signs of life, and ends a process that does not end by itself."""
        while not self._done.wait(BEAT):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                self._store.set(f"passed/{self._rank}", f"{position.passed()} {files.moved()}")
                failed = self._store.check(["failed"])
                if not failed:
                    self._look_after_others()
            except dist.DistNetworkError:
                return self._left_alone()
            except dist.DistStoreError:
                continue  # busy
            if failed:
                report = json.loads(self._store.get("failed"))
                # Process 0 may keep the store, from which the others read.
                if self._done.wait((3 if self._rank else 4) * SILENCE):
                    return None
                self._end(*report)
        return None

    def _end(self, text: str, code: int) -> None:
        """End a process that waits where nothing will come; whoever reads its output is told why."""
        if not self._has_said:
            console.error(text)
        console.flush_at_exit()
        os._exit(code)

    def _left_alone(self) -> None:
        """The store is gone: without a launcher nobody would end this process, so it saves and goes."""
        if (
            self._stop.local_signal is None
        ):  # else it does so already, and a second signal would cut it short
            os.kill(os.getpid(), signal.SIGTERM)
        if not self._done.wait(60 * self._minutes):
            self._end("process 0 is gone, or the launcher is", 128 + signal.SIGTERM)


def _said(rank: int, error: BaseException) -> str:
    if isinstance(error, FinetuneError):
        return str(error)
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return f"process {rank} left before the run was done"
    last = (str(error).strip().splitlines() or [""])[-1]
    return f"process {rank} failed: {type(error).__name__}: {last}"


def _code(error: BaseException) -> int:
    code = getattr(error, "exit_code", getattr(error, "code", 1))
    return code if isinstance(code, int) and code else 1


def _named(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks))
    return f"process {names} is" if len(ranks) == 1 else f"processes {names} are"
