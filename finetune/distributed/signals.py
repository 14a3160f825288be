"""SIGTERM and Ctrl-C as a request that is honoured at the end of the step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ECHO = 5.0
"""A SIGTERM this soon (seconds) after the first signal is the same wish.

torchrun passes on what it gets, and a process manager that signals a whole group has sent it to the
workers already. A second Ctrl-C is a person's.
"""


class StopFlag:
    """Raised by the first SIGTERM or SIGINT; a second one ends the process at once.

    Evaluation and generation look at `heard` between batches. Everything else, which every process
    must decide alike, looks at `signal`, which only ``agree`` changes.
    """

    def __init__(self) -> None:
        self.heard: int | None = None
        """The signal that arrived first in this process; others may not have got it yet."""
        self.signal: int | None = None
        """The signal that all processes know of."""
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def install(self) -> StopFlag:
        """Take over both signals; the main thread must call it."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._arrived)
        return self

    def uninstall(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @property
    def is_set(self) -> bool:
        """Whether the run comes to an end; the same in every process."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after Ctrl-C, 0 before either."""
        return 0 if self.signal is None else 128 + self.signal

    def agree(self, largest: Callable[[int], int]) -> bool:
        """Whether any process was asked to stop; ``largest`` is the maximum over all of them.

        Every process must call it at the same points, so that all stop after the same step.
        """
        self.signal = largest(self.heard or 0) or self.signal
        return self.is_set

    def __enter__(self) -> StopFlag:
        return self.install()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.uninstall()

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.heard is None:
            self.heard, self._since = number, time.monotonic()
        elif number != signal.SIGTERM or time.monotonic() - self._since > ECHO:
            # os.write, since a handler must not wait for a lock that print may hold.
            os.write(2, b"\nsecond signal: stopping at once, without saving\n")
            os._exit(128 + number)
