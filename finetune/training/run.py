"""The whole program: a config goes in, a run directory with checkpoints and scores comes out.

What a user can get wrong in config and data is found in `train`, before torch is imported.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import collector
from finetune.config.load import dump_config, settled
from finetune.config.schema import RunConfig
from finetune.planning.run_memory import RunMemory
from finetune.training import resume, session
from finetune.training.loading.prepare_data import RunData, load_run_data


def train(
    config: RunConfig, *, trust_checkpoint: bool = False, callbacks: Sequence[Any] = ()
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
    config = settled(config)
    with session.run_directory(config.training, config.data, trust=trust_checkpoint) as run_dir:
        config = config.model_copy(update={"model": session.pinned(config.model)})
        data = load_run_data(config.data, config.training, config.model, config.evaluation.keep)
        with memory_of(config, data).explained():
            return _train(config, data, run_dir, callbacks)


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
    from finetune.training.dry_run import foreseen

    config = settled(config)
    start = session.would_start(config.training, config.data, trust=trust_checkpoint)
    data = load_run_data(config.data, config.training, config.model, config.evaluation.keep)
    return foreseen(config.training, data, memory_of(config, data), start)


def memory_of(config: RunConfig, data: RunData) -> RunMemory:
    """What the run holds, and which options would need less."""
    return RunMemory(
        config.model,
        config.method,
        config.training,
        config.deepspeed,
        config.evaluation if data.validation is not None else None,
        max_length=config.data.max_length,
        longest=data.longest,
    )


def _train(
    config: RunConfig, data: RunData, run_dir: Path, callbacks: Sequence[Any]
) -> dict[str, Any]:
    """The program, with torch and the other processes: model, checkpoint, validation, loop."""
    with collector.importing():
        from finetune.training import checkpointing, trainer
        from finetune.training.adapter_start import start_from_adapter
        from finetune.training.callbacks import progress
        from finetune.training.loading import batches
        from finetune.training.measuring.load import load_validation
        from finetune.training.prepare_model import prepare_model

    begun = time.monotonic()
    with (
        collector.passing_over_the_old(),
        session.all_processes(config.training, deepspeed=config.deepspeed is not None) as stop,
    ):
        prepared = prepare_model(
            config.model, config.method, config.training, config.deepspeed, data,
            loader_workers=config.data.loader_workers,
        )  # fmt: skip
        record = checkpointing.run_record(config.model_dump(), data, prepared)
        start = resume.start_together(run_dir, config.training.resume, record)
        start_from_adapter(prepared, resumed=start.folder is not None)
        session.describe(run_dir, dump_config(config), data.described())
        progress.announce(config.training, data, prepared, start, memory_of(config, data).rows())
        with progress.progress_of(prepared.model, data) as bar:
            fine_tuner = trainer.FineTuner(
                prepared,
                data=batches.training_data(data, prepared, config.data, start.folder),
                saver=checkpointing.Saver(
                    run_dir, dump_config(config), record, prepared.base,
                    config.evaluation.best_metric, config.training,
                ),
                stop=stop,
                validation=load_validation(
                    config.evaluation, data, prepared.model, run_dir, stop
                ),
                progress=bar,
                compares_anew=start.compares_anew,
            )  # fmt: skip
            for callback in callbacks:
                fine_tuner.add_callback(callback)
            fine_tuner.run(start.folder, start.step)
        return progress.summary(fine_tuner, run_dir, start.folder) | {
            "seconds": round(time.monotonic() - begun, 3)
        }
