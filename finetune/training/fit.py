"""From prepared data to the last checkpoint: the half of the program that needs torch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from finetune import console, methods
from finetune.artifacts import checkpoint
from finetune.artifacts.run_dir import RunDirectory
from finetune.config.load import dump_config
from finetune.config.schema import RunConfig
from finetune.data.chat.template import ChatTemplate
from finetune.data.examples.collate import Collator
from finetune.distributed.processes import (
    broadcast_from_rank0,
    fail_together,
    is_rank0,
    joined_processes,
    rank_and_world,
)
from finetune.distributed.signals import StopFlag
from finetune.distributed.watchdog import watching
from finetune.models.library_logging import quiet_libraries
from finetune.training import report, resume
from finetune.training.callbacks import Meter, MetricsFile, Narrator, Schedule
from finetune.training.checkpointing import Saver
from finetune.training.facts import run_record
from finetune.training.learning_rates import Rates
from finetune.training.prepare_model import Tunable, load_tunable
from finetune.training.profiling import Profiler
from finetune.training.run_data import RunData
from finetune.training.throughput import work_of
from finetune.training.trainer import FineTuner, Services, TrainingData
from finetune.training.validation import load_validation
from finetune.training.vision_features import FeatureFiles, prepare_features

DEFAULT_EPOCHS = 3


def fit(
    config: RunConfig, template: ChatTemplate, data: RunData, run_dir: RunDirectory
) -> dict[str, Any]:
    """Train, evaluate and save; see `run.train`."""
    begun = time.monotonic()
    quiet_libraries()
    minutes, stop = config.training.process_timeout_minutes, StopFlag()
    joined = joined_processes(timeout_minutes=minutes, deepspeed=config.deepspeed is not None)
    with joined, ExitStack() as at_the_end, watching(minutes, stop):
        # One that has saved and waits for the others may get its own signal only then.
        at_the_end.callback(stop.uninstall)
        trainer, resumed = _train(config, template, data, run_dir, stop)
        summary = summarise(trainer, run_dir.path, resumed, time.monotonic() - begun)
    if stop.is_set:
        console.say("stopped as asked; the same command goes on from here")
        raise SystemExit(stop.exit_code)
    return summary


def _train(
    config: RunConfig,
    template: ChatTemplate,
    data: RunData,
    run_dir: RunDirectory,
    stop: StopFlag,
) -> tuple[FineTuner, Path | None]:
    """The trainer when it is done, and the checkpoint that it began from."""
    tunable = load_tunable(config, data)
    record = run_record(config, template, data, tunable)
    resumed = choose_checkpoint(config, run_dir.path, record)
    with fail_together():
        if is_rank0():
            run_dir.write_config(dump_config(config))
            run_dir.write_data(data.described())
    total = total_steps(config, data)
    report.announce(config, data, tunable, total)
    saver = Saver(
        run_dir=run_dir.path,
        config_text=dump_config(config),
        record=record,
        base=tunable.base,
        metric=config.evaluation.best_metric,
        keep=config.training.keep_checkpoints,
        goes_on_without_room=config.training.on_full_disk == "continue",
    )
    with Narrator(Meter()) as narrator:
        trainer = build_trainer(config, template, data, tunable, saver, stop, narrator)
        # Other dropout in every process. A resumed run gets its streams from the checkpoint; at
        # another number of processes, where it has none for some, they differ from the first ones.
        begun_at = (checkpoint.step_of(resumed) if resumed else None) or 0
        torch.manual_seed(config.training.seed + rank_and_world()[0] + (begun_at << 32))
        if begun_at >= total:
            console.say(f"no step to do: {resumed} is the last of {total} steps")
        trainer.train(str(resumed) if resumed else None)
    return trainer, resumed


def choose_checkpoint(config: RunConfig, run_dir: Path, record: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from, verified once and the same in every process.

    Raises:
        CheckpointError: It belongs to another run, or `training.resume` forbids what is there.
    """

    def chosen() -> Path | None:
        checkpoint.best(run_dir)  # is refused when damaged, before hours of training
        folder, skipped = resume.choose(run_dir, config.training.resume)
        for damaged, reason in skipped:
            console.warn(f"{damaged} is passed over: {reason}")
        if folder is not None:
            report.say_resumed(folder, resume.check(folder, record))
        return folder

    return broadcast_from_rank0(chosen)


def total_steps(config: RunConfig, data: RunData) -> int:
    """Optimizer steps of the whole run."""
    if config.training.max_steps is not None:
        return config.training.max_steps
    epochs = config.training.num_epochs or DEFAULT_EPOCHS
    return math.ceil(epochs * data.plan.steps_per_epoch)


def build_trainer(
    config: RunConfig,
    template: ChatTemplate,
    data: RunData,
    tunable: Tunable,
    saver: Saver,
    stop: StopFlag,
    narrator: Narrator,
) -> FineTuner:
    """The trainer with its callbacks, tied together."""
    validation = load_validation(config, template, data, tunable.model, saver.run_dir, stop)
    schedule = Schedule(
        config.evaluation if validation else None,
        save_every=config.training.save_every_steps,
        stop=stop,
    )

    steps = config.training.profile
    profiler = [] if steps is None else [Profiler(saver.run_dir, steps)]
    lengths = data.train.lengths
    narrator.meter.work = work_of(
        tunable.model,
        float((lengths.astype(float) ** 2).sum() / lengths.sum()),
        rank_and_world()[1],
    )

    def scores(model: Any, step: int) -> dict[str, float] | None:
        with narrator.silent():
            return validation.scores(model, step) if validation else {}

    trainer = FineTuner(
        tunable.model,
        tunable.arguments,
        data=TrainingData(
            items=data.items,
            lengths=data.train.lengths,
            where=data.train.where,
            plan=data.plan,
            collate=Collator(
                template.pad_id,
                image=template.image,
                features=features(config, template, data, tunable),
            ),
        ),
        services=Services(
            stop=stop,
            saver=saver,
            evaluate=scores,
            meter=narrator.meter,
            rates=Rates(
                config.training.learning_rate,
                config.training.learning_rates,
                methods.rate_scale(config.method),
            ),
        ),
        callbacks=[schedule, narrator, MetricsFile(saver.run_dir), *profiler],
    )
    schedule.evaluate, narrator.counts = trainer.evaluate, lambda: trainer.counts
    schedule.save_scores = lambda: saver.save_scores(trainer)
    return trainer


def features(
    config: RunConfig, template: ChatTemplate, data: RunData, tunable: Tunable
) -> FeatureFiles | None:
    """What a frozen tower makes of the training images, when it is to be kept."""
    images = data.train.images() if config.data.cache_image_features else []
    if not images:
        return None
    return prepare_features(config, tunable, template.image.size if template.image else 0, images)


def summarise(
    trainer: FineTuner, run_dir: Path, resumed: Path | None, seconds: float
) -> dict[str, Any]:
    """The run in numbers; says how the scores have changed."""
    state = trainer.state
    _, before = report.scores_at(state.log_history, first=True)
    _, after = report.scores_at(state.log_history, first=False)
    if before and after:
        report.compare(before, after)
    last = checkpoint.checkpoints(run_dir)
    best = checkpoint.best(run_dir)
    return {
        "output_dir": str(run_dir),
        "steps": state.global_step,
        "train_loss": trainer.mean_loss(),
        "scores_before": before,
        "scores": after,
        "checkpoint": str(last[-1]) if last else None,
        "best_checkpoint": str(best) if best else None,
        "resumed_from": str(resumed) if resumed else None,
        "seconds": round(seconds, 3),
    }
