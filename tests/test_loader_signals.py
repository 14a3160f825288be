"""A signal to the whole process group leaves the processes that load batches to the trainer."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import runs

from finetune.data.examples.batch_plan import BatchPlan
from finetune.training.loading import batches
from finetune.training.objective import SupervisedTokens


class Numbers:
    """Items that are their own index."""

    lengths = np.full(8, 5, dtype=np.int32)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return index


@pytest.mark.parametrize("number", batches.SIGNALS)
@pytest.mark.parametrize("moment", ["before it ignores signals", "when it loads"])
def test_a_loader_process_outlives_a_signal(
    monkeypatch: pytest.MonkeyPatch, number: int, moment: str
) -> None:
    ignore = batches.ignore_signals

    def signalled(worker: int) -> None:
        if moment == "before it ignores signals":
            os.kill(os.getpid(), number)
            time.sleep(0.05)
            ignore(worker)
        else:
            ignore(worker)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(batches, "ignore_signals", signalled)
    items: Any = Numbers()
    plan, collate = BatchPlan(items.lengths, 4, 2, seed=42), cast(Any, sorted)
    loader = batches.training_loader(
        batches.TrainingData(items, items.lengths, str, plan, collate, SupervisedTokens()),
        rank=0, workers=1, seconds=60,
    )  # fmt: skip
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    seen = [index for batch in loader for index in batch]
    assert sorted(seen) == list(range(8))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    loader.close()
    assert active_children() == []


def test_a_run_that_stops_within_an_epoch_leaves_no_loader_process_behind(
    tiny_glm: Path, tmp_path: Path
) -> None:
    # One that was left would not hear of the interpreter's end, which would wait for it for ever.
    data = runs.write_dialogues(tmp_path / "train.jsonl", 40)
    runs.run_here(
        runs.config(tiny_glm, data, tmp_path / "run", data__loader_workers=2, training__max_steps=2)
    )
    assert active_children() == []


def test_a_signal_that_was_blocked_before_stays_blocked_behind_the_loaders_start() -> None:
    number = sorted(batches.SIGNALS)[0]
    loader = batches.StepLoader(cast("Any", [1, 2]), batch_size=None)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        assert list(loader) == [1, 2]
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert blocked == before | {number}
