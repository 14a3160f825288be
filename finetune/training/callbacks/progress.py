"""What a run says: its table before the first step, a line per log step, the scores at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune import console, methods
from finetune.artifacts import checkpoint
from finetune.config.schema import Method, TrainingSection
from finetune.distributed.device import local_device, memory_gb
from finetune.distributed.processes import rank_and_world, reduce_sum
from finetune.evaluation.scores.metrics import metric
from finetune.models.moe.routing import ExpertUse, expert_use, figures
from finetune.training.callbacks.throughput import Work, gpu_memory, work_of
from finetune.training.measuring.choosing import conclusion
from finetune.training.objective import StepCounts
from finetune.training.prepare_model import PreparedModel
from finetune.training.resume import Start
from finetune.training.run_data import RunData

if TYPE_CHECKING:
    from finetune.training.trainer import FineTuner


def announce(
    training: TrainingSection,
    data: RunData,
    prepared: PreparedModel,
    start: Start,
    planned: Sequence[list[str]],
) -> None:
    """What is trained on what."""
    _, world = rank_and_world()
    total_steps = data.steps(training)
    trained = sum(_size(p) for p in prepared.model.parameters() if p.requires_grad)
    everything = sum(_size(p) for p in prepared.model.parameters())
    sharing = training.sequence_parallel
    per_step = training.batch_size * training.gradient_accumulation_steps * world // sharing
    tokens = int(data.items.lengths.astype(int).mean() * per_step)
    what = "rows" if data.is_packed else "examples"
    sharding = (
        f"DeepSpeed ZeRO-{prepared.deepspeed['zero_optimization'].get('stage', 0)}"
        if prepared.deepspeed
        else "data parallel"
        if world > 1
        else "one process"
    )
    console.table(
        ["", "this run"],
        [
            ["model", f"{prepared.section.path} in {str(prepared.dtype).removeprefix('torch.')}"],
            ["method", _method_text(prepared.method)],
            [
                "trained",
                f"{trained:,} of {everything:,} weights ({100 * trained / everything:.3g} %)",
            ],
            *[
                ["  in", f"{pattern} x {count}"]
                for pattern, count in methods.trained_modules(prepared.model).items()
            ],
            ["processes", f"{world} on {local_device().type}, {sharding}"],
            ["examples", data.size()],
            [
                "a step",
                f"{per_step} {what} ({training.batch_size} x {training.gradient_accumulation_steps} "
                f"x {world} processes{f' / {sharing}' if sharing > 1 else ''}), about {tokens:,} tokens",
            ],
            ["steps", f"{total_steps:,}{data.an_epoch()}"],
            *planned,
            ["writes to", training.output_dir],
        ],
    )
    if start.step >= total_steps:
        console.say(f"no step to do: {start.folder} is the last of {total_steps} steps")


def summary(trainer: FineTuner, run_dir: Path, resumed: Path | None) -> dict[str, Any]:
    """The run in numbers; says how the scores have changed."""
    state = trainer.state
    before, after = (scores_at(state.log_history, first=first) for first in (True, False))
    if before and after:
        compare(before, after)
    if said := conclusion(run_dir):
        console.say(said)
    last, best = checkpoint.checkpoints(run_dir), checkpoint.best(run_dir)
    return {
        "output_dir": str(run_dir),
        "steps": state.global_step,
        "train_loss": trainer.mean_loss(),
        "scores_before": before,
        "scores": after,
        "checkpoint": str(last[-1]) if last else None,
        "best_checkpoint": str(best) if best else None,
        "resumed_from": str(resumed) if resumed else None,
    }


def compare(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Scores of the untuned and of the tuned model side by side."""
    rows = [
        [name, score_text(name, before[name]), score_text(name, after[name])]
        for name in after
        if name in before
    ]
    console.table(["held-out data", "before", "after"], rows)


def scores_at(log: list[dict[str, Any]], *, first: bool) -> dict[str, float]:
    """The scores of the evaluation before the first step, or of the last evaluation."""
    evaluations = [entry for entry in log if any(key.startswith("eval_") for key in entry)]
    chosen = [entry for entry in evaluations if (entry["step"] == 0) is first]
    if not chosen:
        return {}
    return {
        key.removeprefix("eval_"): value
        for key, value in chosen[-1].items()
        if key.startswith("eval_")
    }


def _method_text(method: Method) -> str:
    options = method.model_dump(exclude={"kind", "target_modules"}, exclude_defaults=False)
    told = ", ".join(
        f"{name} {value}" for name, value in options.items() if value not in (None, False)
    )
    return f"{method.kind}{f' ({told})' if told else ''}"


def _size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


MOST_EVALUATING, NOTED_SECONDS = 0.05, 30.0
"""The share of a run's time that its evaluations should take at most; shorter ones are not worth a word."""


class Throughput:
    """Speed, padding and memory since the last log line; evaluating and saving do not count."""

    def __init__(self, work: Work | None = None) -> None:
        self._work = work
        self._window = StepCounts()
        self.steps = 0
        """Done since the last log line."""
        self._begun = time.monotonic()
        self._seconds_per_step = 0.0

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
        self._window, self.steps, self._begun = StepCounts(), 0, time.monotonic()

    def add(self, counts: StepCounts) -> None:
        """One more step, as it begins."""
        self._window += counts
        self.steps += 1

    def numbers(self) -> dict[str, float]:
        """The log line's numbers; begins a new window."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        self._seconds_per_step = seconds / max(self.steps, 1)
        numbers = {
            "supervised_tokens_per_second": self._window.supervised / seconds,
            "tokens_per_second": self._window.tokens / seconds,
            "padding": self._window.padding,
            "memory_gb": memory_gb(),
            "seconds_per_step": self._seconds_per_step,
        } | gpu_memory()
        if self._work is not None:
            numbers |= self._work.speed(numbers["tokens_per_second"])
        self.start()
        return numbers

    def seconds_for(self, steps: int) -> float:
        """An estimate for that many more steps."""
        elapsed = time.monotonic() - self._begun
        per_step = self._seconds_per_step or (elapsed / self.steps if self.steps else 0.0)
        return per_step * steps


class ProgressCallback(TrainerCallback):
    """One line per log step, and on a terminal a bar that moves with every step."""

    def __init__(self, work: Work | None = None, experts: ExpertUse | None = None) -> None:
        self.throughput = Throughput(work)
        self._experts = experts
        self._bar: Any = None
        self._done = self._total = 0
        self._estimated = self._said = False
        self._silent_seconds = 0.0

    def __enter__(self) -> ProgressCallback:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()  # a bar that stays would hide the error's message

    def numbers(self) -> dict[str, float]:
        """What a log line says besides the loss; every process takes part."""
        return self.throughput.numbers() | figures(self._experts, reduce_sum)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Time for others to show a bar of their own; it does not count as training time."""
        self._close()
        begun = time.monotonic()
        with self.throughput.paused():
            yield
        self._silent_seconds = time.monotonic() - begun
        self._open()

    def say_if_too_often(self, every_steps: int | None) -> None:
        """Says once what to change where evaluations take more than a twentieth of the time."""
        taken, step = self._silent_seconds, self.throughput.seconds_for(1)
        if every_steps is None or self._said or taken < NOTED_SECONDS or not step:
            return
        share = taken / (taken + every_steps * step)
        if share > MOST_EVALUATING:
            self._said = True
            enough = math.ceil(taken * (1 / MOST_EVALUATING - 1) / step)
            console.say(
                f"the evaluation took {console.duration(taken)}, {100 * share:.0f} % of the time at "
                f"evaluation.every_steps={every_steps}; {enough} would make it {100 * MOST_EVALUATING:.0f} %, "
                "and so do fewer replies, with evaluation.max_samples"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        self._done, self._total = state.global_step, state.max_steps
        self.throughput.start()
        self._open()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step; after the second one there is an estimate of the whole."""
        self._done = state.global_step
        if self._bar is not None:
            self._bar[1].advance()
        if not self._estimated and self._done < self._total and self.throughput.steps == 2:
            self._estimated = True
            left = self.throughput.seconds_for(self._total - self._done)
            console.say(f"about {console.duration(left)} for the remaining steps")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        """The step's line, or that of an evaluation."""
        if "loss" in logs:
            left = self.throughput.seconds_for(state.max_steps - state.global_step)
            console.say(_step_line(logs, state, left))
        elif scores := {k[5:]: v for k, v in logs.items() if k.startswith("eval_")}:
            said = "  ".join(f"{name} {score_text(name, v)}" for name, v in scores.items())
            console.say(f"step {state.global_step}  evaluation  {said}")

    def _open(self) -> None:
        if console.is_rank0() and console.on_terminal() and self._done < self._total:
            context = console.progress(self._total, "training")
            self._bar = (context, context.__enter__())
            self._bar[1].advance(self._done)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar[0].__exit__(None, None, None)
            self._bar = None


def progress_of(model: nn.Module, data: RunData) -> ProgressCallback:
    """The progress of a run, which knows the FLOPs of its tokens."""
    work = work_of(model, data.mean_attended_length(), rank_and_world()[1])
    return ProgressCallback(work, expert_use(model))


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
        *_of_experts(logs),
        f"memory {logs['memory_gb']:.2f} GB{_of_device(logs)}",
        f"{console.duration(seconds_left)} left",
    ]
    return "  ".join(parts)


def _of_experts(logs: dict[str, float]) -> list[str]:
    if "experts_largest_share" not in logs:
        return []
    return [f"busiest expert {100 * logs['experts_largest_share']:.0f} % of a layer's choices"]


def _of_device(logs: dict[str, float]) -> str:
    return f" ({logs['memory_device_gb']:.1f} used)" if "memory_device_gb" in logs else ""
