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

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_callback import ExportableState

from finetune import console, methods
from finetune.artifacts import checkpoint
from finetune.artifacts.names import BEST, RUN_CONFIG, TRAINER_STATE
from finetune.distributed.processes import fail_together, gather_to_rank0, is_rank0, worst
from finetune.errors import SpaceError
from finetune.methods import BaseRecord
from finetune.storage import folders
from finetune.storage.disk import BestEffort
from finetune.training import resume


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
    goes_on_without_room: bool = True
    """Whether a full disk costs a save or the run; `training.on_full_disk`."""
    noting: BestEffort = field(
        default_factory=lambda: BestEffort(BEST, "the next save tries again")
    )

    def save(self, trainer: Any) -> None:
        """Write `checkpoint-<step>`, whole or not at all; every process takes part.

        Raises:
            SpaceError: There is no room, and the run stops for it or has no later save.
        """
        final = self.run_dir / f"checkpoint-{trainer.state.global_step}"
        try:
            if not final.exists() or folders.verify(final):
                self._write(trainer, final)
        except SpaceError as error:
            if not self.goes_on_without_room or trainer.control.should_training_stop:
                raise
            console.warn(f"{error}. Training goes on; the next save is tried as planned")
            return
        self._saved(trainer, final)

    def save_scores(self, trainer: Any) -> None:
        """Keep scores that were made up for after a resume; every process takes part.

        After the last step no later checkpoint would hold them, so the one resumed from gets them.
        """
        state = trainer.state
        final = self.run_dir / f"checkpoint-{state.global_step}"
        if not final.exists():
            return  # resumed from one that lies elsewhere
        with fail_together():
            if is_rank0() and state.global_step >= state.max_steps:
                folders.amend(final, TRAINER_STATE, _state_text(trainer))
        self._saved(trainer, final)

    def _saved(self, trainer: Any, final: Path) -> None:
        """Note a new best, and delete what is too old."""
        with fail_together():
            if is_rank0():
                with self.noting():
                    self._note_best(trainer.state)
                    self._rotate(trainer.state)

    def _note_best(self, state: Any) -> None:
        """Also the best of an earlier step, which the disk may not have let be noted then."""
        best = self.run_dir / f"checkpoint-{state.best_global_step}"
        if best.is_dir() and checkpoint.best(self.run_dir) != best:
            checkpoint.set_best(self.run_dir, best, self.metric, state.best_metric)

    def _write(self, trainer: Any, final: Path) -> None:
        leader = is_rank0()
        with folders.staged(final, leader=leader, worst=worst, replace=True) as stage:
            # Each gathers what is sharded first: one that cannot write must not leave the others there.
            with folders.together(worst, final):
                self.save_weights(trainer.model, stage)
            with folders.together(worst, final):
                trainer._save_optimizer_and_scheduler(str(stage))
            trainer._save_scaler(str(stage))
            trainer._save_rng_state(str(stage))
            if leader:
                (stage / TRAINER_STATE).write_text(_state_text(trainer), encoding="utf-8")
                (stage / RUN_CONFIG).write_text(self.config_text, encoding="utf-8")
                resume.write(stage, self.record)

    def save_weights(self, model: nn.Module, folder: Path) -> None:
        """Write what was trained; every process takes part, the leader writes."""
        pieces = partial(gather_to_rank0, model)
        methods.save(model, folder, base=self.base, gather=pieces)

    def load_weights(self, model: nn.Module, folder: Path) -> None:
        """Put back what `save_weights` wrote."""
        methods.restore(model, folder)

    def _rotate(self, state: Any) -> None:
        best = [
            checkpoint.best(self.run_dir),
            self.run_dir / f"checkpoint-{state.best_global_step}",
        ]
        rotation = checkpoint.rotate(self.run_dir, self.keep, protect=[b for b in best if b])
        if rotation.problem:
            console.warn(f"older checkpoints are kept: {rotation.problem}")


def _state_text(trainer: Any) -> str:
    """The Trainer's state, with that of its callbacks as the Trainer itself would put it there."""
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
    # As TrainerState.save_to_json writes it.
    return json.dumps(asdict(trainer.state), indent=2, sort_keys=True) + "\n"
