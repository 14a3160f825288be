"""What a checkpoint of a run holds, written and read back.

checkpoint-<step>/
    adapter_model.safetensors, adapter_config.json     or model shards and config.json
    tokenizer files of the base, for AutoTokenizer
    finetune.json               the base that was tuned
    optimizer.pt, scheduler.pt  or global_step<step>/ with DeepSpeed's shards
    rng_state[_<rank>].pth      random streams, one file per process
    trainer_state.json          steps, epoch, everything that was logged
    config.yaml, run.json       the resolved config; what a resume must match
    stream.json                 where the stream of training rows is, with data.streaming
    manifest.json               sizes and SHA-256 of all of it, written last

weights-<step>/ holds the first three lines, trainer_state.json and config.yaml: `training.save: weights`, or
beside the checkpoints with `training.save_weights_every_steps`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState

from finetune import console, methods
from finetune.artifacts import checkpoint
from finetune.artifacts.names import BEST, RUN_CONFIG, RUN_RECORD, STREAM, TRAINER_STATE
from finetune.config.schema import TrainingSection
from finetune.distributed.background import Background
from finetune.distributed.processes import (
    any_rank,
    fail_together,
    gather_objects,
    is_lost_connection,
    is_rank0,
    patient_group,
    rank_and_world,
    reduce_max,
)
from finetune.errors import (
    CheckpointError,
    FinetuneError,
    NonFiniteError,
    SpaceError,
    is_out_of_memory,
)
from finetune.methods import BaseRecord
from finetune.storage import folders
from finetune.storage.disk import BestEffort, is_disk_error
from finetune.storage.hashed import hashing
from finetune.training import resume
from finetune.training.prepare_model import PreparedModel
from finetune.training.run_data import RunData
from finetune.training.snapshot import Snapshot, take


@dataclass(frozen=True)
class Saver:
    """Writes the checkpoints of one run."""

    run_dir: Path
    config_text: str
    record: Mapping[str, Any]
    """See `run_record`."""
    base: BaseRecord
    metric: str
    """What the best checkpoint is best by."""
    training: TrainingSection
    noting: BestEffort = field(
        default_factory=lambda: BestEffort(BEST, "the next save tries again")
    )
    group: Any = field(default_factory=patient_group)
    """The processes wait for the disk in it, however long a save takes."""
    beside: Background = field(default_factory=lambda: Background("save"))
    """The save that goes on beside training, with `training.async_save`."""
    written: set[Path] = field(default_factory=set)
    """Folders that this run has sealed: nobody need read them to know that they are whole."""

    def save(self, trainer: Any) -> None:
        """Write the checkpoint of this step, whole or not at all; every process takes part.

        With `training.async_save` it is being written when this returns, and what goes wrong is
        raised by the next `save` or `finish`.

        Raises:
            NonFiniteError: What was trained is not finite; older checkpoints stay.
            SpaceError: There is no room, and the run stops for it or has no later save.
        """
        self._begin(trainer, resumable=self.training.save == "resumable")

    def save_only_weights(self, trainer: Any) -> None:
        """The same, of what was trained alone: nothing can be resumed from it."""
        self._begin(trainer, resumable=False)

    def finish(self) -> None:
        """Return when no save is under way; raises what `save` would."""
        self.beside.wait()

    def _begin(self, trainer: Any, *, resumable: bool) -> None:
        step = trainer.state.global_step
        check_weights(trainer.trained_weights, step)
        self.finish()
        final = self.run_dir / checkpoint.folder_name(step, resumable=resumable)
        texts = {TRAINER_STATE: _state_text(trainer), RUN_CONFIG: self.config_text}
        if resumable:
            texts[RUN_RECORD] = resume.text_of(self.record)
            if (feed := trainer.data.feed) is not None:
                texts[STREAM] = json.dumps(feed.position.as_json(), ensure_ascii=False) + "\n"
        copied = self.training.async_save
        snapshot = take(trainer, texts, resumable=resumable, copied=copied)
        if copied:
            self.beside.start(partial(self._save, snapshot, final))
        else:
            self._save(snapshot, final)

    def _save(self, snapshot: Snapshot, final: Path) -> None:
        """Every process takes part, in its main thread or in one beside it."""
        try:
            if not self._is_there(final):
                self._write(snapshot, final)
                self.written.add(final)
        except SpaceError as error:
            if self.training.on_full_disk == "stop" or snapshot.is_last:
                raise
            console.warn(f"{error}. Training goes on; the next save is tried as planned")
            return
        self._saved(snapshot.state, final)

    def _is_there(self, final: Path) -> bool:
        return final in self.written or (final.exists() and not folders.verify(final))

    def save_scores(self, trainer: Any) -> None:
        """Keep the scores of an evaluation that was repeated after a resume; every process takes part.

        After the last step no later checkpoint would hold them, so the one resumed from gets them.
        """
        state = trainer.state
        final = self.run_dir / checkpoint.folder_name(state.global_step)
        if not final.exists():
            return  # resumed from one that lies elsewhere
        with fail_together(self.group):
            if is_rank0() and state.global_step >= state.max_steps:
                folders.amend(final, TRAINER_STATE, _state_text(trainer))
        self._saved(state, final)

    def _saved(self, state: Any, final: Path) -> None:
        """Note a new best, and delete what is too old."""
        with fail_together(self.group):
            if is_rank0():
                with self.noting():
                    self._note_best(state)
                    self._rotate(final)

    def _note_best(self, state: Any) -> None:
        """Also the best of an earlier step, which the disk may not have let be noted then."""
        best = self._best_of(state)
        if best is not None and checkpoint.best(self.run_dir) != best:
            checkpoint.set_best(self.run_dir, best, self.metric, state.best_metric)

    def _best_of(self, state: Any) -> Path | None:
        step = state.best_global_step
        return None if step is None else checkpoint.of_step(self.run_dir, step)

    def _agreed(self, outcome: int) -> int:
        return reduce_max([outcome], self.group)[0]

    def _write(self, snapshot: Snapshot, final: Path) -> None:
        hashes: dict[str, tuple[int, str]] = {}
        agreed = self._agreed
        with folders.staged(
            final, is_rank0=is_rank0(), reduce_max=agreed, replace=True, known=hashes
        ) as stage:
            with hashing(stage) as written:
                # Each gathers what is sharded first: one that cannot write must not leave the others there.
                with folders.together(agreed, final):
                    self.save_weights(snapshot, stage)
                with folders.together(agreed, final):
                    snapshot.write_states(stage)
            for part in gather_objects(written, self.group):
                hashes |= part

    def save_weights(self, snapshot: Snapshot, folder: Path) -> None:
        """Write what was trained; every process takes part, rank 0 writes."""
        methods.save(snapshot.model, folder, base=self.base, gather=snapshot.gather)

    def load_weights(self, model: nn.Module, folder: Path) -> None:
        """Put back what `save_weights` wrote."""
        methods.restore(model, folder)

    def _rotate(self, newest: Path) -> None:
        best = checkpoint.best(self.run_dir)  # as just noted
        rotation = checkpoint.rotate(
            self.run_dir,
            self.training.keep_checkpoints,
            protect=[best] if best else [],
            whole=newest if newest in self.written else None,
        )
        if rotation.problem:
            console.warn(f"older checkpoints are kept: {rotation.problem}")


@contextmanager
def explain_load_errors(folder: str | None, *, begun: Callable[[], bool]) -> Iterator[None]:
    """Turn errors that libraries raise while they load `folder` into CheckpointError.

    Its manifest was right, so it holds what its writer put there; that need not be states of a run.
    """
    try:
        yield
    except Exception as error:
        if folder is None or begun() or isinstance(error, FinetuneError):
            raise
        if is_out_of_memory(error) or is_disk_error(error) or is_lost_connection(error):
            raise
        said = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder} is whole but cannot be opened ({type(error).__name__}: {said[:200]}); its "
            "states are not those that a run writes. Name another checkpoint with training.resume"
        ) from error


def check_weights(trained: Iterable[Tensor], step: int) -> None:
    """NonFiniteError in every process when a trained weight of any is NaN or infinite."""
    # ZeRO-3 leaves each process a part.
    is_finite = _are_finite([getattr(weight, "ds_tensor", weight).detach() for weight in trained])
    if not any_rank(not is_finite):
        return
    raise NonFiniteError(
        f"the weights after step {step} are not finite; no checkpoint was written of them, and the "
        "last one is untouched. Start again with a lower training.learning_rate in another "
        "training.output_dir, or resume from the last checkpoint with a lower training.max_grad_norm"
    )


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no number of any is NaN or infinite: one pass, without a copy.

    A sum is not finite when one of its numbers is not. Great numbers may overflow in it, so then all
    are looked at.
    """
    sums: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        sums.setdefault((tensor.device, tensor.dtype), []).append(tensor.sum())
    if all(bool(torch.isfinite(torch.stack(ones)).all()) for ones in sums.values()):
        return True
    return all(
        bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
        for tensor in tensors
        if tensor.numel()
    )


def run_record(config: Mapping[str, Any], data: RunData, prepared: PreparedModel) -> dict[str, Any]:
    """What a checkpoint keeps about its run: options, facts (see FACTS), library versions.

    ``config`` is the resolved configuration as a mapping of sections.
    """
    facts: dict[str, Any] = {
        "model": prepared.base.fingerprint,
        "template": data.template.fingerprint,
        "data": data.train.fingerprint,
        "global_batch": data.plan.global_batch,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "deepspeed": _sharding(prepared.deepspeed),
        "trainable": trainable_shapes(prepared.model),
    }
    if prepared.deepspeed is not None:
        facts["processes"] = rank_and_world()[1]
    if data.validation is not None:
        facts["validation"] = data.validation.fingerprint
    if data.kept is not None:
        facts["general"] = data.kept.fingerprint
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    if prepared.deepspeed is not None:
        versions["deepspeed"] = version("deepspeed")
    return resume.record(config, facts, versions)


def _sharding(deepspeed: Mapping[str, Any] | None) -> str:
    """The DeepSpeed settings but for what is the training section's, and judged there."""
    if deepspeed is None:
        return "none"
    elsewhere = (
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping",
    )  # fmt: skip
    kept = {key: value for key, value in deepspeed.items() if key not in elsewhere}
    stage = deepspeed["zero_optimization"].get("stage", 0)
    return f"ZeRO-{stage}, {hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]}"


def trainable_shapes(model: nn.Module) -> str:
    """A short text that changes with the name or shape of any trained weight."""
    shapes = {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
    return f"{len(shapes)} tensors, {digest[:12]}"


def _state_text(trainer: Any) -> str:
    """The Trainer's state, with that of its callbacks as the Trainer itself would put it there."""
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
    # As TrainerState.save_to_json writes it.
    return json.dumps(asdict(trainer.state), indent=2, sort_keys=True) + "\n"
