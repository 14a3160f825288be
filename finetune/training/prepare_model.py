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
from finetune.config.schema import (
    DeepSpeedSection,
    Method,
    ModelSection,
    PTuningV2Method,
    TrainingSection,
)
from finetune.distributed.device import has_accelerator, local_device, refuse_unused
from finetune.distributed.processes import rank_and_world
from finetune.methods import BaseRecord
from finetune.models.families import family_of
from finetune.models.load import load_model, num_heads
from finetune.models.number_format import number_format
from finetune.models.sequence_parallel import Split, check_heads, split_of_this_process
from finetune.training.arguments import (
    Rates,
    check_trackers,
    mixed_precision,
    training_arguments,
)
from finetune.training.deepspeed import zero
from finetune.training.run_data import RunData


@dataclass(frozen=True)
class PreparedModel:
    """A model with a method attached, and what was settled on the way to it."""

    model: PreTrainedModel
    base: BaseRecord
    arguments: TrainingArguments
    deepspeed: dict[str, Any] | None
    dtype: torch.dtype
    """Of the frozen weights and of the computation."""
    rates: Rates
    section: ModelSection
    method: Method
    split: Split | None
    """Which part of every row this process has, if rows are shared out."""

    @property
    def casts(self) -> bool:
        """Whether the Trainer's autocast surrounds every forward pass."""
        return self.deepspeed is None and bool(self.arguments.bf16 or self.arguments.fp16)


def prepare_model(
    section: ModelSection,
    method: Method,
    training: TrainingSection,
    deepspeed_section: DeepSpeedSection | None,
    data: RunData,
    *,
    loader_workers: int,
) -> PreparedModel:
    """The model of a run; a prefix starts from the first tokens of its data.

    Order matters: DeepSpeed wants to be told about the machine before TrainingArguments exist, and
    these must exist before a model is loaded, which ZeRO-3 shards meanwhile.
    """
    refuse_unused()
    check_trackers(training.report_to)
    world = rank_and_world()[1]
    folder = local_folder(section.path, section.revision)
    config = read_json(folder / MODEL_CONFIG)
    dtype = number_format(section.dtype, sees_images=family_of(config).sees_images(config))
    precision = mixed_precision(method, dtype, sharded=deepspeed_section is not None)
    deepspeed = None
    if deepspeed_section is not None:
        zero.prepare_libraries(deepspeed_section)
        setting = zero.Setting(
            training=training,
            num_processes=world,
            hidden_size=_hidden_size(config),
            precision=precision.deepspeed,
        )
        deepspeed = zero.deepspeed_config(deepspeed_section, setting)
    arguments = training_arguments(
        training,
        deepspeed=deepspeed,
        loader_workers=loader_workers,
        precision=precision,
    )
    if deepspeed is not None:
        zero.join()
    split = _split(training.sequence_parallel, folder)
    base = BaseRecord(_lasting(section.path), section.revision, model_fingerprint(folder))
    weights = str(precision.weights).removeprefix("torch.")
    with zero.loading(arguments, weights):
        model = load_model(
            folder,
            dtype=weights,
            attention=section.attention,
            quantization=section.quantization,
            kernels=section.kernels,
        )
    if has_accelerator() and isinstance(method, PTuningV2Method) and not is_apart(model):
        model.to(local_device())  # a prefix starts from a forward pass: minutes on a CPU
    # Adapters start from the same numbers in every process and in every run of a seed.
    torch.manual_seed(training.seed)
    model = methods.attach(
        model,
        method,
        freeze=section.freeze,
        start_ids=data.first_tokens(method.num_start_tokens),
    )
    for weight in model.parameters():
        if precision.weights != dtype and not weight.requires_grad:
            weight.data = weight.data.to(dtype)  # one at a time: only what learns is float32
    scale = methods.rate_scale(method)
    family = family_of(config)
    by_name = {family.part(name): rate for name, rate in training.learning_rates.items()}
    rates = Rates(training.learning_rate, by_name, scale)
    return PreparedModel(model, base, arguments, deepspeed, dtype, rates, section, method, split)


def _split(parts: int, folder: Path) -> Split | None:
    if parts > 1:
        check_heads(parts, *num_heads(folder))
    return split_of_this_process(parts)


def is_apart(model: PreTrainedModel) -> bool:
    """Whether ZeRO-3 has dealt the weights out."""
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


def _hidden_size(config: dict[str, Any]) -> int:
    return int((config.get("text_config") or config)["hidden_size"])


def _lasting(path: str) -> str:
    """A folder's full path, so that an adapter finds its base from anywhere; hub ids as they are."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
