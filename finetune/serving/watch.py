"""Checkpoints of runs that are still training, served as they appear."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import console
from finetune.artifacts.checkpoint import checkpoints, step_of
from finetune.artifacts.resolve import is_adapter
from finetune.errors import ConfigError, FinetuneError
from finetune.storage.manifest import verify

if TYPE_CHECKING:
    from finetune.generation.load import OpenedModel

EVERY_SECONDS = 5.0
KEPT = 3
"""Checkpoints of one run that are served at a time."""


class Watch:
    """Looks for new checkpoints of one run, in a thread of its own.

    `NAME@STEP` is a checkpoint, and `NAME` the newest of them. What is asked of an older one is answered by
    it while it is among the newest three.
    """

    def __init__(
        self,
        run: Path,
        opening: Callable[[Path], OpenedModel],
        put: Callable[[str, str, OpenedModel], None],
        drop: Callable[[str], bool],
        *,
        every: float = EVERY_SECONDS,
    ) -> None:
        """A watch that has not looked yet.

        Args:
        run: the run directory; it need not be there yet.
        opening: opens a checkpoint beside the models that are served.
        put: takes the id of a checkpoint, that of the run, and the model.
        drop: takes a checkpoint's id; False while somebody is being answered by it.
        every: seconds between two looks.
        """
        self._run, self._every = run, every
        self._opening, self._put, self._drop = opening, put, drop
        self._seen: set[str] = set()
        self._served: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"watch {run.name}", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Looks no more."""
        self._over.set()

    def look(self) -> None:
        """Takes in what is new, the newest only, and lets go of what is old."""
        folders = [folder for folder in checkpoints(self._run) if folder.name not in self._seen]
        for folder in reversed(folders):
            if verify(folder):
                continue  # it is being written, or damaged: the next look sees
            self._seen |= {one.name for one in folders}
            self._take(folder)
            break
        while len(self._served) > KEPT and self._drop(self._served[0]):
            del self._served[0]

    def _take(self, folder: Path) -> None:
        if not is_adapter(folder):
            raise ConfigError(
                f"--watch {self._run}: {folder.name} is a whole model; only adapters are taken in "
                "beside others, start `serve` anew with it"
            )
        name = f"{self._run.name}@{step_of(folder)}"
        if name in self._served:
            return  # the same weights, saved once to resume from and once alone
        self._put(name, self._run.name, self._opening(folder))
        self._served.append(name)
        console.say(f"{self._run.name} is {folder.name} now, also as {name}")

    def _work(self) -> None:
        while not self._over.is_set():
            try:
                self.look()
            except (FinetuneError, OSError) as error:
                console.warn_once(f"--watch {self._run}: {error}")
            self._over.wait(self._every)
