"""What a save writes, taken at one moment of the run: by reference, or copied to the host's memory."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from torch import Tensor

from finetune import methods
from finetune.distributed import device
from finetune.distributed.processes import gather_to_rank0, is_rank0, rank_and_world
from finetune.methods.full import Gather
from finetune.storage.hashed import hashed_file, hashed_text

OPTIMIZER, SCHEDULER, SCALER = "optimizer.pt", "scheduler.pt", "scaler.pt"


@dataclass(frozen=True)
class Snapshot:
    """One moment of a run, as this process has it."""

    state: Any
    """The Trainer's: steps, best score."""
    is_last: bool
    """Whether no later save is planned."""
    model: Any
    gather: Gather
    """Weights by name, in the process that writes them."""
    states: Mapping[str, Any]
    """By file name, of this process alone; empty where only weights are kept."""
    texts: Mapping[str, str]
    """The same for text."""

    def write_states(self, folder: Path) -> None:
        """This process's part beside the weights."""
        for name, state in self.states.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            save_state(state, path)
        for name, text in self.texts.items():
            hashed_text(folder / name, text)


def save_state(state: Any, path: Path) -> None:
    """Write `path` as torch.save does, without its checksums: SHA-256 says more."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with hashed_file(path) as file:
            torch.save(state, cast("Any", file))
    finally:
        torch.serialization.set_crc32_options(before)


def take(trainer: Any, texts: Mapping[str, str], *, resumable: bool, copied: bool) -> Snapshot:
    """The moment that the run is at; every process takes part.

    Args:
        trainer: Between two steps.
        texts: By file name, for the process that writes weights.
        resumable: With the states of optimizer, schedule and random streams.
        copied: Training may go on while the snapshot is written.
    """
    states = states_of(trainer) if resumable else {}
    if resumable and trainer.is_deepspeed_enabled:
        # What DeepSpeed opens, by its own name.
        texts = {**texts, "latest": f"global_step{trainer.model_wrapped.global_steps}"}
    gather: Gather = partial(gather_to_rank0, trainer.model)
    if copied:
        held = gather(methods.saved_names(trainer.model))
        memo: dict[Any, Any] = {}
        kept = host_copy(dict(held), memo)
        states = host_copy(states, memo)

        def from_memory(names: Any) -> dict[str, Tensor]:
            return {name: kept[name] for name in names} if kept else {}

        gather = from_memory
    return Snapshot(
        state=copy.copy(trainer.state),
        is_last=trainer.control.should_training_stop
        or trainer.state.global_step >= trainer.state.max_steps,
        model=trainer.model,
        gather=gather,
        states=states,
        texts=texts if is_rank0() else {},
    )


def states_of(trainer: Any) -> dict[str, Any]:
    """What the Trainer's own methods would write beside the weights, by file name."""
    rank, world = rank_and_world()
    found: dict[str, Any] = {}
    if trainer.is_deepspeed_enabled:
        found |= _engine_states(trainer.model_wrapped)
    elif rank == 0:
        found[OPTIMIZER] = trainer.optimizer.state_dict()
    if rank == 0:
        # DeepSpeed's own schedulers are in its states; ours is torch's.
        if not isinstance(trainer.lr_scheduler, DeepSpeedSchedulerWrapper):
            found[SCHEDULER] = trainer.lr_scheduler.state_dict()
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None:
            found[SCALER] = scaler.state_dict()
    name = "rng_state.pth" if world == 1 else f"rng_state_{rank}.pth"
    return found | {name: _random_streams(world)}


def _random_streams(world: int) -> dict[str, Any]:
    streams = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    return streams | device.random_states(everywhere=world > 1)


def _engine_states(engine: Any) -> dict[str, Any]:
    """What DeepSpeed would write, by file name; it makes its empty folders elsewhere."""
    states = engine.checkpoint_engine
    with TemporaryDirectory() as aside:
        engine.save_checkpoint(aside)
        return {
            Path(path).relative_to(aside).as_posix(): state
            for path, state in states.taken().items()
        }


def host_copy(value: Any, memo: dict[Any, Any]) -> Any:
    """The value with its tensors in memory of their own on the host; what shares memory still does."""
    if isinstance(value, Tensor):
        return _tensor_copy(value.detach(), memo)
    if isinstance(value, dict):
        copied = copy.copy(value)
        for key, inner in value.items():
            copied[key] = host_copy(inner, memo)
        return copied
    if type(value) in (list, tuple):
        return type(value)(host_copy(inner, memo) for inner in value)
    return copy.deepcopy(value)


def _tensor_copy(tensor: Tensor, memo: dict[Any, Any]) -> Tensor:
    storage: Any = tensor.untyped_storage()
    key = tensor.device, storage.data_ptr(), storage.nbytes()
    if not storage.nbytes():
        return tensor.cpu()
    if key not in memo:
        memo[key] = storage.clone() if tensor.device.type == "cpu" else storage.cpu()
    return torch.empty(0, dtype=tensor.dtype).set_(
        memo[key], tensor.storage_offset(), tensor.shape, tensor.stride()
    )
