"""The ways to tune a model: attach one, save what it trained, put it back.

Nothing else in the house differs between methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from finetune.artifacts.base_record import BaseRecord
from finetune.config.schema import FullMethod, LoraMethod, PTuningV2Method
from finetune.methods import full, lora, ptuning_v2
from finetune.methods.freezing import frozen_names
from finetune.methods.full import Gather

__all__ = ["BaseRecord", "Gather", "attach", "restore", "save", "trained_modules"]


def attach(
    model: PreTrainedModel,
    section: LoraMethod | PTuningV2Method | FullMethod,
    *,
    family: str,
    freeze: Sequence[str] = (),
    start_ids: Sequence[int] = (),
) -> PreTrainedModel:
    """The model with the weights of `section.kind` trainable and the rest frozen.

    Adapters are float32; weights of the model itself keep the format they were loaded in.

    Args:
        model: The base.
        section: The method and its options.
        family: See `models.load.family`.
        freeze: `model.freeze`.
        start_ids: The text that a prefix starts from, see `ptuning_v2.attach`.
    """
    frozen = frozen_names((name for name, _ in model.named_parameters()), freeze)
    if isinstance(section, LoraMethod):
        return lora.attach(model, section, family=family, frozen=frozen)
    if isinstance(section, PTuningV2Method):
        return ptuning_v2.attach(
            model, section, start_ids=start_ids
        )  # trains none of the model's own weights
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
    gather: Gather | None = None,
) -> None:
    """Write what was trained to `folder`.

    Args:
        model: With a method attached.
        folder: Must exist.
        base: What was tuned.
        gather: Gives weights by name, for a model that is sharded: then every process calls this,
            and those for which it gives nothing write nothing. By default the model's own.
    """
    gather = gather or full.own_weights(model)
    if not (lora.is_adapted(model) or ptuning_v2.is_prefixed(model)):
        full.save(model, folder, base=base, gather=gather)
        return
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if state := gather(names):
        kind = lora if lora.is_adapted(model) else ptuning_v2
        kind.save(model, folder, base=base, state_dict=state)


def restore(model: PreTrainedModel, folder: Path) -> None:
    """Put the weights that `save` wrote back into a model with the same method attached."""
    if lora.is_adapted(model):
        lora.restore(model, folder)
    elif ptuning_v2.is_prefixed(model):
        ptuning_v2.restore(model, folder)
    else:
        full.restore(model, folder)
