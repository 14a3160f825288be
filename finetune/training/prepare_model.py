"""The model section and the method section -> a model that is ready to train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from finetune import methods
from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.plain_files import read_json
from finetune.artifacts.resolve import local_folder
from finetune.artifacts.weights import model_fingerprint
from finetune.config.schema import PTuningV2Method, RunConfig
from finetune.distributed.processes import local_device, rank_and_world
from finetune.methods import BaseRecord
from finetune.models.load import load_model
from finetune.training import zero
from finetune.training.arguments import (
    check_trackers,
    computation_dtype,
    mixed_precision,
    training_arguments,
)
from finetune.training.run_data import RunData


@dataclass(frozen=True)
class Tunable:
    """A model with a method attached, and what was settled on the way to it."""

    model: PreTrainedModel
    base: BaseRecord
    arguments: TrainingArguments
    deepspeed: dict[str, Any] | None
    dtype: torch.dtype
    """Number format of the frozen weights and of the computation."""


def load_tunable(config: RunConfig, data: RunData) -> Tunable:
    """The model of a run; a prefix starts from the first tokens of its data.

    Order matters: DeepSpeed wants to be told about the machine before TrainingArguments exist, and
    these must exist before a model is loaded, which ZeRO-3 shards meanwhile.
    """
    check_trackers(config.training.report_to)
    device, (_, world) = local_device(), rank_and_world()
    has_gpu = device.type == "cuda"
    folder = local_folder(config.model.path, config.model.revision)
    dtype = computation_dtype(config.model.dtype, device)
    precision = mixed_precision(config.method, dtype, sharded=config.deepspeed is not None)
    deepspeed = None
    if config.deepspeed is not None:
        zero.prepare_libraries(has_gpu=has_gpu)
        setting = zero.Setting(
            training=config.training,
            num_processes=world,
            hidden_size=_hidden_size(folder),
            precision=precision.deepspeed,
        )
        deepspeed = zero.deepspeed_config(config.deepspeed, setting)
    arguments = training_arguments(
        config.training,
        deepspeed=deepspeed,
        loader_workers=config.data.loader_workers,
        precision=precision,
    )
    if deepspeed is not None:
        zero.join(has_gpu=has_gpu)
    base = BaseRecord(_lasting(config.model.path), config.model.revision, model_fingerprint(folder))
    weights = str(precision.weights).removeprefix("torch.")
    with zero.loading(arguments, weights):
        model = load_model(
            folder,
            dtype=weights,
            attention=config.model.attention,
            quantization=config.model.quantization,
            kernels=config.model.kernels,
        )
    if has_gpu and isinstance(config.method, PTuningV2Method) and not _is_apart(model):
        model.to(local_device())  # a prefix starts from a forward pass: minutes on a CPU
    # Adapters start from the same numbers in every process and in every run of a seed.
    torch.manual_seed(config.training.seed)
    model = methods.attach(
        model,
        config.method,
        freeze=config.model.freeze,
        start_ids=data.first_tokens(config.method.num_start_tokens),
    )
    for weight in model.parameters():
        if precision.weights != dtype and not weight.requires_grad:
            weight.data = weight.data.to(dtype)  # one at a time: only what learns is float32
    return Tunable(model, base, arguments, deepspeed, dtype)


def _is_apart(model: PreTrainedModel) -> bool:
    """Whether ZeRO-3 has dealt the weights out."""
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


def _hidden_size(folder: Path) -> int:
    config = read_json(folder / MODEL_CONFIG)
    return int((config.get("text_config") or config)["hidden_size"])


def _lasting(path: str) -> str:
    """A folder's full path, so that an adapter finds its base from anywhere; hub ids as they are."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
