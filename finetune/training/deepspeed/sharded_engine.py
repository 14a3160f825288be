"""What DeepSpeed's engine is told to do differently: guard a step, open its own states safely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum
from functools import partial
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from finetune.training.deepspeed.resharded import go_on_at_any_number

LOOK = "is_invalid_grad_norm"
# All that a saved optimizer state holds besides tensors and plain containers.
KNOWN_TYPES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class GuardedEngine(DeepSpeedEngineWrapper):
    """Accelerate's wrapper of the engine, with a look at the gradients before every step.

    `engine.step` clips, steps and zeroes in one call inside `backward`: the Trainer's own place
    for a look comes too late.
    """

    def __init__(self, engine: Any, guard: Callable[[torch.Tensor | None], None]) -> None:
        super().__init__(engine)
        self._guard = guard
        self._norm: torch.Tensor | None = None
        _make_saves_safe(engine)
        if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
            # Its constructor took a step with gradients of zero, which would make Adam's first real
            # update a quarter smaller than in every other stage.
            engine.optimizer.optimizer.state.clear()
        if not all(weight.requires_grad for weight in engine.module.parameters()):
            _leave_frozen_weights_out(engine)
        go_on_at_any_number(engine, partial(_read, mapped=True))

    def backward(self, loss: Any, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Backward pass; at the end of an accumulation also guard and optimizer step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            norm = self._gradient_norm()
            self._guard(norm)
            with _norm_looked_at() if norm is not None else nullcontext():
                self.engine.step()

    def get_global_grad_norm(self) -> Any:
        """The norm before clipping; in stage 0 DeepSpeed does not tell it."""
        norm = self.engine.get_global_grad_norm()  # accelerate's own would wait for the number
        return self._norm if norm is None else norm

    def _gradient_norm(self) -> torch.Tensor | None:
        """Of this process's part; with loss scaling, where overflow is normal, None."""
        if self.engine.fp16_enabled():
            return None
        whole = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        parts = getattr(self.engine.optimizer, "averaged_gradients", None) or {}
        sharded = [part for group in parts.values() for part in group or () if part is not None]
        norm = torch.nn.utils.get_total_norm([*whole, *sharded])
        if whole and not sharded:
            self._norm = norm
        return norm


@contextmanager
def _norm_looked_at() -> Iterator[None]:
    """DeepSpeed does not wait for the norm to see whether it is a number: the guard just did.

    It would once in a step, and under ZeRO-2 once more for every group of weights.
    """
    before = {
        zero: zero.is_invalid_grad_norm for zero in (stage_1_and_2, stage3) if hasattr(zero, LOOK)
    }
    for zero in before:
        setattr(zero, LOOK, lambda norm: False)
    try:
        yield
    finally:
        for zero, look in before.items():
            setattr(zero, LOOK, look)


def _make_saves_safe(engine: Any) -> None:
    """Saving hands the states over instead of writing them: processes wait for nobody's disk in it."""
    engine.checkpoint_engine = TakenStates()
    # DeepSpeed's converters open pickles; what was trained is there as safetensors.
    engine._copy_recovery_script = lambda folder: None
    engine.save_checkpoint = partial(engine.save_checkpoint, save_latest=False)


def _leave_frozen_weights_out(engine: Any) -> None:
    """Checkpoints hold what is trained; the base is where it was. transformers does it for PEFT only."""
    load = engine.load_checkpoint
    engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)

    def load_checkpoint(folder: str, **options: Any) -> Any:
        return load(folder, **options | {"load_module_strict": False})

    engine.load_checkpoint = load_checkpoint


class TakenStates(TorchCheckpointEngine):
    """Keeps the states of a save for whoever writes them; reads them without running what a pickle may say."""

    def __init__(self) -> None:
        super().__init__()
        self._states: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        """Keep a state that belongs to `path`."""
        self._states[path] = _without_enums(state_dict)

    def taken(self) -> dict[str, Any]:
        """The states by path, once."""
        states, self._states = self._states, {}
        return states

    def load(self, path: str, map_location: Any = None) -> Any:
        """The state in `path`."""
        return _read(path, map_location)


def _read(path: Any, map_location: Any = "cpu", *, mapped: bool = False) -> Any:
    with torch.serialization.safe_globals(KNOWN_TYPES):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)


def _without_enums(value: Any) -> Any:
    """The state with the values of enum members.

    Python 3.11.0 to 3.11.3 pickles a member as a call of `getattr`, which weights_only refuses.
    """
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _without_enums(inner) for key, inner in value.items()}
    return [_without_enums(inner) for inner in value] if type(value) is list else value
