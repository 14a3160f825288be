"""The `training` section -> transformers.TrainingArguments and the learning rate of every weight."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from finetune.config.extras import OPTIMIZERS
from finetune.config.schema import Method, TrainingSection
from finetune.distributed.device import has_accelerator, pins_memory, prepare_determinism
from finetune.distributed.processes import is_rank0, rank_and_world
from finetune.errors import ConfigError
from finetune.methods import METHODS

DATA_PARALLEL = (
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
)


@dataclass(frozen=True, slots=True)
class Precision:
    """Who computes in which format."""

    autocast: str
    """`fp16`, `bf16` or `no`: what transformers is told to compute in although weights are float32."""
    deepspeed: str
    """`fp16`, `bf16` or `fp32`: in what DeepSpeed keeps the weights it trains."""
    weights: torch.dtype
    """In what the model is loaded."""


def mixed_precision(method: Method, dtype: torch.dtype, *, sharded: bool) -> Precision:
    """How float32 weights are trained although the model computes in `dtype`.

    Adapters are float32 modules in a model of `dtype` and cast for themselves, so the same model
    computes the same numbers in training and in `finetune evaluate`. When all weights are trained,
    they are loaded in float32 and cast around every operation; with DeepSpeed they are loaded in
    `dtype`, and its optimizer makes and holds the float32 originals. float16 always needs the loss
    scaling that comes with that.
    """
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    is_full = METHODS[method.kind].trains_the_model
    if name == "fp32" or (name == "bf16" and not is_full):
        return Precision("no", "fp32", dtype)
    if sharded:
        return Precision(name, name, dtype)
    return Precision(name, "fp32", torch.float32 if is_full else dtype)


def training_arguments(
    section: TrainingSection,
    *,
    deepspeed: Mapping[str, Any] | None,
    loader_workers: int,
    precision: Precision,
) -> TrainingArguments:
    """The arguments of the Trainer, checked: the world is as large as the launcher said.

    Raises:
        ConfigError: A tracker is not installed. What `training.extra` may hold was checked with the config.
    """
    if section.deterministic:
        prepare_determinism()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(section.output_dir) / "logs")
    arguments = TrainingArguments(
        **{
            "output_dir": section.output_dir,
            "max_steps": section.max_steps or -1,
            "num_train_epochs": section.epochs,
            "per_device_train_batch_size": section.batch_size,
            "gradient_accumulation_steps": section.gradient_accumulation_steps,
            "learning_rate": section.learning_rate,
            "lr_scheduler_type": section.lr_schedule,
            "warmup_steps": section.warmup_steps,
            "weight_decay": section.weight_decay,
            "max_grad_norm": section.max_grad_norm,
            "activation_checkpointing": section.activation_checkpointing,
            "activation_checkpointing_kwargs": {
                "use_reentrant": False,
                # On a CPU they lie on the host as they are, and transformers would pin memory that cannot be.
                "offload": section.offload_activations and pins_memory(),
            },
            "seed": section.seed,
            "optim": OPTIMIZERS[section.optimizer],
            # Our callbacks decide when to evaluate and save.
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_strategy": "steps",
            "logging_steps": section.log_every_steps,
            "logging_nan_inf_filter": False,
            "report_to": list(section.report_to) if is_rank0() else [],
            "disable_tqdm": True,
            "log_level": "error",
            "log_level_replica": "error",
            "remove_unused_columns": False,
            "average_tokens_across_devices": True,
            "include_num_input_tokens_seen": "no",
            "dataloader_num_workers": loader_workers,
            "ddp_find_unused_parameters": False,
            "ddp_timeout": int(section.process_timeout_minutes * 60),
            # Without it each process would train alone, all into the same folder.
            "use_cpu": not has_accelerator(),
            "deepspeed": dict(deepspeed) if deepspeed else None,
            "bf16": precision.autocast == "bf16",
            "fp16": precision.autocast == "fp16",
        }
        | section.extra
    )
    if arguments.world_size != (world := rank_and_world()[1]):
        raise ConfigError(
            f"the launcher started {world} processes but the trainer sees "
            f"{arguments.world_size}; start the run with torchrun --nproc_per_node=N"
        )
    return arguments


def check_trackers(report_to: Sequence[str]) -> None:
    """Raises ConfigError for every experiment tracker that is not installed."""
    missing = [name for name in report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"training.report_to: {', '.join(missing)} not installed; "
            f"pip install {' '.join(missing)}"
        )


@dataclass(frozen=True)
class Rates:
    """Peak learning rates by the names of the weights."""

    base: float
    by_name: Mapping[str, float] = field(default_factory=dict)
    """`training.learning_rates`: regexes searched in a name; the first that is found decides."""
    scale: Callable[[str], float] | None = None
    """How much faster than the others a weight learns, by its name: `methods.rate_scale`."""

    @property
    def is_one(self) -> bool:
        """Whether all weights learn at the same rate."""
        return not self.by_name and self.scale is None

    def of(self, name: str) -> float:
        """The rate of a weight."""
        rates = (rate for pattern, rate in self.by_name.items() if re.search(pattern, name))
        rate = next(rates, self.base)
        return rate * self.scale(name) if self.scale else rate

    def check(self, trained: Iterable[str]) -> None:
        """Raises ConfigError for patterns that are no regex or are in no trained weight's name."""
        names = list(trained)
        problems = []
        for pattern in self.by_name:
            try:
                if not any(re.search(pattern, name) for name in names):
                    problems.append(
                        f"{pattern!r} is in the name of no weight that is trained; correct it"
                    )
            except re.error as error:
                problems.append(f"{pattern!r} is not a regex: {error}; correct it")
        if problems:
            raise ConfigError("\n".join(f"training.learning_rates: {p}" for p in problems))


def check_distribution(accelerator: Any, args: TrainingArguments) -> None:
    """Refuse to train apart: several processes without gradients in common would go unnoticed."""
    kind, (_, world) = accelerator.distributed_type, rank_and_world()
    expected = (
        kind == DistributedType.DEEPSPEED
        if args.deepspeed
        else kind != DistributedType.DEEPSPEED and (world == 1 or kind in DATA_PARALLEL)
    )
    if not expected or accelerator.num_processes != world:
        asked = "DeepSpeed" if args.deepspeed else "plain data parallel"
        raise ConfigError(
            f"{world} processes with {asked} were asked for, but accelerate has set up "
            f"{accelerator.num_processes} with {kind}; unset ACCELERATE_* environment variables and "
            "start with torchrun"
        )
