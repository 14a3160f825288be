"""What a checkpoint of a run holds, written and read back.

checkpoint-<step>/
    adapter_model.safetensors, adapter_config.json     or model shards and config.json
    finetune.json               the base that was tuned
    optimizer.pt, scheduler.pt  or global_step<step>/ with DeepSpeed's shards
    rng_state[_<rank>].pth      random streams, one file per process
    trainer_state.json          steps, epoch, everything that was logged
    config.yaml, run.json       the resolved config; what a resume must match
    manifest.json               sizes and SHA-256 of all of it, written last
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_callback import ExportableState

from finetune import console, methods
from finetune.methods import BaseRecord
from finetune.training import checkpoint, resume
from finetune.training.gathering import gather
from finetune.training.processes import Processes

TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Saver:
    """Writes the checkpoints of one run."""

    run_dir: Path
    config_text: str
    record: Mapping[str, Any]
    """See `training.resume.record`."""
    base: BaseRecord
    metric: str
    """What the best checkpoint is best by."""
    keep: int
    processes: Processes

    def save(self, trainer: Any) -> Path:
        """Write `checkpoint-<step>`, whole or not at all; every process takes part."""
        final = self.run_dir / f"checkpoint-{trainer.state.global_step}"
        if not final.exists() or checkpoint.verify(final):
            self._write(trainer, final)
        with self.processes.failing_together():
            if self.processes.is_leader:
                if trainer.state.best_global_step == trainer.state.global_step:
                    checkpoint.set_best(self.run_dir, final, self.metric, trainer.state.best_metric)
                self._rotate()
        return final

    def _write(self, trainer: Any, final: Path) -> None:
        leader = self.processes.is_leader
        with checkpoint.staged(
            final, leader=leader, agree=self.processes.all_well, replace=True
        ) as stage:
            self.save_weights(trainer.model, stage)
            trainer._save_optimizer_and_scheduler(str(stage))
            trainer._save_scaler(str(stage))
            trainer._save_rng_state(str(stage))
            if leader:
                # DeepSpeed's converters open pickles; what was trained is there as safetensors.
                for script in stage.glob("zero_to_*.py"):
                    script.unlink()
                _save_state(trainer, stage)
                (stage / "config.yaml").write_text(self.config_text, encoding="utf-8")
                resume.write(stage, self.record)

    def save_weights(self, model: nn.Module, folder: Path) -> None:
        """Write what was trained; every process takes part, the leader writes."""
        pieces = partial(gather, model, leader=self.processes.is_leader)
        methods.save(model, folder, base=self.base, gather=pieces)

    def load_weights(self, model: nn.Module, folder: Path) -> None:
        """Put back what `save_weights` wrote."""
        methods.restore(model, folder)

    def _rotate(self) -> None:
        best = checkpoint.best(self.run_dir)
        rotation = checkpoint.rotate(self.run_dir, self.keep, protect=[best] if best else [])
        if rotation.problem:
            console.warn(f"older checkpoints are kept: {rotation.problem}")


def _save_state(trainer: Any, folder: Path) -> None:
    """The Trainer's state, with that of its callbacks as the Trainer itself would put it there."""
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
    trainer.state.save_to_json(str(folder / TRAINER_STATE))
