"""What happens around the Trainer's steps: when to evaluate, save and stop, and what is said."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune import console
from finetune.artifacts.names import RUN_METRICS
from finetune.config.schema import EvaluationSection
from finetune.distributed.signals import StopFlag
from finetune.evaluation.metrics import is_better, metric
from finetune.storage import journal
from finetune.storage.disk import BestEffort
from finetune.storage.files import json_line, write_file
from finetune.training.counts import StepCounts
from finetune.training.throughput import Work, gpu_memory


class Schedule(TrainerCallback):
    """Decides after each step: evaluate, save, stop. The same decision in every process."""

    def __init__(
        self, evaluation: EvaluationSection | None, *, save_every: int, stop: StopFlag
    ) -> None:
        self.evaluation = evaluation
        """None when there is nothing to evaluate on."""
        self.save_every = save_every
        self.stop = stop
        self.evaluate: Callable[[], Any] = lambda: None
        """The Trainer's; set once there is one."""
        self.save_scores: Callable[[], Any] = lambda: None
        """Puts the scores of the step that was resumed from into its checkpoint."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """What the untuned model scores; of a resumed run, the evaluation that a signal cut short.

        Raises:
            NothingLeftError: There is no step to do after it.
        """
        if self.evaluation_is_due(state):
            scores = self.evaluate()
            if state.global_step and scores:
                self.save_scores()
        if self.stop.is_set or state.global_step >= state.max_steps:
            raise NothingLeftError

    def evaluation_is_due(self, state: TrainerState) -> bool:
        """Whether the step that was done last should have been evaluated and was not."""
        if self.evaluation is None or state.global_step in _scored_steps(state):
            return False
        return self.evaluation.at_start if state.global_step == 0 else self._evaluates_after(state)

    def _evaluates_after(self, state: TrainerState) -> bool:
        """Every so many steps, and after the last one."""
        every = self.evaluation.every_steps if self.evaluation else None
        return state.global_step >= state.max_steps or (
            every is not None and state.global_step % every == 0
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Both at the last step too; only a save when the run was asked to stop."""
        is_last = state.global_step >= state.max_steps
        control.should_save = is_last or state.global_step % self.save_every == 0
        control.should_evaluate = self.evaluation is not None and self._evaluates_after(state)
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
        if value is not None and is_better(name, value, state.best_metric):
            state.best_metric, state.best_global_step = value, state.global_step
            control.should_save = True
        patience = self.evaluation.patience
        if patience is not None and _without_better(state, f"eval_{name}") >= patience:
            console.say(f"stopping: {name} has not improved in {patience} evaluations")
            control.should_training_stop = control.should_save = True


class NothingLeftError(BaseException):  # no error, so nothing that looks for errors stops it
    """The run ends where it stands, without another step."""


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


class Meter:
    """Speed, padding and memory since the last log line; evaluating and saving do not count."""

    def __init__(self) -> None:
        self._window = StepCounts()
        self._steps = 0
        self._begun = time.monotonic()
        self._seconds_per_step = 0.0
        self.work: Work | None = None
        """Set once there is a model."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here is not training time."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._begun += time.monotonic() - before

    def start(self) -> None:
        """Begin now."""
        self._window, self._steps, self._begun = StepCounts(), 0, time.monotonic()

    def add(self, counts: StepCounts) -> None:
        """One more step is done."""
        self._window += counts
        self._steps += 1

    def numbers(self) -> dict[str, float]:
        """The log line's numbers; begins a new window."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        self._seconds_per_step = seconds / max(self._steps, 1)
        numbers = {
            "supervised_tokens_per_second": self._window.supervised / seconds,
            "tokens_per_second": self._window.tokens / seconds,
            "padding": self._window.padding,
            "memory_gb": memory_gb(),
            "seconds_per_step": self._seconds_per_step,
        } | gpu_memory()
        if self.work is not None:
            numbers |= self.work.speed(numbers["tokens_per_second"])
        self.start()
        return numbers

    def seconds_for(self, steps: int) -> float:
        """An estimate for that many more steps."""
        elapsed = time.monotonic() - self._begun
        per_step = self._seconds_per_step or (elapsed / self._steps if self._steps else 0.0)
        return per_step * steps


def memory_gb() -> float:
    """Peak memory of this process: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Narrator(TrainerCallback):
    """One line per log step, and on a terminal a bar that moves with every step."""

    def __init__(self, meter: Meter, counts: Callable[[], StepCounts] = StepCounts) -> None:
        self.meter = meter
        self.counts = counts
        """Of the last step; set once there is a Trainer."""
        self._bar: Any = None
        self._done = self._total = 0
        self._estimated = False

    def __enter__(self) -> Narrator:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()  # a bar that stays would hide the error's message

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Time for others to show a bar of their own; it does not count as training time."""
        self._close()
        with self.meter.paused():
            yield
        self._open()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        self._done, self._total = state.global_step, state.max_steps
        self.meter.start()
        self._open()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step; after the second one there is an estimate of the whole."""
        self.meter.add(self.counts())
        self._done = state.global_step
        if self._bar is not None:
            self._bar[1].advance()
        if not self._estimated and self._done < self._total and self.meter._steps == 2:
            self._estimated = True
            left = self.meter.seconds_for(self._total - self._done)
            console.say(f"about {console.duration(left)} for the remaining steps")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        """Say it."""
        if "loss" in logs:
            left = self.meter.seconds_for(state.max_steps - state.global_step)
            console.say(_step_line(logs, state, left))
        elif scores := {k[5:]: v for k, v in logs.items() if k.startswith("eval_")}:
            said = "  ".join(f"{name} {score_text(name, v)}" for name, v in scores.items())
            console.say(f"step {state.global_step}  evaluation  {said}")

    def _open(self) -> None:
        if console.is_main() and console.on_terminal() and self._done < self._total:
            context = console.progress(self._total, "training")
            self._bar = (context, context.__enter__())
            self._bar[1].advance(self._done)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar[0].__exit__(None, None, None)
            self._bar = None


def score_text(name: str, value: float) -> str:
    """A loss with four places, a score of 0..100 with two."""
    return f"{value:.4f}" if metric(name).of_loss else f"{value:.2f}"


def _step_line(logs: dict[str, float], state: TrainerState, seconds_left: float) -> str:
    parts = [
        f"step {state.global_step}/{state.max_steps}",
        f"loss {logs['loss']:.4f}",
        f"lr {logs['learning_rate']:.2e}",
    ]
    if "grad_norm" in logs:
        parts.append(f"gradient {logs['grad_norm']:.2f}")
    parts += [
        f"{logs['tokens_per_second']:,.0f} tokens/s, {logs['supervised_tokens_per_second']:,.0f} "
        "supervised",
        *([f"{100 * logs['mfu']:.0f} % of peak"] if "mfu" in logs else []),
        f"padding {100 * logs['padding']:.0f} %",
        f"memory {logs['memory_gb']:.2f} GB{_of_device(logs)}",
        f"{console.duration(seconds_left)} left",
    ]
    return "  ".join(parts)


def _of_device(logs: dict[str, float]) -> str:
    return f" ({logs['memory_device_gb']:.1f} used)" if "memory_device_gb" in logs else ""


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
            self._unwritten.append(_record({"step": state.global_step, **logs}))
            self._write()

    def _write(self) -> None:
        with self._writing():
            if self._anew:
                write_file(self.path, "".join(map(json_line, self._unwritten)))
            else:
                journal.append(self.path, self._unwritten, durable=False)
            self._unwritten, self._anew = [], False


def _record(entry: dict[str, Any]) -> dict[str, Any]:
    return {"step": entry["step"], **entry}
