"""The whole program: a config goes in, a run directory with checkpoints and scores comes out.

What a user can get wrong in config and data is found in `train`, before torch is imported.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console, launcher
from finetune.artifacts import checkpoint, hub
from finetune.artifacts.resolve import TOKENIZER_FILES, is_hub_id, local_folder
from finetune.artifacts.run_dir import LOCK, RunDirectory
from finetune.config.load import dump_config
from finetune.config.schema import DataSection, RunConfig, held_out_share
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.errors import RunDirectoryInUseError
from finetune.planning.memory_hints import memory_explained, planned_rows
from finetune.planning.settle import settled
from finetune.storage.lock import holder, is_held
from finetune.storage.outputs import check_not_read
from finetune.training import resume
from finetune.training.callbacks.on_end import told_at_the_end
from finetune.training.run_data import RunData, load_run_data

if TYPE_CHECKING:
    from finetune.distributed.signals import StopFlag
    from finetune.training.trainer import FineTuner


def train(
    config: RunConfig, config_path: Path | None = None, *, trust_checkpoint: bool = False
) -> dict[str, Any]:
    """Run what `config` says; a run that was interrupted goes on where it stopped.

    Returns:
        `output_dir`, `steps`, `train_loss`, `scores_before`, `scores`, `checkpoint`,
        `best_checkpoint`, `resumed_from`, `seconds`.

    Raises:
        FinetuneError: The user can mend it; every process ends with its exit code.
        SystemExit: 128 + n after signal n, with a checkpoint written. Before the first step there is
            nothing to save, and a signal ends the process as it would any other.
    """
    console.tolerate_lost_output()
    config = settled(config, launcher.world_size())
    training = config.training
    check_not_read(Path(training.output_dir), _sources(config.data), "training.output_dir")
    with (
        told_at_the_end(training.on_end, training.output_dir),
        RunDirectory.open(training.output_dir, leader=launcher.rank() == 0) as run_dir,
    ):
        for line in run_dir.cleaned:
            console.say(line)
        if training.resume == "never":
            resume.choose(run_dir.path, "never")  # refuses an old run at once
        if not trust_checkpoint:
            resume.check_owner(run_dir.path, training.resume)
        config = _pinned(config)
        template = ChatTemplate(load_chat_tokenizer(config.model.path, config.model.revision))
        data = load_run_data(config.data, training, template)
        with memory_explained(config, longest=int(data.train.lengths.max())):
            return _in_all_processes(config, template, data, run_dir)


def dry_run(config: RunConfig, *, trust_checkpoint: bool = False) -> dict[str, Any]:
    """What `train` would do with `config`; no step is done and the run directory is not touched.

    The data is prepared, which a run then finds in the cache; of a model that is here the headers of
    the weights are read and a step is counted on its shapes.

    Returns:
        `output_dir`, `steps`, `examples`, `validation_examples`, `resumes_from`, `model_tensors`
        (None for a model that is still to be fetched), `memory_bytes_per_gpu`.

    Raises:
        FinetuneError: The run would end with this.
    """
    config = settled(config, launcher.world_size())
    training = config.training
    run_dir = Path(training.output_dir)
    check_not_read(run_dir, _sources(config.data), "training.output_dir")
    if is_held(run_dir / LOCK):
        raise RunDirectoryInUseError(f"{run_dir} is in use by {holder(run_dir / LOCK)}")
    if not trust_checkpoint:
        resume.check_owner(run_dir, training.resume)
    start, damaged = resume.choose(run_dir, training.resume)
    for folder, reason in damaged:
        console.warn(f"{folder} is passed over: {reason}")
    template = ChatTemplate(load_chat_tokenizer(config.model.path, config.model.revision))
    data = load_run_data(config.data, training, template)
    steps = _total_steps(config, data)
    tensors, memory = _model_as_it_lies(config, int(data.train.lengths.max()))
    validation = None if data.validation is None else len(data.validation)
    console.table(
        ["", "this run would"],
        [
            ["train", f"{config.method.kind} on {config.model.path}"],
            [
                "open",
                f"{tensors:,} tensors" if tensors else "the model, fetched from its hub first",
            ],
            ["learn from", f"{len(data.train):,} examples"],
            ["measure on", "nothing" if validation is None else f"{validation:,} examples"],
            ["do", f"{steps:,} steps ({data.plan.steps_per_epoch:,} an epoch)"],
            ["start from", str(start) if start else "the beginning"],
            ["hold", f"about {memory / 1e9:.1f} GB on each GPU, besides the driver's own"],
            ["write to", training.output_dir],
        ],
    )
    return {
        "output_dir": training.output_dir,
        "steps": steps,
        "examples": len(data.train),
        "validation_examples": validation,
        "resumes_from": str(start) if start else None,
        "model_tensors": tensors,
        "memory_bytes_per_gpu": memory,
    }


def _model_as_it_lies(config: RunConfig, longest: int) -> tuple[int | None, int]:
    """How many tensors the weights' headers name, and the bytes of a GPU that are planned."""
    from finetune.artifacts.weights import tensors
    from finetune.planning.plan import Gpu, plan
    from finetune.training.arguments import check_trackers

    check_trackers(config.training.report_to)
    path = config.model.path
    folder = local_folder(path, config.model.revision, files=TOKENIZER_FILES)
    found = None if is_hub_id(path) else len(tensors(folder))
    length = config.data.max_length if config.data.packing else longest
    planned = plan(config, Gpu(number=launcher.world_size()), folder=folder, length=length)
    return found, planned.memory_bytes


def _pinned(config: RunConfig) -> RunConfig:
    """The config with the commit that its model's hub id stands for now, which is recorded."""
    if not is_hub_id(config.model.path):
        return config
    path, revision = config.model.path, config.model.revision
    folder = local_folder(path, revision, files=TOKENIZER_FILES)
    commit = hub.commit_of(folder)
    if commit is None:
        return config
    model = config.model.model_copy(update={"revision": commit})
    return config.model_copy(update={"model": model})


def _sources(section: DataSection) -> list[str]:
    """Every path of the data section."""
    listed = [
        source
        for sources in (section.train, section.validation or [])
        if sources is section.train or held_out_share(section.validation) is None
        for source in ([sources] if isinstance(sources, str) else sources)
    ]
    return [source if isinstance(source, str) else source.path for source in listed]


def _in_all_processes(
    config: RunConfig, template: ChatTemplate, data: RunData, run_dir: RunDirectory
) -> dict[str, Any]:
    """From here on with torch, and with the other processes."""
    from finetune.distributed.device import refuse_unused
    from finetune.distributed.processes import joined_processes
    from finetune.distributed.signals import StopFlag
    from finetune.distributed.watchdog import watching
    from finetune.models.library_logging import quiet_libraries

    begun = time.monotonic()
    quiet_libraries()
    refuse_unused()
    minutes, stop = config.training.process_timeout_minutes, StopFlag()
    joined = joined_processes(timeout_minutes=minutes, deepspeed=config.deepspeed is not None)
    with joined, ExitStack() as at_the_end, watching(minutes, stop):
        # One that has saved and waits for the others may get its own signal only then.
        at_the_end.callback(stop.uninstall)
        trainer, resumed = _train(config, template, data, run_dir, stop)
        summary = _summary(trainer, run_dir.path, resumed) | {
            "seconds": round(time.monotonic() - begun, 3)
        }
    if stop.is_set:
        console.say("checkpoint saved; run the same command to resume")
        raise SystemExit(stop.exit_code)
    return summary


def _train(
    config: RunConfig,
    template: ChatTemplate,
    data: RunData,
    run_dir: RunDirectory,
    stop: StopFlag,
) -> tuple[FineTuner, Path | None]:
    """The program: model, checkpoint, validation, loop. Returns the trainer when it is done."""
    from finetune.distributed import processes
    from finetune.training import batches, checkpointing, prepare_model, trainer, validation
    from finetune.training.callbacks import progress, throughput

    training = config.training
    prepared = prepare_model.prepare_model(
        config.model, config.method, training, config.deepspeed, data,
        loader_workers=config.data.loader_workers,
    )  # fmt: skip
    record = checkpointing.run_record(config.model_dump(), template, data, prepared)
    steps = _total_steps(config, data)
    resumed = processes.broadcast_from_rank0(
        lambda: resume.start(run_dir.path, training.resume, record)
    )
    if config.model.adapter is not None and resumed.folder is None:
        prepare_model.start_from_adapter(prepared, Path(config.model.adapter))
    with processes.fail_together():
        if processes.is_rank0():
            run_dir.write_config(dump_config(config))
            run_dir.write_data(data.described())
    planned = planned_rows(config, int(data.train.lengths.max()))
    progress.announce(training, data, prepared, steps, planned)
    saver = checkpointing.Saver(
        run_dir=run_dir.path,
        config_text=dump_config(config),
        record=record,
        base=prepared.base,
        metric=config.evaluation.best_metric,
        training=training,
    )
    work = throughput.work_of(
        prepared.model, data.mean_attended_length(), processes.rank_and_world()[1]
    )
    with progress.ProgressCallback(work) as bar:
        fine_tuner = trainer.FineTuner(
            prepared,
            data=batches.training_data(data, template, prepared, config.data),
            saver=saver,
            stop=stop,
            validation=validation.load_validation(
                config.evaluation, data, template, prepared.model, run_dir.path, stop
            ),
            progress=bar,
            compares_anew=resumed.compares_anew,
        )
        fine_tuner.seed_processes(training.seed, resumed.step)
        if resumed.step >= steps:
            console.say(f"no step to do: {resumed.folder} is the last of {steps} steps")
        fine_tuner.train(str(resumed.folder) if resumed.folder else None)
    return fine_tuner, resumed.folder


def _total_steps(config: RunConfig, data: RunData) -> int:
    """Optimizer steps of the whole run."""
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    return math.ceil(training.epochs * data.plan.steps_per_epoch)


def _summary(trainer: FineTuner, run_dir: Path, resumed: Path | None) -> dict[str, Any]:
    """The run in numbers; says how the scores have changed."""
    from finetune.training.callbacks import progress

    state = trainer.state
    before = progress.scores_at(state.log_history, first=True)
    after = progress.scores_at(state.log_history, first=False)
    if before and after:
        progress.compare(before, after)
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
