"""The record of a run that its checkpoints carry and a resume must match."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from finetune import __version__
from finetune.config.schema import RunConfig
from finetune.data.chat.template import ChatTemplate
from finetune.distributed.processes import rank_and_world
from finetune.training import resume
from finetune.training.prepare_model import Tunable
from finetune.training.run_data import RunData


def run_record(
    config: RunConfig,
    template: ChatTemplate,
    data: RunData,
    tunable: Tunable,
) -> dict[str, Any]:
    """See `training.resume`."""
    training, (_, world) = config.training, rank_and_world()
    here = training.batch_size * training.gradient_accumulation_steps
    facts = {
        "model": tunable.base.fingerprint,
        "template": template.fingerprint,
        "data": data.train.fingerprint,
        "global_batch": here * world,
        "dtype": str(tunable.dtype).removeprefix("torch."),
        "deepspeed": _sharding(tunable.deepspeed),
        "trainable": trainable_shapes(tunable.model),
    }
    if tunable.deepspeed is not None:
        facts["processes"] = world
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    if tunable.deepspeed is not None:
        versions["deepspeed"] = version("deepspeed")
    return resume.record(config.model_dump(), facts, versions | {"finetune": __version__})


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


def trainable_shapes(model: torch.nn.Module) -> str:
    """A short text that changes with the name or shape of any trained weight."""
    shapes = {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
    return f"{len(shapes)} tensors, {digest[:12]}"
