"""ZeRO stage and offload -> a DeepSpeed config, and what DeepSpeed needs around it.

Batch size, accumulation and clipping always come from the `training` section; a JSON file of the
user's may repeat them or say "auto", but not contradict them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import DeepSpeedSection, TrainingSection
from finetune.distributed import device
from finetune.errors import ConfigError
from finetune.planning.sharding import LIVE_WEIGHTS, SUB_GROUP
from finetune.storage.given import read_given_json

# Objects of a JSON file that are looked into.
SECTIONS = {
    "bf16": '{"enabled": "auto"}',
    "fp16": '{"enabled": "auto"}',
    "amp": '{"enabled": false}',
    "optimizer": '{"type": "AdamW", "params": {"lr": "auto"}}',
    "zero_optimization": '{"stage": 2}',
}

# Elements per communication bucket: 50 MB in bf16 for small models, hidden squared (as the
# transformers integration has it) for large ones: 16.8 M at hidden 4096.
MIN_BUCKET = 1_000_000


@dataclass(frozen=True, slots=True)
class Setting:
    """What decides a DeepSpeed config besides its section."""

    training: TrainingSection
    num_processes: int
    hidden_size: int
    precision: str
    """`fp32`, `bf16` or `fp16`: in which format DeepSpeed keeps the weights that it trains."""


def deepspeed_config(section: DeepSpeedSection, setting: Setting) -> dict[str, Any]:
    """The DeepSpeed config of a run, with a number in every place.

    Raises:
        ConfigError: `deepspeed.config` cannot be read, or contradicts the YAML file.
    """
    if section.config is None:
        return _required(setting) | {"zero_optimization": _zero(section, setting.hidden_size)}
    given = _read(Path(section.config))
    problems = [*_contradictions(given, section, setting), *_owned_by_us(given, setting.training)]
    if problems:
        raise ConfigError(
            "\n".join(f"deepspeed.config ({section.config}): {problem}" for problem in problems)
        )
    stage = given.get("zero_optimization", {}).get("stage", 0)
    zero = DeepSpeedSection(zero_stage=section.zero_stage if stage == "auto" else stage)
    sizes = _zero(zero, setting.hidden_size)
    merged = {**given, **_required(setting)}
    for name in ("optimizer", "scheduler"):
        merged.pop(name, None)
    merged["zero_optimization"] = {
        key: sizes.get(key, value) if value == "auto" else value
        for key, value in given.get("zero_optimization", {}).items()
    }
    return merged


def prepare_libraries(section: DeepSpeedSection) -> None:
    """Tell DeepSpeed about a machine without a GPU; call it before TrainingArguments are built."""
    if device.has_accelerator():
        if section.offload_optimizer == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            # torchrun gives a process one thread; the optimizer on the CPU can use its share of them.
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    # Otherwise it is compiled for minutes, and fails without ninja and g++. gloo does its work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def loading(arguments: Any, dtype: str) -> Iterator[None]:
    """While a model is loaded under ZeRO-3, shards are made in `dtype` (a torch dtype's name).

    By itself DeepSpeed makes them in the format that it trains in, which is float32 with adapters:
    twice the memory for a frozen base that is bfloat16.
    """
    holder = getattr(arguments, "hf_deepspeed_config", None)
    if holder is None:
        yield
        return
    kept = {key: holder.config.get(key) for key in ("bf16", "fp16")}
    holder.config |= {
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }
    try:
        yield
    finally:
        holder.config |= kept


def join() -> None:
    """Let DeepSpeed use the process group; after TrainingArguments, before a model is loaded.

    ZeRO-3 shards a model while it is loaded and needs the group then.
    """
    import deepspeed

    deepspeed.init_distributed(
        dist_backend=device.device_backend(), auto_mpi_discovery=False, verbose=False
    )


def _required(setting: Setting) -> dict[str, Any]:
    training = setting.training
    micro, accumulation = training.batch_size, training.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * setting.num_processes,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": setting.precision == "bf16"},
        "fp16": {"enabled": setting.precision == "fp16"},
        # AdamW is torch's own in every stage: the same numbers, and no kernel to compile.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _zero(section: DeepSpeedSection, hidden_size: int) -> dict[str, Any]:
    stage = section.zero_stage
    bucket = max(hidden_size * hidden_size, MIN_BUCKET)
    if stage == 0:
        return {"stage": 0}
    config: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": stage > 1,
        "contiguous_gradients": True,
        # What an optimizer step holds in float32 beside the states, 0.4 GB instead of 4.
        "sub_group_size": SUB_GROUP,
    }
    if section.offload_optimizer != "none":
        config["offload_optimizer"] = {"device": section.offload_optimizer, "pin_memory": True}
    if stage == 3:
        config |= {
            # Three layers of a 9B model, or its head; DeepSpeed's 1e9 hold 0.8 GB more and win nothing.
            "stage3_max_live_parameters": LIVE_WEIGHTS,
            "stage3_max_reuse_distance": LIVE_WEIGHTS,
            "stage3_prefetch_bucket_size": int(0.9 * bucket),
            "stage3_param_persistence_threshold": 10 * hidden_size,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        if section.offload_parameters != "none":
            config["offload_param"] = {"device": section.offload_parameters, "pin_memory": True}
    return config


def _read(path: Path) -> dict[str, Any]:
    given = read_given_json(path, f"deepspeed.config: {path}")
    if not isinstance(given, dict):
        raise ConfigError(f"deepspeed.config: {path} holds no JSON object; write one")
    flat = [name for name in SECTIONS if not isinstance(given.get(name, {}), dict)]
    if flat:
        raise ConfigError(
            "\n".join(
                f"deepspeed.config ({path}): {name} is {given[name]!r} and not an object like "
                f"{SECTIONS[name]}; write it so"
                for name in flat
            )
        )
    return given


def _contradictions(
    given: Mapping[str, Any], section: DeepSpeedSection, setting: Setting
) -> list[str]:
    said_by = {
        "train_micro_batch_size_per_gpu": "training.batch_size",
        "gradient_accumulation_steps": "training.gradient_accumulation_steps",
        "train_batch_size": "batch_size x gradient_accumulation_steps x processes",
        "gradient_clipping": "training.max_grad_norm",
    }
    required = _required(setting)
    problems = [
        f'{key} is {given[key]}, but {source} is {required[key]}; remove it or write "auto"'
        for key, source in said_by.items()
        if given.get(key, "auto") not in ("auto", required[key])
    ]
    for name in ("bf16", "fp16"):
        enabled = given.get(name, {}).get("enabled", "auto")
        if enabled not in ("auto", required[name]["enabled"]):
            problems.append(
                f"{name}.enabled is {enabled}, but model.dtype and the method ask for "
                f'{setting.precision}; remove it or write "auto"'
            )
    if given.get("amp", {}).get("enabled", False) is not False:
        problems.append("amp.enabled: remove it; model.dtype decides")
    zero = given.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if "zero_stage" in section.model_fields_set and stage not in ("auto", section.zero_stage):
        problems.append(
            f"zero_optimization.stage is {stage}, but deepspeed.zero_stage is {section.zero_stage}; "
            "remove one of the two"
        )
    for field, key in (
        ("offload_optimizer", "offload_optimizer"),
        ("offload_parameters", "offload_param"),
    ):
        device = zero.get(key, {}).get("device", "none")
        if field in section.model_fields_set and device != getattr(section, field):
            problems.append(
                f"zero_optimization.{key}.device is {device}, but deepspeed.{field} is "
                f"{getattr(section, field)}; remove one of the two"
            )
    return problems


def _owned_by_us(given: Mapping[str, Any], training: TrainingSection) -> list[str]:
    """An optimizer that says what `training` says is accepted, another one and a schedule are not."""
    problems = []
    optimizer = given.get("optimizer")
    if optimizer is not None:
        kind, params = optimizer.get("type", "AdamW"), optimizer.get("params", {})
        ours = {
            "lr": training.learning_rate,
            "weight_decay": training.weight_decay,
            "betas": [
                training.extra.get("adam_beta1", 0.9),
                training.extra.get("adam_beta2", 0.999),
            ],
            "eps": training.extra.get("adam_epsilon", 1e-8),
        }
        if kind not in ("AdamW", "Adam"):
            problems.append(f"optimizer.type is {kind}, but training uses AdamW; remove it")
        problems += [
            f"optimizer.params.{key} is {value}, but the training section says {ours.get(key)}; "
            "remove it"
            for key, value in params.items()
            if value != "auto" and value != ours.get(key)
        ]
    if given.get("scheduler") is not None:
        problems.append("scheduler: remove it; training.lr_schedule and warmup_steps decide")
    return problems
