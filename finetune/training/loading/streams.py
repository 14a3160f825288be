"""The loader of one process's micro-batches of a stream, and where the stream is after each step.

Every process goes through the same stream, takes as many items for a step as all of them need, and
deals them out as `data.examples.batch_plan` does. So a run goes on at the same example with another
number of processes too, and the loader's workers only divide the work of making batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from finetune import console
from finetune.artifacts.names import STREAM
from finetune.data.examples.batch_plan import BLANK, deal
from finetune.data.examples.preparation import ExampleCounts
from finetune.data.examples.stream import START, ExampleStream, Item, Position, position_of
from finetune.distributed.device import pins_memory
from finetune.errors import CheckpointError, DataError, FinetuneError
from finetune.training.loading.batches import StepLoader, TrainingData, blanked, ignore_signals
from finetune.training.run_data import RunData


@dataclass(frozen=True)
class _Passed:
    """What goes beside a micro-batch."""

    documents: dict[int, tuple[int, str]]
    """Index -> tokens and `file:line` of each document in it."""
    position: Position | None
    """Where the stream is; with the last micro-batch of a step."""
    read: ExampleCounts
    """What was read of it so far."""


class StreamBatches(IterableDataset[Any]):
    """The micro-batches of process `rank` without an end, each with what `_Passed` says of it.

    A FinetuneError is handed on in place of a batch: torch would make a traceback's text of it.
    """

    def __init__(
        self, data: TrainingData, stream: ExampleStream, start: Position, rank: int
    ) -> None:
        self.stream = stream
        self.start = start
        self.collate = data.collate
        self.plan = data.plan
        self.rank = rank

    def __iter__(self) -> Iterator[tuple[dict[str, Any], _Passed] | FinetuneError]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        number = 0
        try:
            for step, position in self._steps():
                lengths = np.array([item.tokens for item in step])
                order = np.argsort(-lengths, kind="stable")
                passes = list(
                    deal(order, position.steps - 1, self.plan.batch_size, self.plan.world_size)
                )
                for turn, parts in enumerate(passes):
                    if number % workers == mine:
                        items = [step[place] for place in parts[self.rank]]
                        at_end = turn == len(passes) - 1
                        yield self._batch(items, step, position if at_end else None)
                    number += 1
        except FinetuneError as error:
            while True:  # every worker comes to the same place; the first one ends the run
                yield error

    def _steps(self) -> Iterator[tuple[list[Item], Position]]:
        """The items of every optimizer step, and the position behind them."""
        step: list[Item] = []
        for item in self.stream.items(self.start):
            step.append(item)
            if len(step) == self.plan.global_batch:
                position = self.stream.position
                position = replace(position, steps=position.steps + 1)
                self.stream.position = position
                yield step, position
                step = []

    def _batch(
        self, items: Sequence[Item], step: Sequence[Item], position: Position | None
    ) -> tuple[dict[str, Any], _Passed]:
        values = [item.value for item in items] or [blanked(step[-1].value)]
        documents = {
            example.index: (len(example.input_ids), example.location)
            for item in items
            for example in item.examples
        }
        return self.collate(values), _Passed(documents, position, self.stream.read)


class StreamFeed:
    """What the trainer knows of a stream: where it is, and the documents of the step at hand."""

    def __init__(self, run: RunData, stream: ExampleStream, start: Position = START) -> None:
        self._run = run
        self.stream = stream
        self.position = start
        """Behind the last step that was handed out."""
        self.read = start.counts
        """What was read so far, all of the piece at hand included."""
        self._documents: dict[int, tuple[int, str]] = {}
        self._step_is_over = False
        self._said: set[str] = set()

    def described(self) -> dict[str, Any]:
        """The run's data.json as it is now."""
        return self._run.described(self)

    def take(self, given: tuple[dict[str, Any], _Passed] | FinetuneError) -> dict[str, Any]:
        """The batch, after noting what came beside it; raises an error that came in its place."""
        if isinstance(given, FinetuneError):
            raise given
        batch, passed = given
        if self._step_is_over:
            self._documents = {}
        self._documents |= passed.documents
        self._step_is_over = passed.position is not None
        if passed.position is not None:
            self.position = passed.position
        self._say_new(passed.read)
        self.read = passed.read
        return batch

    def _say_new(self, now: ExampleCounts) -> None:
        """Unread text, doubts and rows left out, each when it is met first."""
        before = self.read
        if now == before:
            return
        for kind in ("unread", "doubts", "dropped"):
            for name in getattr(now, kind):
                if name not in self._said:
                    self._said.add(name)
                    what = {
                        "unread": "text is not read",
                        "doubts": "is trained",
                        "dropped": "is left out",
                    }
                    console.warn(f"training data: {name}: {what[kind]} (counted in data.json)")
        for line in now.named[len(before.named) :]:
            console.say(f"  {line}")

    def __getitem__(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of documents of the step at hand."""
        return np.array([self._documents[int(i)][0] for i in indices], dtype=np.int64)

    def location(self, index: int) -> str:
        """The `file:line` of a document of the step at hand."""
        return self._documents[index][1] if index != BLANK else "a blank"


class StreamLoader(StepLoader):
    """The batches of a stream, from where its feed is."""

    def __init__(self, feed: StreamFeed, batches: StreamBatches, **options: Any) -> None:
        super().__init__(batches, batch_size=None, **options)
        self._feed = feed

    def set_epoch(self, epoch: int) -> None:
        """A stream has passes of its own."""

    def __iter__(self) -> Any:
        """The batches, each noted by the feed when it is handed out."""
        return map(self._feed.take, super().__iter__())


def from_checkpoint(data: TrainingData, run: RunData, checkpoint: Path | None) -> TrainingData:
    """The training data; with a stream in place of prepared examples, from where a checkpoint left it.

    Raises:
        CheckpointError: The checkpoint does not say where the stream was.
    """
    if run.stream is None:
        return data
    start = START
    if checkpoint is not None:
        try:
            start = position_of(json.loads((checkpoint / STREAM).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, DataError) as error:
            raise CheckpointError(
                f"{checkpoint / STREAM}: does not say where the stream of training rows was ({error}); resume from another checkpoint"
            ) from error
    feed = StreamFeed(run, run.stream, start)
    return replace(data, lengths=feed, location=feed.location, feed=feed)


def stream_loader(
    data: TrainingData, feed: StreamFeed, *, rank: int, workers: int, seconds: float
) -> StreamLoader:
    """The loader of process `rank`; see `batches.training_loader`."""
    return StreamLoader(
        feed,
        StreamBatches(data, feed.stream, feed.position, rank),
        num_workers=workers,
        persistent_workers=workers > 0,
        timeout=seconds if workers > 0 else 0,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),
        pin_memory=pins_memory(),
    )
