"""The record of a run that its checkpoints carry and a resume must match."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

import torch

from finetune import __version__
from finetune.config import RunConfig
from finetune.data.template import ChatTemplate
from finetune.training import resume
from finetune.training.processes import Processes
from finetune.training.run_data import RunData
from finetune.training.tunable import Tunable


def run_record(
    config: RunConfig,
    template: ChatTemplate,
    data: RunData,
    tunable: Tunable,
    processes: Processes,
) -> dict[str, Any]:
    """See `training.resume`."""
    facts = {
        "model": tunable.base.fingerprint,
        "template": template.fingerprint,
        "data": data.train.fingerprint,
        "processes": processes.world,
        "dtype": str(tunable.dtype).removeprefix("torch."),
        "deepspeed": json.dumps(tunable.deepspeed, sort_keys=True),
        "trainable": trainable_shapes(tunable.model),
    }
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    if tunable.deepspeed is not None:
        versions["deepspeed"] = version("deepspeed")
    return resume.record(config.model_dump(), facts, versions | {"finetune": __version__})


def trainable_shapes(model: torch.nn.Module) -> str:
    """A short text that changes with the name or shape of any trained weight."""
    shapes = {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
    return f"{len(shapes)} tensors, {digest[:12]}"
