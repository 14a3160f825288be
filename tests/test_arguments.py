"""The `training` section as the Trainer gets it: formats, every option, rates, what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from finetune.config.schema import FullMethod, LoraMethod, PTuningV2Method, TrainingSection
from finetune.errors import ConfigError
from finetune.training import arguments
from finetune.training.arguments import Precision, Rates, mixed_precision, training_arguments

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PLAIN = Precision("no", "fp32", FP32)


@pytest.mark.parametrize(
    ("method", "dtype", "sharded", "expected"),
    [
        (LoraMethod(), FP32, False, PLAIN),
        (LoraMethod(), FP32, True, PLAIN),
        (LoraMethod(), BF16, False, Precision("no", "fp32", BF16)),  # adapters cast for themselves
        (LoraMethod(), BF16, True, Precision("no", "fp32", BF16)),
        (LoraMethod(), FP16, False, Precision("fp16", "fp32", FP16)),  # float16 wants loss scaling
        (LoraMethod(), FP16, True, Precision("fp16", "fp16", FP16)),
        (PTuningV2Method(), BF16, False, Precision("no", "fp32", BF16)),
        (PTuningV2Method(), FP16, False, Precision("fp16", "fp32", FP16)),
        (FullMethod(), FP32, False, PLAIN),
        (FullMethod(), FP32, True, PLAIN),
        (FullMethod(), BF16, False, Precision("bf16", "fp32", FP32)),  # float32 originals
        (FullMethod(), BF16, True, Precision("bf16", "bf16", BF16)),  # DeepSpeed holds them
        (FullMethod(), FP16, False, Precision("fp16", "fp32", FP32)),
        (FullMethod(), FP16, True, Precision("fp16", "fp16", FP16)),
    ],
)
def test_who_computes_in_which_format_follows_from_method_format_and_sharding(
    method: Any, dtype: torch.dtype, sharded: bool, expected: Precision
) -> None:
    assert mixed_precision(method, dtype, sharded=sharded) == expected


def made(precision: Precision = PLAIN, **options: Any) -> Any:
    section = TrainingSection(**{"output_dir": "x", "report_to": []} | options)
    return training_arguments(section, deepspeed=None, loader_workers=3, precision=precision)


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        ({"max_steps": 7}, "max_steps", 7),
        ({}, "max_steps", -1),
        ({"num_epochs": 1.5}, "num_train_epochs", 1.5),
        ({}, "num_train_epochs", 3.0),
        ({"batch_size": 5}, "per_device_train_batch_size", 5),
        ({"gradient_accumulation_steps": 6}, "gradient_accumulation_steps", 6),
        ({"learning_rate": 0.25}, "learning_rate", 0.25),
        ({"lr_schedule": "cosine"}, "lr_scheduler_type", "cosine"),
        ({"warmup_steps": 0.1}, "warmup_steps", 0.1),
        ({"weight_decay": 0.5}, "weight_decay", 0.5),
        ({"max_grad_norm": 0.0}, "max_grad_norm", 0.0),
        ({"activation_checkpointing": True}, "activation_checkpointing", True),
        ({"seed": 9}, "seed", 9),
        ({"log_every_steps": 4}, "logging_steps", 4),
        ({"process_timeout_minutes": 2.5}, "ddp_timeout", 150),
        ({}, "dataloader_num_workers", 3),
        ({"extra": {"adam_beta2": 0.9}}, "adam_beta2", 0.9),
        ({"extra": {"neftune_noise_alpha": 5.0}}, "neftune_noise_alpha", 5.0),
        ({}, "eval_strategy", "no"),
        ({}, "save_strategy", "no"),
        ({}, "optim", "adamw_torch_fused"),
        ({"optimizer": "muon"}, "optim", "adamw_torch_fused"),
        ({"optimizer": "adamw_8bit"}, "optim", "adamw_bnb_8bit"),
        ({"optimizer": "paged_adamw"}, "optim", "paged_adamw_32bit"),
        ({"optimizer": "paged_adamw_8bit"}, "optim", "paged_adamw_8bit"),
        ({"report_to": ["tensorboard"]}, "report_to", ["tensorboard"]),
    ],
)
def test_every_option_reaches_the_trainer_under_its_own_name(
    option: dict[str, Any], name: str, value: Any
) -> None:
    assert getattr(made(**option), name) == value


FIXED: dict[str, tuple[Any, str]] = {
    "logging_nan_inf_filter": (False, "the mean of losses would leave out what is not finite"),
    "average_tokens_across_devices": (True, "the normaliser counts the tokens of all processes"),
    "remove_unused_columns": (False, "our batches hold more than a model's forward names"),
    "disable_tqdm": (True, "the bar is ours"),
    "log_level": ("error", "what libraries say is ours to say"),
    "log_level_replica": ("error", "the same in other processes"),
    "logging_strategy": ("steps", "a run without epochs logs too"),
    "include_num_input_tokens_seen": ("no", "it gathers over all processes in every step"),
    "ddp_find_unused_parameters": (False, "it walks over the graph in every step"),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_the_trainer_must_not_do_by_itself_is_told_to_it(name: str) -> None:
    assert getattr(made(), name) == FIXED[name][0], FIXED[name][1]


@pytest.mark.parametrize("asked", [False, True])
def test_the_deterministic_kernels_of_cublas_are_prepared_when_asked_for(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(arguments, "prepare_determinism", lambda: told.append(True))
    made(deterministic=asked)
    assert told == [True] * asked


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_trainer_computes_where_this_process_does(
    accelerated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "has_accelerator", lambda: accelerated)
    assert made().use_cpu is not accelerated


@pytest.mark.parametrize("autocast", ["no", "bf16", "fp16"])
def test_autocast_is_what_the_precision_says(autocast: str) -> None:
    found = made(Precision(autocast, "fp32", FP32))
    assert (found.bf16, found.fp16) == (autocast == "bf16", autocast == "fp16")


@pytest.mark.parametrize("pins", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_activations_move_only_when_asked_and_where_memory_can_be_pinned(
    pins: bool, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "pins_memory", lambda: pins)
    found = made(activation_checkpointing=True, offload_activations=asked)
    kwargs = found.activation_checkpointing_kwargs
    assert (kwargs["offload"], kwargs["use_reentrant"]) == (pins and asked, False)


def test_only_the_leading_process_reports_and_curves_lie_in_the_run_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arguments, "is_rank0", lambda: False)
    assert made(report_to=["tensorboard"], output_dir="runs/y").report_to == []
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(Path("runs/y/logs"))


def test_a_trainer_that_sees_another_number_of_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arguments, "rank_and_world", lambda: (0, 4))
    with pytest.raises(ConfigError, match="started 4 processes but the trainer sees 1"):
        made()


def test_each_tracker_that_is_missing_is_named_and_the_others_are_not() -> None:
    arguments.check_trackers([])
    arguments.check_trackers(["torch", "json"])
    with pytest.raises(ConfigError) as caught:
        arguments.check_trackers(["json", "no_such_one", "no_such_other"])
    assert str(caught.value) == (
        "training.report_to: no_such_one, no_such_other not installed; "
        "pip install no_such_one no_such_other"
    )


@pytest.mark.parametrize(
    ("kind", "deepspeed", "world", "seen", "fits"),
    [
        ("NO", False, 1, 1, True),
        ("MULTI_CPU", False, 2, 2, True),
        ("MULTI_GPU", False, 2, 2, True),
        ("MULTI_NPU", False, 2, 2, True),
        ("MULTI_XPU", False, 2, 2, True),
        ("DEEPSPEED", True, 2, 2, True),
        ("DEEPSPEED", True, 1, 1, True),
        ("NO", False, 2, 2, False),
        ("DEEPSPEED", False, 2, 2, False),
        ("DEEPSPEED", False, 1, 1, False),
        ("FSDP", False, 2, 2, False),
        ("MULTI_CPU", True, 2, 2, False),
        ("MULTI_CPU", False, 2, 1, False),
        ("MULTI_CPU", False, 1, 2, False),
        ("DEEPSPEED", True, 2, 4, False),
    ],
)
def test_processes_train_together_as_was_asked_or_not_at_all(
    kind: str, deepspeed: bool, world: int, seen: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "rank_and_world", lambda: (0, world))
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], num_processes=seen)
    given: Any = SimpleNamespace(deepspeed={"x": 1} if deepspeed else None)
    if fits:
        arguments.check_distribution(accelerator, given)
        return
    asked = "DeepSpeed" if deepspeed else "plain data parallel"
    with pytest.raises(ConfigError, match=f"{world} processes with {asked} .* {seen} with"):
        arguments.check_distribution(accelerator, given)


def test_a_pattern_is_searched_in_a_name_and_what_is_wrong_with_each_is_told() -> None:
    rates = Rates(1.0, {"mlp": 0.5, r"layers\.1\.": 0.25}, lambda name: 2.0 if "B" in name else 1.0)
    names = ["layers.0.mlp.A", "layers.1.mlp.A", "layers.1.q.A", "layers.0.q.B", "layers.1.q.B"]
    assert [rates.of(name) for name in names] == [0.5, 0.5, 0.25, 2.0, 0.5]
    rates.check(names)
    assert not rates.is_one
    assert not Rates(1.0, scale=lambda name: 1.0).is_one
    assert not Rates(1.0, {"mlp": 0.5}).is_one
    with pytest.raises(ConfigError) as caught:
        Rates(1.0, {"mlp": 1.0, "(": 1.0, "tower": 1.0}).check(iter(names))
    lines = str(caught.value).splitlines()
    assert [line.split(" is ")[0] for line in lines] == [
        "training.learning_rates: '('", "training.learning_rates: 'tower'",
    ]  # fmt: skip
