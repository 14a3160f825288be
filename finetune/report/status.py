"""How far a run is, from its files alone: steps, loss, speed, checkpoints, and who is at it. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune import console
from finetune.artifacts import checkpoint
from finetune.artifacts.names import BEST, RUN_METRICS, TRAINER_STATE
from finetune.artifacts.plain_files import read_json_if_there
from finetune.artifacts.run_dir import LOCK
from finetune.evaluation.schema import LARGEST
from finetune.report.runs import Run, read_run
from finetune.storage.lock import holder, is_held


@dataclass(frozen=True)
class Status:
    """What `finetune status --json` says; None where the run has not come to it."""

    path: str
    state: Literal["running", "done", "stopped", "unknown"]
    """`unknown`: its lock cannot be read by this user."""
    process: str | None
    """Who holds the run's lock."""
    step: int
    steps: int | None
    """Of the whole run; of one that counts epochs an estimate until the first checkpoint."""
    loss: float | None
    learning_rate: float | None
    tokens_per_second: float | None
    seconds_per_step: float | None
    seconds_left: float | None
    checkpoint: str | None
    """The newest."""
    best: str | None
    best_metric: str | None
    best_value: float | None
    written: float | None
    """When its newest line was written, in seconds since 1970."""

    def rows(self) -> list[list[str]]:
        """For people; what is not known is left out."""
        said = [
            ["state", self.state + (f" ({self.process})" if self.process else "")],
            ["step", f"{self.step:,}" + (f" of {self.steps:,}" if self.steps else "")],
            ["loss", _text(self.loss, ".4f")],
            ["learning rate", _text(self.learning_rate, ".2e")],
            ["tokens a second", _text(self.tokens_per_second, ",.0f")],
            ["left", console.duration(self.seconds_left) if self.seconds_left else ""],
            ["newest checkpoint", self.checkpoint or "none"],
            ["best checkpoint", self._best()],
        ]
        return [row for row in said if row[1]]

    def _best(self) -> str:
        if self.best is None:
            return ""
        value = _text(self.best_value, ".4g")
        return f"{self.best} ({self.best_metric} {value})" if value else self.best


def read_status(folder: Path) -> Status:
    """The status of the run in `folder`; ConfigError when there is none."""
    run = read_run(folder)
    found = checkpoint.checkpoints(folder)
    newest = found[-1] if found else None
    best = checkpoint.best(folder)
    record = read_json_if_there(folder / BEST)
    steps = _all_steps(run, newest)
    state, process = _state(folder, finished=steps is not None and run.last_step >= steps)
    pace = _last(run.history, "seconds_per_step")
    left = None if pace is None or steps is None else pace * max(0, steps - run.last_step)
    metrics = folder / RUN_METRICS
    return Status(
        path=str(folder),
        state=state,
        process=process,
        step=run.last_step,
        steps=steps,
        loss=_last(run.history, "loss"),
        learning_rate=_last(run.history, "learning_rate"),
        tokens_per_second=_last(run.history, "tokens_per_second"),
        seconds_per_step=pace,
        seconds_left=left if state == "running" else None,
        checkpoint=str(newest) if newest else None,
        best=str(best) if best else None,
        best_metric=record.get("metric") if best else None,
        best_value=_number(record.get("value")) if best else None,
        written=metrics.stat().st_mtime if metrics.is_file() else None,
    )


def _all_steps(run: Run, newest: Path | None) -> int | None:
    """How many steps the run has: as its config says, its newest checkpoint, or its pace."""
    if isinstance(steps := run.config.get("training.max_steps"), int):
        return steps
    state = read_json_if_there(newest / TRAINER_STATE) if newest else {}
    if isinstance(steps := state.get("max_steps"), int) and steps > 0:
        return steps
    epochs = _number(run.config.get("training.num_epochs")) or 3
    epoch = _last(run.history, "epoch")
    step = run.last_step
    return math.ceil(round(step / epoch * epochs, 6)) if epoch and step else None


def _state(
    folder: Path, *, finished: bool
) -> tuple[Literal["running", "done", "stopped", "unknown"], str | None]:
    lock = folder / LOCK
    try:
        held = is_held(lock)
    except PermissionError:
        return "unknown", None
    if held:
        return "running", holder(lock)
    return ("done" if finished else "stopped"), None


def _last(history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [value for record in history if (value := _number(record.get(key))) is not None]
    return found[-1] if found else None


def _number(value: Any) -> float | None:
    """A number that can be shown, nan too; None for anything else."""
    is_one = isinstance(value, int | float) and not abs(value) > LARGEST
    return float(value) if is_one else None


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
