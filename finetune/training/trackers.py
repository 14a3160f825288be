"""TensorBoard beside the run: a full disk ends its curves, not the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.integrations import TensorBoardCallback

from finetune.storage.disk import BestEffort


class TensorBoard(TensorBoardCallback):
    """transformers' own, which flushes after every log line and would raise what the disk says."""

    def __init__(self) -> None:
        super().__init__()
        self._has_given_up = False
        self._writing = BestEffort("TensorBoard's log", "its curves end here. Training goes on")

    def on_train_begin(self, *arguments: Any, **others: Any) -> None:
        """Open the log."""
        self._while_there_is_room(super().on_train_begin, *arguments, **others)

    def on_log(self, *arguments: Any, **others: Any) -> None:
        """One more point of every curve."""
        self._while_there_is_room(super().on_log, *arguments, **others)

    def on_train_end(self, *arguments: Any, **others: Any) -> None:
        """Close the log."""
        self._while_there_is_room(super().on_train_end, *arguments, **others)

    def _while_there_is_room(
        self, write: Callable[..., object], *arguments: Any, **others: Any
    ) -> None:
        if self._has_given_up:
            return
        with self._writing():
            write(*arguments, **others)
        self._has_given_up = self._writing.failed
        if self._has_given_up:
            self.tb_writer = None  # its thread has ended
