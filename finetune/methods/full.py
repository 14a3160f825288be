"""Full fine-tuning: every weight is trained and saved under the base's own names.

Who keeps the float32 originals that small updates need, when a model computes in bfloat16: DeepSpeed
in its optimizer, sharded over the processes, around a bfloat16 model; without DeepSpeed the model's
trained weights themselves are float32 and every operation casts (`training.prepare_model` loads them so).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.artifacts.base_record import BaseRecord
from finetune.artifacts.experts import num_experts, separate_names
from finetune.artifacts.names import MODEL_WEIGHTS, WEIGHTS_INDEX
from finetune.artifacts.weights import weight_files
from finetune.config.schema import FullMethod
from finetune.errors import ConfigError, ModelError
from finetune.methods.carried import carry_model_files
from finetune.methods.full_experts import ahead_of, separated, together
from finetune.methods.tensor_file import save_config, save_tensors
from finetune.storage.hashed import hashed_text

Gather: TypeAlias = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Weights by name; in a process that does not write, nothing."""

MAX_SHARD_BYTES = 5_000_000_000


def attach(
    model: PreTrainedModel, section: FullMethod, *, frozen: Collection[str] = (), **_: object
) -> PreTrainedModel:
    """The model with every weight trainable but the `frozen` ones.

    Raises:
        ConfigError: Nothing is left to train.
    """
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ConfigError(
            "model.freeze: every weight is frozen and nothing is left to train; freeze fewer"
        )
    return model


def matched_modules(model: nn.Module) -> dict[str, int]:
    """How many tensors are trained and how many are frozen."""
    trained = [weight.requires_grad for weight in model.parameters()]
    if all(trained):
        return {"every weight": len(trained)}
    return {"weights": sum(trained), "frozen weights": len(trained) - sum(trained)}


def own_weights(model: nn.Module) -> Gather:
    """Weights of a model that is whole, by name."""

    def gather(names: Sequence[str]) -> dict[str, Tensor]:
        state = model.state_dict()
        return {name: state[name] for name in names}

    return gather


def save(model: PreTrainedModel, folder: Path, *, base: BaseRecord, gather: Gather) -> None:
    """Write the model as safetensors in the base's names, with the base's tokenizer files.

    Shard after shard is gathered and written, so that nobody holds more than one shard beside what
    was there before.
    """
    index: dict[str, str] = {}
    problem: Exception | None = None
    writes = False
    carried = ahead_of(base)
    shards = [*_shards(model), *([list(carried)] if carried else [])]
    experts = num_experts(model.config.to_dict())
    size = 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if shards[1:] else MODEL_WEIGHTS
        index |= dict.fromkeys(
            (one for name in names for one in separate_names(name, experts)), file
        )
        is_carried = bool(carried) and number == len(shards)
        # What nothing here reads is the base's own; the others need not gather it.
        tensors = separated(gather(names)) if not is_carried else carried if writes else {}
        writes = bool(tensors)
        size += sum(map(_num_bytes, tensors.values()))
        if tensors and problem is None:
            try:
                save_tensors(tensors, folder / file)
            except Exception as error:
                problem = error  # the others are still to gather the shards after this one
        del tensors  # before the next ones are gathered
    if problem is not None:
        raise problem
    if not writes:
        return
    if shards[1:]:
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
        hashed_text(folder / WEIGHTS_INDEX, text + "\n")
    save_config(model.config, folder)
    carry_model_files(base, folder)
    base.write(folder, method="full")


def saved_names(model: PreTrainedModel) -> list[str]:
    """Names of the tensors that `save` writes."""
    return list(_state(model))


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors by name as they are saved: a tied weight once. Sharded ones are placeholders."""
    parameters = dict(model.named_parameters())  # has tied ones once, like the base's files
    tied = set(getattr(model, "all_tied_weights_keys", None) or ()) - set(parameters)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return state | {name: weight for name, weight in parameters.items() if name in state}


def _shards(model: PreTrainedModel) -> list[list[str]]:
    """Names shard by shard, in the model's order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in _state(model).items():
        size = _num_bytes(tensor)
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _num_bytes(tensor: Tensor) -> int:
    """Also of a weight that ZeRO-3 has taken apart."""
    return int(getattr(tensor, "ds_numel", tensor.numel())) * tensor.element_size()


def restore(model: PreTrainedModel, folder: Path) -> None:
    """Put saved weights back, shard by shard.

    Raises:
        ModelError: The folder lacks weights of the model.
    """
    missing = set(_state(model))
    for file in weight_files(folder):
        shard = together(load_file(file))
        model.load_state_dict(shard, strict=False)
        missing -= set(shard)
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(sorted(missing)[:3])}; it cannot be resumed; resume from another checkpoint"
        )
