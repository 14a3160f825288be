"""The signals that ask a run to end, honoured at the end of the step.

| signal | from | |
|---|---|---|
| TERM, INT | a process manager, Ctrl-C | finish the step, save, exit 128 + n; a second one ends at once |
| HUP | a terminal that is gone | the same, unless `nohup` has it ignored: then it stays ignored |
| USR1, USR2 | SLURM's `--signal`, other schedulers | the same; those that follow change nothing |
| XCPU | the limit on processor time | the same |
| QUIT, ALRM, KILL | | end at once, without saving |
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from finetune.distributed.processes import reduce_max

SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
)  # fmt: skip

URGENT = (signal.SIGTERM, signal.SIGINT)
"""A second one of these means now. A scheduler sends the others first and SIGTERM when time is up."""

ECHO = 5.0
"""A SIGTERM this soon (seconds) after the first signal is the same wish.

torchrun passes on what it gets, and a process manager that signals a whole group has sent it to the
workers already. A second Ctrl-C is a person's.
"""


class StopFlag:
    """Raised by the first signal that asks to stop; a second urgent one ends the process at once.

    Evaluation and generation look at `local_signal` between batches. Everything else, which every
    process must decide alike, looks at `agreed_signal`, which only `sync` changes.
    """

    def __init__(self) -> None:
        self.local_signal: int | None = None
        """The signal that arrived first in this process; others may not have got it yet."""
        self.agreed_signal: int | None = None
        """The signal that all processes know of."""
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def install(self) -> StopFlag:
        """Take over the signals; the main thread must call it."""
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup
            self._previous[number] = signal.signal(number, self._arrived)
        return self

    def uninstall(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def is_set(self) -> bool:
        """Whether the run comes to an end; the same in every process."""
        return self.agreed_signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number: 143 after SIGTERM, 130 after Ctrl-C; 0 before any."""
        return 0 if self.agreed_signal is None else 128 + self.agreed_signal

    def sync(self, outcome: int = 0) -> int:
        """Learn in every process of a signal to one of them; returns the largest `outcome` of all.

        Every process must call it at the same points, so that all stop after the same step.
        """
        largest, number = reduce_max([outcome, self.local_signal or 0])
        self.agreed_signal = number or self.agreed_signal
        return largest

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.local_signal is None:
            self.local_signal, self._since = number, time.monotonic()
            return
        is_echo = number == signal.SIGTERM and time.monotonic() - self._since <= ECHO
        after_a_notice = number == signal.SIGTERM and self.local_signal not in URGENT
        if number in URGENT and not is_echo and not after_a_notice:
            # os.write, since a handler must not wait for a lock that print may hold.
            _write_to_stderr(b"\nsecond signal: stopping at once, without saving\n")
            os._exit(128 + number)


def _write_to_stderr(text: bytes) -> None:
    try:
        os.write(2, text)
    except OSError:
        return  # the terminal is gone; the exit code says the same
