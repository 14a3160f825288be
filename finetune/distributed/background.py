"""One piece of work beside the run: started, and waited for before the next."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Work in a thread; what it raises is raised where it is waited for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`; what was started before must have been waited for."""
        assert self._thread is None

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._problem = error

        # A run that fails must be able to end: what it leaves behind is removed at the next start.
        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is under way any more; raises what the work raised."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if (problem := self._problem) is not None:
            self._problem = None
            raise problem
