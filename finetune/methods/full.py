"""Full fine-tuning: every weight is trained and saved under the base's own names.

Who keeps the float32 originals that small updates need, when a model computes in bfloat16: DeepSpeed
in its optimizer, sharded over the processes, around a bfloat16 model; without DeepSpeed the model's
trained weights themselves are float32 and every operation casts (`training.tunable` loads them so).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.errors import ConfigError, ModelError
from finetune.methods.base_record import BaseRecord

MAX_SHARD_SIZE = "5GB"
INDEX_NAME = "model.safetensors.index.json"
# What a folder needs besides weights and config to open on its own.
CARRIED_OVER = (
    "tokenizer*",
    "chat_template*",
    "generation_config.json",
    "*.py",
    "vocab*",
    "merges*",
)


def attach(model: PreTrainedModel, *, frozen: Collection[str] = ()) -> PreTrainedModel:
    """The model with every weight trainable but the `frozen` ones.

    Raises:
        ConfigError: Nothing is left to train.
    """
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ConfigError("model.freeze: every weight is frozen and nothing is left to train")
    return model


def matched_modules(model: nn.Module) -> dict[str, int]:
    """How many tensors are trained and how many are frozen."""
    trained = [weight.requires_grad for weight in model.parameters()]
    if all(trained):
        return {"every weight": len(trained)}
    return {"weights": sum(trained), "frozen weights": len(trained) - sum(trained)}


def save(
    model: PreTrainedModel,
    folder: Path,
    *,
    base: BaseRecord,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model as safetensors in the base's names, with the base's tokenizer files."""
    model.save_pretrained(folder, state_dict=state_dict, max_shard_size=MAX_SHARD_SIZE)
    source = Path(base.path)
    for pattern in CARRIED_OVER if source.is_dir() else ():
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    base.write(folder, method="full")


def restore(model: PreTrainedModel, folder: Path) -> None:
    """Put saved weights back, shard by shard.

    Raises:
        ModelError: The folder lacks weights of the model.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    missing = set(model.state_dict()) - set(getattr(model, "all_tied_weights_keys", ()))
    for file in files:
        shard = load_file(folder / file)
        model.load_state_dict(shard, strict=False)
        missing -= set(shard)
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(sorted(missing)[:3])}; it cannot be resumed")
