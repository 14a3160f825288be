"""A plan says what a run will take: beside counted allocations of real steps, and by hand."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from command_line import ROOT, exit_code
from rows import turns, write_rows
from test_counting import SIZES

from finetune import methods
from finetune.cli.inputs import planned as planned_of
from finetune.config.load import load_config, settled
from finetune.config.schema import FullMethod, LoraMethod, PTuningV2Method, RunConfig
from finetune.errors import OutOfMemoryError
from finetune.models.load import load_model, shape_of
from finetune.planning import evaluating
from finetune.planning.counting import Counting
from finetune.planning.evaluating import PlannedEvaluation, planned_evaluation
from finetune.planning.plan import Gpu, Plan
from finetune.planning.roofline import Ceilings
from finetune.planning.step import name_what_stays, one_step
from finetune.planning.subjects import own, ready
from finetune.training.callbacks.throughput import Work, work_of

MOST = 0.05
"""Of a run's time: what evaluations should take."""
METHODS: list[Any] = [LoraMethod(dropout=0.0), PTuningV2Method(num_virtual_tokens=8), FullMethod()]


def really_held(
    model: Any, method: Any, *, checkpointing: bool, shape: tuple[int, int], folder: Path
) -> int:
    """Bytes at the peak of a real step of a real model, allocation by allocation."""
    model = methods.attach(model, method)
    model = ready(model, checkpointing=checkpointing)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, fused=True)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    ids = torch.randint(0, 370, shape)
    places = torch.arange(ids.numel())[: ids.numel() - 1]
    subject = own(folder, method, checkpointing=checkpointing, dtype=torch.float32, kernels=())
    gc.collect()
    with Counting(Ceilings()) as counter:
        name_what_stays(counter, model, optimizer)
        one_step(counter, subject, model, optimizer, (ids, ids, places))
    return sum(counter.ledger.peak().values())


@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [*((method, True) for method in METHODS), (METHODS[0], False)],
    ids=["lora", "ptuning_v2", "full", "lora, all kept"],
)
def test_a_plan_is_within_5_percent_of_what_a_real_step_allocates(
    method: Any, checkpointing: bool, tiny_chatglm: Path
) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"path": str(tiny_chatglm), "dtype": "float32", "kernels": "torch"},
            "data": {"train": "x.jsonl", "max_length": 1024},
            "method": method.model_dump(),
            "training": {"output_dir": "x", "batch_size": 2, "activation_checkpointing": checkpointing},
        }
    )  # fmt: skip
    found = planned_of(config, Gpu())[1]
    model = load_model(tiny_chatglm)
    real = really_held(
        model, method, checkpointing=checkpointing, shape=(2, 1024), folder=tiny_chatglm
    )
    assert found.memory_bytes == pytest.approx(real, rel=0.05)


SMOLLM2 = {
    "model_type": "glm", "vocab_size": 49168, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "max_position_embeddings": 8192, "attention_bias": False, "tie_word_embeddings": True,
    "pad_token_id": 0,
}  # fmt: skip
"""The quickstart's 135 million weights."""


@pytest.mark.parametrize(
    ("method", "checkpointing"), [(METHODS[0], False), (METHODS[2], True)],
    ids=["lora, all kept", "full"],
)  # fmt: skip
def test_a_plan_is_within_5_percent_of_a_real_step_of_the_quickstarts_model(
    method: Any, checkpointing: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    config = RunConfig.model_validate(
        {
            "model": {"path": str(tmp_path), "dtype": "float32", "kernels": "torch"},
            "data": {"train": "x.jsonl", "max_length": 128},
            "method": method.model_dump(),
            "training": {"output_dir": "x", "activation_checkpointing": checkpointing},
        }
    )
    found = planned_of(config, Gpu())[1]
    model = shape_of(tmp_path)  # its weights need to be numbers, not good ones
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    real = really_held(model, method, checkpointing=checkpointing, shape=(1, 128), folder=tmp_path)
    assert real > 500e6
    assert found.memory_bytes == pytest.approx(real, rel=0.05)


@pytest.fixture
def nine_billion(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    return tmp_path


def planned(name: str, folder: Path, gpu: Gpu, *overrides: str) -> Plan:
    config = load_config(ROOT / "configs" / name, [f"model.path={folder}", *overrides])
    return planned_of(config, gpu)[1]


def test_the_shipped_lora_fills_a_24_gb_card_and_no_more(nine_billion: Path) -> None:
    found = planned("lora.yaml", nine_billion, Gpu(24_000_000_000))
    assert found.fits
    assert found.tokens_per_step >= 4096
    assert found.memory["weights"] == pytest.approx(18.8e9, rel=1e-3)
    assert 4096 < found.room < 8192


def test_the_shipped_full_tuning_takes_25_gb_of_each_of_8_gpus(nine_billion: Path) -> None:
    found = planned("sft.yaml", nine_billion, Gpu(number=8), "data.max_length=1024", "training.batch_size=4")  # fmt: skip
    assert found.memory_bytes <= 25e9
    assert found.memory["optimizer"] == pytest.approx(12 * 9.4e9 / 8, rel=1e-3)
    assert found.checkpoint_bytes == pytest.approx(14 * 9.4e9, rel=1e-3)
    kept = load_config(ROOT / "configs/sft.yaml", []).training.keep_checkpoints
    assert (
        found.disk_bytes == (kept + 2) * found.checkpoint_bytes
    )  # the best one, and one being written


def test_four_bits_hold_the_layers_in_a_quarter(nine_billion: Path) -> None:
    found = planned("lora.yaml", nine_billion, Gpu(), "model.quantization=nf4")
    # 8.16e9 weights of layers in 4.13 bits, embedding and head of 0.62e9 each in bfloat16
    assert found.memory["weights"] == pytest.approx(8.16e9 * 4.13 / 8 + 4 * 0.62e9, rel=0.02)


def test_what_fits_follows_from_what_a_token_adds(nine_billion: Path) -> None:
    found = planned("lora.yaml", nine_billion, Gpu(24_000_000_000))
    longest = planned("lora.yaml", nine_billion, Gpu(24_000_000_000), f"data.max_length={found.room}")  # fmt: skip
    assert longest.fits
    assert longest.memory_bytes == pytest.approx(23e9, rel=0.005)


def test_the_command_answers_with_json_and_in_words(
    nine_billion: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = (
        "plan", str(ROOT / "configs/lora.yaml"), f"model.path={nine_billion}",
        "training.max_steps=600", "training.num_epochs=null", "--gpu", "24GB",
    )  # fmt: skip
    assert exit_code(*words, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["memory_bytes_per_gpu"] == sum(found["memory"].values())
    assert found["tokens_per_step_per_gpu"] == 4096
    assert found["tokens"] == 600 * 4096
    assert 0 < found["evaluation_share"] <= MOST
    assert exit_code(*words) == 0
    said = "".join(capfd.readouterr())
    assert "fits into 24 GB" in said
    assert "% of the time" in said
    assert exit_code(*words[:-1], "much") == 2
    assert "--gpu 'much' is no size" in capfd.readouterr().err


def test_out_of_memory_is_said_beside_what_was_planned(tiny_chatglm: Path) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"path": str(tiny_chatglm), "dtype": "float32"},
            "data": {"train": "x.jsonl", "max_length": 64},
            "method": {"kind": "lora"},
            "training": {"output_dir": "x"},
        }
    )
    said = r"Planned were \d+ MB for the training itself"
    memory = planned_of(config, Gpu())[0]
    with pytest.raises(OutOfMemoryError, match=said), memory.explained():
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_tokens_of_a_step_become_forward_passes() -> None:
    config = RunConfig.model_validate(
        {
            "model": {"path": "x"},
            "data": {"train": "x.jsonl", "max_length": 4096, "packing": True},
            "method": {"kind": "lora"},
            "training": {"output_dir": "x", "batch_size": 2, "tokens_per_step": 131_072},
        }
    )
    assert settled(config, world=4).training.gradient_accumulation_steps == 4
    assert settled(config, world=64).training.gradient_accumulation_steps == 1
    assert settled(config, world=4).training.tokens_per_step is None


def test_tokens_of_a_step_need_packing_and_no_second_number(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "model: {path: x}\ndata: {train: x.jsonl}\nmethod: {kind: lora}\n"
        "training: {output_dir: x, tokens_per_step: 4096, gradient_accumulation_steps: 2}\n"
    )
    with pytest.raises(Exception, match="give one of the two") as problem:
        load_config(file, [])
    assert "set data.packing to true" in str(problem.value)


def test_a_token_takes_four_flops_a_frozen_and_six_a_trained_weight(tiny_chatglm: Path) -> None:
    model = load_model(tiny_chatglm)
    model.requires_grad_(False)
    matrices = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and "word_embeddings" not in name
    )
    assert work_of(model, 0.0, 1).per_token == 4 * matrices
    model.requires_grad_(True)
    assert work_of(model, 0.0, 1).per_token == 6 * matrices
    text = model.config
    attention = 6 * text.num_layers * text.num_attention_heads * text.kv_channels * 10
    assert work_of(model, 10.0, 1).per_token == 6 * matrices + attention


def test_the_share_of_the_peak_is_of_one_device() -> None:
    speed = Work(per_token=6e9, peak=1e15, devices=4).speed(tokens_per_second=200_000)
    assert speed == {"tflops_per_second": 300.0, "mfu": 0.3}
    assert "mfu" not in Work(6e9, None, 1).speed(1.0)


@pytest.mark.slow
def test_a_run_logs_its_speed_and_profiles_its_steps(tiny_chatglm: Path, tmp_path: Path) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 12)
    config = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=4, training__profile=1,
        training__log_every_steps=1,
    )  # fmt: skip
    runs.run_here(config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert all(line["tokens_per_second"] >= line["supervised_tokens_per_second"] > 0 for line in logged)  # fmt: skip
    assert all(line["tflops_per_second"] > 0 for line in logged)
    assert json.loads((tmp_path / "run/profile/trace.json").read_text())["traceEvents"]
    table = (tmp_path / "run/profile/kernels.txt").read_text()
    assert "aten::mm" in table or "aten::addmm" in table


def evaluation_of(plan: Plan, config: RunConfig) -> PlannedEvaluation | None:
    return planned_evaluation(plan, config.model, config.data, config.evaluation)


UNFETCHED = ("advertisegen", "lora_1m")  # fmt: skip
"""Configs whose data is not in the repository."""


@pytest.mark.parametrize("name", ["advertisegen", "lora", "sft", "lora_1m", "glm4v_lora"])  # fmt: skip
def test_evaluations_take_5_percent_of_a_shipped_run_at_most(
    name: str, nine_billion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other text configs have the sizes of `lora` or `sft`, the others of GLM-4V those of its LoRA."""
    monkeypatch.setattr(evaluating, "_sees_images", lambda config: name.startswith("glm4v"))
    file = ROOT / "configs" / f"{name}.yaml"
    processes = re.search(r"nproc_per_node=(\d+)", file.read_text("utf-8"))
    changes = [f"model.path={nine_billion}"]
    if name in UNFETCHED:
        data = write_rows(tmp_path / "data.jsonl", [{"messages": turns("裙子" * 60, "棉" * 200)}] * 1070)  # fmt: skip
        changes.append(f"data.validation={data}")
    config = load_config(file, changes)
    plan = planned_of(config, Gpu(number=int(processes[1]) if processes else 1))[1]
    found = evaluation_of(plan, config)
    assert found is not None
    assert found.share is not None
    assert 0 < found.share <= MOST


def test_an_evaluation_is_planned_by_its_passes_and_rounds(
    nine_billion: Path, tmp_path: Path
) -> None:
    rows = [{"messages": turns("a" * 300, "b" * 300, "c", "d")}] * 100
    data = write_rows(tmp_path / "held_out.jsonl", rows)
    common = [f"model.path={nine_billion}", f"data.validation={data}", "evaluation.every_steps=7"]
    config = load_config(ROOT / "configs/lora.yaml", [*common, "evaluation.max_new_tokens=10"])
    plan = planned_of(config, Gpu())[1]
    found = evaluation_of(plan, config)
    assert found is not None
    # 9.4e9 weights, 2 FLOPs each, for the loss and for the prompts of all 200 replies: in 4 batches
    tokens = data.stat().st_size / 3
    reading = 2 * 9.4e9 * 2 * tokens / (0.4 * 989e12)
    writing = 4 * 10 * 18.8e9 / 2.7e12
    assert found.seconds == pytest.approx(reading + writing, rel=0.01)
    assert found.share == pytest.approx(found.seconds / (found.seconds + 7 * plan.seconds_per_step))
    fewer = evaluation_of(plan, load_config(ROOT / "configs/lora.yaml", [*common, "evaluation.max_new_tokens=10", "evaluation.max_samples=64"]))  # fmt: skip
    assert fewer is not None
    assert fewer.seconds == pytest.approx(reading * (1 + 64 / 200) / 2 + writing / 4, rel=0.01)
    away = load_config(ROOT / "configs/lora.yaml", [*common, "data.validation=hf://some/where"])
    assert evaluation_of(plan, away) is None
