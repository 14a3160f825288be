"""What happens around the Trainer's steps: when to evaluate, save and stop, and what is logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from finetune import console
from finetune.artifacts.names import RUN_DATA, RUN_METRICS
from finetune.artifacts.run_dir import RunDirectory
from finetune.config.schema import EvaluationSection, TrainingSection
from finetune.distributed.signals import StopFlag
from finetune.evaluation.scores.metrics import is_better
from finetune.storage import journal
from finetune.storage.disk import BestEffort
from finetune.storage.files import json_line, write_file
from finetune.training.measuring.choosing import CHOSEN


class Schedule(TrainerCallback):
    """Decides after each step: evaluate, save, stop. The same decision in every process."""

    def __init__(
        self,
        evaluation: EvaluationSection | None,
        *,
        training: TrainingSection,
        stop: StopFlag,
        evaluate: Callable[[], dict[str, float]],
        save_scores: Callable[[], None],
        save_weights: Callable[[], None],
        compares_anew: bool = False,
    ) -> None:
        self.evaluation = evaluation
        """None when there is nothing to evaluate on."""
        self.save_every = training.save_every_steps
        self.save_weights_every = training.save_weights_every_steps
        self.stop = stop
        self.evaluate = evaluate
        """The Trainer's."""
        self.save_scores = save_scores
        """Puts the scores of the step that was resumed from into its checkpoint."""
        self.save_weights = save_weights
        """Writes what was trained alone."""
        self.compares_anew = compares_anew
        """Whether what the scores compare has changed since the checkpoint that is resumed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """What the untuned model scores; of a resumed run, the evaluation that a signal cut short.

        Raises:
            RunComplete: There is no step to do after it.
        """
        if self.compares_anew:
            # The next evaluation is the first of its kind, and therefore the best; patience counts
            # from there.
            state.best_metric = state.best_global_step = None
        if self.evaluation_is_due(state):
            scores = self.evaluate()
            if state.global_step and scores:
                self.save_scores()
        if self.stop.is_set or state.global_step >= state.max_steps:
            raise RunComplete

    def evaluation_is_due(self, state: TrainerState) -> bool:
        """Whether the step that was done last should have been evaluated and was not."""
        if self.evaluation is None or state.global_step in _scored_steps(state):
            return False
        compares = self.evaluation.choose != "best_metric"
        first = self.evaluation.at_start or compares
        return first if state.global_step == 0 else self._evaluates_after(state)

    def _evaluates_after(self, state: TrainerState) -> bool:
        """Every so many steps, and after the last one."""
        every = self.evaluation.every_steps if self.evaluation else None
        return state.global_step >= state.max_steps or (
            every is not None and state.global_step % every == 0
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Saves and evaluates when due and after the last step; only saves when asked to stop."""
        is_last = state.global_step >= state.max_steps
        control.should_save = is_last or state.global_step % self.save_every == 0
        control.should_evaluate = self.evaluation is not None and self._evaluates_after(state)
        every = self.save_weights_every
        if every is not None and (is_last or state.global_step % every == 0):
            self.save_weights()
        if self.stop.is_set:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        """Notes a new best, which is then saved; stops when there was none for too long."""
        if self.stop.is_set:
            control.should_training_stop = control.should_save = True
        if self.evaluation is None or state.global_step == 0 or not metrics:
            return
        name = self.evaluation.best_metric
        value = metrics.get(f"eval_{name}")
        if self.evaluation.choose != "best_metric":
            is_best = value is not None and metrics.get(f"eval_{CHOSEN}") == 1.0
        else:
            is_best = value is not None and is_better(name, value, state.best_metric)
        if is_best:
            state.best_metric, state.best_global_step = value, state.global_step
            control.should_save = True
        patience = self.evaluation.patience
        if patience is not None and _without_better(state, f"eval_{name}") >= patience:
            console.say(f"stopping: {name} has not improved in {patience} evaluations")
            control.should_training_stop = control.should_save = True


class StoppedIsSaved(TrainerCallback):
    """Stands behind a user's callbacks: a run that they end is saved first."""

    def _save(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        control.should_save |= control.should_training_stop

    on_step_end = on_log = on_evaluate = _save


class RunComplete(BaseException):
    """No step is left to do; leaves the Trainer's loop before the first one."""


def _scored_steps(state: TrainerState) -> set[int]:
    """The steps after which there was an evaluation; read from the log, as a checkpoint has it."""
    return {
        int(entry["step"])
        for entry in state.log_history
        if any(key.startswith("eval_") for key in entry)
    }


def _without_better(state: TrainerState, key: str) -> int:
    """Evaluations since the best one; read from the log, so that a resumed run goes on counting."""
    since = state.best_global_step or 0
    return sum(1 for entry in state.log_history if key in entry and entry["step"] > since)


class MetricsFile(TrainerCallback):
    """metrics.jsonl in the run directory: every log record, one JSON object a line."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / RUN_METRICS
        self._unwritten: list[dict[str, Any]] = []
        self._anew = False
        self._writing = BestEffort(str(self.path), "it is written when there is room")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write what the resumed checkpoint knows of: lines of steps that a kill lost go."""
        if state.is_world_process_zero:
            self._unwritten = [_record(entry) for entry in state.log_history]
            self._anew = True
            self._write()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        """One more line; with those before it that a full disk had no room for."""
        if state.is_world_process_zero:
            self._unwritten.append({"step": state.global_step, **logs})
            self._write()

    def _write(self) -> None:
        with self._writing():
            if self._anew:
                write_file(self.path, "".join(map(json_line, self._unwritten)))
            else:
                journal.append(self.path, self._unwritten, durable=False)
            self._unwritten, self._anew = [], False


class DataJson(TrainerCallback):
    """data.json in the run directory, written anew with every checkpoint, as a stream is read on."""

    def __init__(self, run_dir: Path, described: Callable[[], Mapping[str, Any]]) -> None:
        self._run_dir = RunDirectory(run_dir)
        self._described = described
        self._writing = BestEffort(RUN_DATA, "the next checkpoint writes it again")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """What was read so far."""
        if state.is_world_process_zero:
            with self._writing():
                self._run_dir.write_data(self._described())


def _record(entry: dict[str, Any]) -> dict[str, Any]:
    return {"step": entry["step"], **entry}


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


def writers(run_dir: Path, profile: int | None, feed: Any) -> list[TrainerCallback]:
    """What writes into the run directory: metrics, what was read of a stream, a profile."""
    from finetune.training.callbacks.profiling import Profiler

    described = [] if feed is None else [DataJson(run_dir, feed.described)]
    return [MetricsFile(run_dir), *described, *([Profiler(run_dir, profile)] if profile else [])]
