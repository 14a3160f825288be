"""A run from outside: its directory, its processes, and who is told how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.artifacts.resolve import pinned_revision
from finetune.artifacts.run_dir import RunDirectory
from finetune.config.extras import check_optimizer
from finetune.config.schema import DataSection, ModelSection, TrainingSection
from finetune.data.reading.section import training_sources, validation_sources
from finetune.errors import RunDirectoryInUseError
from finetune.storage.outputs import check_not_read
from finetune.training import resume
from finetune.training.callbacks.on_end import told_at_the_end

if TYPE_CHECKING:
    from finetune.distributed.signals import StopFlag


@contextmanager
def run_directory(training: TrainingSection, data: DataSection, *, trust: bool) -> Iterator[Path]:
    """The run's folder, locked, and found to be one that this run may write into and go on from.

    `training.on_end` is run when the block is left.

    Raises:
        ConfigError, RunDirectoryInUseError: The folder may not be written.
        CheckpointError: `training.resume` forbids what is there, or, without `trust`, another user
            wrote a checkpoint with pickles.
    """
    console.tolerate_lost_output()
    _check_beside(training, data)
    with (
        told_at_the_end(training.on_end, training.output_dir),
        RunDirectory.open(training.output_dir, is_rank0=console.is_rank0()) as run_dir,
    ):
        for line in run_dir.cleaned:
            console.say(line)
        if training.resume == "never":
            resume.choose(run_dir.path, "never")  # refuses an old run at once
        if not trust:
            resume.check_owner(run_dir.path, training.resume)
        yield run_dir.path


def would_start(training: TrainingSection, data: DataSection, *, trust: bool) -> Path | None:
    """The checkpoint that a run would go on from; raises what `run_directory` would."""
    _check_beside(training, data)
    run_dir = Path(training.output_dir)
    if user := RunDirectory.user(run_dir):
        raise RunDirectoryInUseError(f"{run_dir} is in use by {user}; wait for it, or stop it")
    if not trust:
        resume.check_owner(run_dir, training.resume)
    start, damaged = resume.choose(run_dir, training.resume)
    for folder, reason in damaged:
        console.warn(f"{folder} is passed over: {reason}")
    return start


def _check_beside(training: TrainingSection, data: DataSection) -> None:
    check_optimizer(training.optimizer)
    sources = (*training_sources(data), *validation_sources(data))
    paths = dict.fromkeys(source.path for source in sources)
    check_not_read(Path(training.output_dir), paths, "training.output_dir")


def pinned(section: ModelSection) -> ModelSection:
    """The section with the commit that a hub id stands for now, which is recorded."""
    revision = pinned_revision(section.path, section.revision)
    return section.model_copy(update={"revision": revision})


@contextmanager
def all_processes(training: TrainingSection, *, deepspeed: bool) -> Iterator[StopFlag]:
    """In here the processes of the run are joined and watch each other.

    Raises:
        SystemExit: At the end of the block, when a signal asked the run to stop.
    """
    from finetune.distributed.processes import joined_processes
    from finetune.distributed.signals import StopFlag
    from finetune.distributed.watchdog import watching
    from finetune.models.library_logging import quiet_libraries

    quiet_libraries()
    minutes, stop = training.process_timeout_minutes, StopFlag()
    with joined_processes(timeout_minutes=minutes, deepspeed=deepspeed):
        try:
            with watching(minutes, stop):
                yield stop
        finally:
            stop.uninstall()  # one that has saved and waits may get its own signal only then
    if stop.is_set:
        console.say("checkpoint saved; run the same command to resume")
        raise SystemExit(stop.exit_code)


def describe(run_dir: Path, config_text: str, data: Mapping[str, Any]) -> None:
    """Writes config.yaml and data.json on rank 0; every process takes part."""
    from finetune.distributed.processes import fail_together, is_rank0

    with fail_together():
        if is_rank0():
            folder = RunDirectory(run_dir)
            folder.write_config(config_text)
            folder.write_data(data)
