"""`training.extra`: which fields of transformers.TrainingArguments a user may set and to what, and which are ours.

Names, kinds and optimizers are read from the library's source file; importing it would take seconds.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune.config.yaml_text import shown
from finetune.errors import ConfigError

OWNED: dict[str, str] = {
    "output_dir": "training.output_dir",
    "max_steps": "training.max_steps",
    "num_train_epochs": "training.num_epochs",
    "per_device_train_batch_size": "training.batch_size",
    "auto_find_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "learning_rate": "training.learning_rate",
    "lr_scheduler_type": "training.lr_schedule",
    "warmup_steps": "training.warmup_steps",
    "warmup_ratio": "training.warmup_steps",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "activation_checkpointing": "training.activation_checkpointing",
    "activation_checkpointing_kwargs": "training.activation_checkpointing",
    "gradient_checkpointing": "training.activation_checkpointing",
    "gradient_checkpointing_kwargs": "training.activation_checkpointing",
    "seed": "training.seed",
    "data_seed": "training.seed",
    "logging_steps": "training.log_every_steps",
    "logging_strategy": "training.log_every_steps",
    "save_steps": "training.save_every_steps",
    "save_strategy": "training.save_every_steps",
    "save_total_limit": "training.keep_checkpoints",
    "resume_from_checkpoint": "training.resume",
    "report_to": "training.report_to",
    "ddp_timeout": "training.process_timeout_minutes",
    "deepspeed": "the section deepspeed",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "bf16_full_eval": "model.dtype",
    "fp16_full_eval": "model.dtype",
    "dataloader_num_workers": "data.loader_workers",
    "group_by_length": "data.group_by_length",
    "train_sampling_strategy": "data.group_by_length",
    "length_column_name": "data.group_by_length",
    "eval_strategy": "evaluation.every_steps",
    "eval_steps": "evaluation.every_steps",
    "eval_on_start": "evaluation.at_start",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "metric_for_best_model": "evaluation.best_metric",
    "greater_is_better": "evaluation.best_metric",
    "load_best_model_at_end": "evaluation.best_metric",
}
"""Fields that an option of ours sets, and the option."""

ALSO_KNOWN_AS: dict[str, str] = {
    "lr": "training.learning_rate",
    "epochs": "training.num_epochs",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "lora": "method (kind: lora)",
    "lora_config": "method (kind: lora)",
    "peft_config": "method (kind: lora)",
    "training_args": "training",
}
"""Names that no program's table in `migrate_tables` has, and the option."""

REFUSED: dict[str, str] = {
    "do_train": "the command decides that",
    "do_eval": "the command decides that",
    "do_predict": "the command decides that",
    "use_cpu": "it is derived from the machine",
    "local_rank": "the launcher sets it",
    "label_smoothing_factor": "the loss over supervised tokens has no smoothing",
    "use_liger_kernel": "the loss over supervised tokens is computed by this program",
    "average_tokens_across_devices": "the loss is always the mean over the global batch",
    "remove_unused_columns": "batches are made by this program",
    "label_names": "batches are made by this program",
    "prediction_loss_only": "evaluation is made by this program",
    "eval_delay": "evaluation is made by this program",
    "eval_do_concat_batches": "evaluation is made by this program",
    "eval_use_gather_object": "evaluation is made by this program",
    "eval_accumulation_steps": "evaluation is made by this program",
    "include_for_metrics": "evaluation is made by this program",
    "batch_eval_metrics": "evaluation is made by this program",
    "save_only_model": "training.save: weights is its name here",
    "save_on_each_node": "checkpoints are written by one process",
    "enable_jit_checkpoint": "a signal always saves a checkpoint",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "dataloader_drop_last": "every example of an epoch is seen",
    "ddp_find_unused_parameters": "every trained weight takes part in every step",
    "ignore_data_skip": "a resumed run would see other data than an uninterrupted one",
    "restore_callback_states_from_checkpoint": "checkpoints are restored by this program",
    "fsdp": "sharding is the section deepspeed",
    "fsdp_config": "sharding is the section deepspeed",
    "parallelism_config": "sharding is the section deepspeed",
    "disable_tqdm": "progress is shown by this program",
    "push_to_hub": "a token must not land in saved files; upload the finished folder yourself",
}
"""Fields that would break a promise of this program, and the promise."""


OPTIMIZERS: dict[str, str] = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "muon": "adamw_torch_fused",
}
"""`training.optimizer` -> what transformers calls it; of muon the part that is no Muon."""

NAMED_OPTIMIZERS: dict[str, str] = {
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "muon": "muon",
}
"""Names in `training.extra.optim` that `training.optimizer` says."""

BY_LIBRARY: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("adamw_8bit", "ademamix", "lion", "paged_", "rmsprop_"),
    "galore_torch": ("galore_",),
    "apollo_torch": ("apollo_",),
    "lomo_optim": ("lomo", "adalomo"),
    "schedulefree": ("schedule_free_",),
    "grokadamw": ("grokadamw",),
    "optimi": ("stable_adamw",),
    "torchao": ("adamw_torch_4bit", "adamw_torch_8bit"),
    "torchdistx": ("adamw_anyprecision",),
    "torch_xla": ("adamw_torch_xla",),
    "torch_npu": ("adamw_torch_npu_fused",),
}
"""Modules -> what the names of the optimizers that they bring begin with."""

RANGES: dict[str, tuple[float, float | None]] = {
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (1e-15, None),
}
"""What torch's AdamW takes: from, and below. With an epsilon of 0 a weight without a gradient becomes NaN."""

_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "bool": ("true or false", (bool,)),
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "str": ("text", (str,)),
    "dict": ("a mapping", (dict,)),
    "list": ("a list", (list,)),
    "None": ("null", (type(None),)),
}


@cache
def _declared() -> dict[str, ast.ClassDef]:
    """The classes of transformers' training_args.py as installed, by name; imports nothing."""
    spec = find_spec("transformers")
    if spec is None or not spec.origin:
        raise ModuleNotFoundError("transformers is not installed; `pip install transformers`")
    source = Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8")
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


@cache
def _fields() -> dict[str, tuple[str, ...]]:
    """The fields of transformers.TrainingArguments -> the kinds of value, as `float` and `None`."""
    if "TrainingArguments" not in _declared():
        raise ModuleNotFoundError("this version of transformers has no TrainingArguments")
    return {
        line.target.id: tuple(
            kind.partition("[")[0] for kind in ast.unparse(line.annotation).split(" | ")
        )
        for line in _declared()["TrainingArguments"].body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def training_argument_names() -> tuple[str, ...]:
    """The fields of transformers.TrainingArguments as installed, in their order; imports nothing."""
    return tuple(_fields())


def optimizer_names() -> tuple[str, ...]:
    """What `optim` may be."""
    return tuple(
        line.value.value
        for line in _declared()["OptimizerNames"].body
        if isinstance(line, ast.Assign)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )


def extra_problems(extra: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with `training.extra`, by name; empty when all of it can be passed on."""
    return {
        name: said
        for name, value in extra.items()
        if (said := _wrong_name(name) or _wrong_value(name, value))
    }


def _wrong_name(name: str) -> str | None:
    if name in OWNED:
        return f"is set by {OWNED[name]}; use that"
    if name in REFUSED:
        return f"cannot be set: {REFUSED[name]}"
    if name.startswith("hub_"):
        return f"cannot be set: {REFUSED['push_to_hub']}"
    names = training_argument_names()
    if name in names:
        return None
    free = [known for known in names if known not in OWNED and known not in REFUSED]
    meant = get_close_matches(name, free, n=1)
    said = "is not a field of transformers.TrainingArguments"
    return f"{said}; did you mean {meant[0]}?" if meant else said


def _wrong_value(name: str, value: Any) -> str | None:
    known = [_KINDS[kind] for kind in _fields()[name] if kind in _KINDS]
    fits = any(
        isinstance(value, types) and (bool in types or not isinstance(value, bool))
        for _, types in known
    )
    if known and not fits:
        return f"must be {' or '.join(words for words, _ in known)}, got {shown(value)}"
    low, high = RANGES.get(name, (None, None))
    if low is not None and not (low <= value and (high is None or value < high)):
        return (
            f"must be {low:g} or more{f' and below {high:g}' if high else ''}, got {shown(value)}"
        )
    return _wrong_optimizer(value) if name == "optim" else None


def check_optimizer(name: str) -> None:
    """Raises ConfigError where `training.optimizer` needs what is not installed."""
    if ("8bit" in name or "paged" in name) and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"training.optimizer: {name} needs bitsandbytes, which is not installed; "
            "pip install 'glm4-finetune[qlora]', or leave training.optimizer out"
        )


def _wrong_optimizer(name: str) -> str | None:
    if name in NAMED_OPTIMIZERS:
        return f"is set by training.optimizer: {NAMED_OPTIMIZERS[name]}; use that"
    names = optimizer_names()
    if name not in names:
        meant = get_close_matches(name, names, n=1)
        hint = f", did you mean {meant[0]}?" if meant else ""
        return f"is no optimizer of this version of transformers: {name!r}{hint}; there are {', '.join(names)}"
    for module, marks in BY_LIBRARY.items():
        if name.startswith(marks) and find_spec(module) is None:
            return f"{name} needs a library that is not installed: {module}"
    return None
