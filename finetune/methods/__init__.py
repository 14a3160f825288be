"""The ways to tune a model: attach one, save what it trained, put it back.

Nothing else in the house differs between methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from finetune.config import FullMethod, LoraMethod, PTuningV2Method
from finetune.methods import full, lora, ptuning_v2
from finetune.methods.base_record import BaseRecord
from finetune.methods.freezing import frozen_names

__all__ = ["BaseRecord", "attach", "restore", "save", "trained_modules"]


def attach(
    model: PreTrainedModel,
    section: LoraMethod | PTuningV2Method | FullMethod,
    *,
    family: str,
    freeze: Sequence[str] = (),
) -> PreTrainedModel:
    """The model with the weights of `section.kind` trainable and the rest frozen.

    Adapters are float32; weights of the model itself keep the format they were loaded in.

    Args:
        model: The base.
        section: The method and its options.
        family: See `models.load.family`.
        freeze: `model.freeze`.
    """
    frozen = frozen_names((name for name, _ in model.named_parameters()), freeze)
    if isinstance(section, LoraMethod):
        return lora.attach(model, section, family=family, frozen=frozen)
    if isinstance(section, PTuningV2Method):
        return ptuning_v2.attach(model, section)  # trains none of the model's own weights
    return full.attach(model, frozen=frozen)


def trained_modules(model: PreTrainedModel) -> dict[str, int]:
    """Name patterns of what is trained (layer numbers as `*`), and how many modules each stands for."""
    if lora.is_adapted(model):
        return lora.matched_modules(model)
    if ptuning_v2.is_prefixed(model):
        return ptuning_v2.matched_modules(model)
    return full.matched_modules(model)


def save(
    model: PreTrainedModel,
    folder: Path,
    *,
    base: BaseRecord,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what was trained to `folder`; `state_dict` stands in for a sharded model's own."""
    if lora.is_adapted(model):
        lora.save(model, folder, base=base, state_dict=state_dict)
    elif ptuning_v2.is_prefixed(model):
        ptuning_v2.save(model, folder, base=base, state_dict=state_dict)
    else:
        full.save(model, folder, base=base, state_dict=state_dict)


def restore(model: PreTrainedModel, folder: Path) -> None:
    """Put the weights that `save` wrote back into a model with the same method attached."""
    if lora.is_adapted(model):
        lora.restore(model, folder)
    elif ptuning_v2.is_prefixed(model):
        ptuning_v2.restore(model, folder)
    else:
        full.restore(model, folder)
