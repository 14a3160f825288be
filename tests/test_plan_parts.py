"""What a plan adds up, shows and advises, each part by hand on round numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import (
    DeepSpeedSection,
    EvaluationSection,
    FullMethod,
    LoraMethod,
    ModelSection,
    PTuningV2Method,
    TrainingSection,
)
from finetune.errors import OutOfMemoryError
from finetune.models.loss import CHUNK_ELEMENTS
from finetune.models.tiled_mlp import ABOVE
from finetune.planning import attention, run_memory, words
from finetune.planning.counting import _bytes, _launches, counting
from finetune.planning.evaluating import PlannedEvaluation
from finetune.planning.plan import RUNTIME, Gpu, Plan, _length_alike, _sharded, _Sizes, _whole
from finetune.planning.roofline import Ceilings
from finetune.planning.run_memory import LONG, RunMemory
from finetune.planning.sharding import LIVE_WEIGHTS, SUB_GROUP
from finetune.planning.step import Cost
from finetune.planning.subjects import made_in, nothing_moves

PLAN = Plan(
    memory={"weights": 20_000_000_000, "gradients": 1_000_000, "activations": 4_000_000_000},
    host_bytes=0, per_token=1_000_000, batch=2, length=1000, sharing=1, accumulation=4,
    checkpoint_bytes=500_000_000, disk_bytes=2_500_000_000, flops=int(1e15), model_milliseconds=800.0,
    dtype="bfloat16", parameters=9_400_000_000, active_parameters=9_400_000_000, layers=40, steps=600,
    gpu=Gpu(bytes=30_000_000_000, number=8, peak_flops=1e15, share=0.5),
)  # fmt: skip


def test_the_numbers_of_a_plan_follow_from_its_parts() -> None:
    numbers = PLAN.numbers()
    assert (PLAN.fits, PLAN.room) == (True, 2000 + 4999)  # 30 - 1 - 24.001 GB, a megabyte a token
    assert PLAN.model_bytes == 18_800_000_000
    assert numbers["tokens_per_step_per_gpu"] == 8000
    assert numbers["tokens"] == 600 * 8000 * 8
    assert numbers["seconds_per_step"] == 1e15 * 4 / (1e15 * 0.5)
    assert numbers["hours"] == 600 * 8 / 3600
    assert (numbers["largest_batch"], numbers["longest_length"]) == (6, 3499)
    shared = replace(PLAN, sharing=2, steps=None)
    assert shared.tokens_per_step == 4000
    assert (shared.tokens, shared.hours) == (None, None)


@pytest.mark.parametrize(
    ("held", "fits", "room"),
    [(29_000_000_000, True, 2000), (29_000_000_001, False, 1999), (60_000_000_000, False, 0)],
)
def test_a_plan_fits_up_to_the_last_byte_beside_the_runtime(
    held: int, fits: bool, room: int
) -> None:
    found = replace(PLAN, memory={"weights": held})
    assert RUNTIME == 1_000_000_000
    assert (found.fits, found.room) == (fits, room)


def said(plan: Plan) -> dict[str, str]:
    return dict(words.rows(plan))


def test_the_table_says_what_takes_how_much_and_what_that_leaves() -> None:
    found = said(PLAN)
    assert found == {
        "weights": "20.00 GB",
        "activations of the batch": "4.00 GB",
        "together": "24.00 GB",
        "besides, of the driver and libraries": "about 1 GB",
        "number format": "bfloat16",
        "fits into 30 GB": "yes",
        "each further token of a batch": "1.00 MB",
        "longest row, batches of 2": "3,499 tokens",
        "largest batch of 1,000 tokens": "6 rows",
        "a step on one GPU": "at most 8,000 tokens",
        "its time at 50 % of 1000 TFLOP/s": "8.00 s, without communication",
        "all 600 steps": "at most 38,400,000 tokens, 1.3 hours",
        "a checkpoint": "0.50 GB",
        "all that are kept, and one being written": "2.5 GB",
    }
    other = replace(
        PLAN, host_bytes=3_000_000_000, dtype="float16", active_parameters=3_000_000_000, steps=None,
        gpu=Gpu(bytes=24_000_000_000), memory=PLAN.memory | {"gradients": 5_000_000},
    )  # fmt: skip
    more = said(other)
    assert more["of the host's memory, for activations"] == "3.00 GB"
    assert more["weights of the model"] == "9.4 billion, of which a token takes 3.0"
    assert more["number format"] == "float16, with sums of layers in float32"
    assert more["fits into 24 GB"] == "no"
    assert more["gradients"] == "0.01 GB"
    assert not any("steps" in name for name in more)


def test_a_plan_in_one_line_names_what_is_large() -> None:
    assert words.in_short(PLAN) == "24.0 GB (weights 20.0, activations 4.0)"
    assert words.in_short(replace(PLAN, memory={"weights": 900_000_000})) == "900 MB"
    small = replace(PLAN, memory=PLAN.memory | {"adapters": 50_000_000, "gradients": 49_000_000})
    assert words.in_short(small) == "24.1 GB (weights 20.0, activations 4.0, adapters 0.1)"


def test_advice_is_less_memory_or_fuller_steps_or_nothing() -> None:
    assert words.knobs(replace(PLAN, gpu=Gpu(bytes=1)), ["less"]) == ["less"]
    [fuller] = words.knobs(PLAN, ["less"])
    assert fuller.startswith("a step holds 2,000 tokens at a time where 6,999 tokens would fit")
    assert words.knobs(replace(PLAN, length=2048), ["less"]) == [], "4,096 tokens keep it busy"
    assert words.knobs(replace(PLAN, per_token=3_000_000), ["less"]) == [], "not twice as many fit"


def cost(working: int) -> Cost:
    peaks = {"forward": {"weights": 70, "adapters": 6, "gradients": 4, "optimizer": 8, "activations": working, "transients": 0}}  # fmt: skip
    return Cost(1, 1, {}, peaks, working, 0, 1.0)


FULL = _Sizes(frozen=0, trained=1000, trained_bytes=2000, largest_bytes=100, everything=1000, active=1000)  # fmt: skip
LORA = _Sizes(frozen=8000, trained=1000, trained_bytes=2000, largest_bytes=100, everything=4000, active=4000)  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "gpus", "full", "lora"),
    [  # weights, gradients, optimizer's state of a full run; weights of a LoRA run
        (0, 4, (2000, 2000, 12000), 8000),
        (1, 4, (2000, 2000, 3000), 8000),
        (2, 4, (2000, 500, 3000), 8000),
        (3, 4, (2500, 500, 3000), 10000),  # a quarter, and all gathered
        (3, 1, (2000, 2000, 12000), 8000),
    ],
)
def test_each_stage_of_zero_shares_out_what_it_says(
    stage: Any, gpus: int, full: tuple[int, int, int], lora: int
) -> None:
    section = DeepSpeedSection(zero_stage=stage)
    found = _sharded(section, FULL, cost(50_000), gpus, trains_all=True)
    assert (found["weights"], found["gradients"], found["optimizer"]) == full
    assert (found["adapters"], found["activations"], found["transients"]) == (0, 50_000, 0)
    found = _sharded(section, LORA, cost(50_000), gpus, trains_all=False)
    assert (found["weights"], found["adapters"], found["gradients"]) == (lora, 6000, full[1])
    assert found["optimizer"] == full[2]


def test_the_optimizers_turn_counts_where_it_holds_more_than_the_passes() -> None:
    section = DeepSpeedSection(zero_stage=2)
    found = _sharded(section, FULL, cost(100), 4, trains_all=True)
    assert (found["activations"], found["transients"]) == (0, 1000 + 500)  # float32, and gradients
    found = _sharded(section, LORA, cost(100), 4, trains_all=False)
    assert (found["activations"], found["transients"]) == (0, 1000)
    on_cpu = DeepSpeedSection(zero_stage=2, offload_optimizer="cpu")
    found = _sharded(on_cpu, LORA, cost(100), 4, trains_all=False)
    assert (found["optimizer"], found["activations"], found["transients"]) == (0, 100, 0)


def test_the_third_stage_gathers_a_bounded_part_and_updates_in_groups() -> None:
    large = _Sizes(0, 10_000_000_000, 20_000_000_000, 1_000_000_000, 10_000_000_000, 10_000_000_000)
    section = DeepSpeedSection(zero_stage=3)
    assert (LIVE_WEIGHTS, SUB_GROUP) == (600_000_000, 100_000_000)
    found = _sharded(section, large, cost(0), 8, trains_all=True)
    assert found["weights"] == 2_500_000_000 + 1_200_000_000
    wide = replace(large, largest_bytes=1_500_000_000)
    found = _sharded(section, wide, cost(7), 8, trains_all=True)
    assert found["weights"] == 2_500_000_000 + 1_500_000_000
    assert (found["activations"], found["transients"]) == (7, 0)


def test_without_deepspeed_several_gpus_hold_their_gradients_twice() -> None:
    assert _whole(LORA, cost(9), 1, "adamw") == cost(9).peak
    assert _whole(LORA, cost(9), 2, "adamw") == cost(9).peak | {"gradients": 4 + 4000}
    assert _whole(LORA, cost(9), 1, "adamw_8bit")["optimizer"] == 2031
    assert _whole(LORA, cost(9), 1, "paged_adamw")["optimizer"] == 0


def test_memory_per_token_is_taken_from_rows_that_are_tiled_alike() -> None:
    for batch, length in ((1, 1), (1, ABOVE // 2), (1, ABOVE), (1, ABOVE + 2), (4, ABOVE // 4), (4, ABOVE)):  # fmt: skip
        other = _length_alike(batch, length)
        assert other in (length // 2, 2 * length)
        assert (batch * other > ABOVE) == (batch * length > ABOVE), (batch, length)


# --- operations --------------------------------------------------------------------------------


def test_attention_counts_two_products_forward_and_five_back() -> None:
    query, key = torch.empty(2, 4, 8, 16, device="meta"), torch.empty(2, 2, 32, 16, device="meta")
    whole = 4 * 2 * 4 * 8 * 32 * 16
    for causal, forward in ((False, whole), (True, whole // 2)):
        assert attention.FLOPS["attention"](query, key, key, None, causal) == forward
        assert attention.FLOPS["attention_backward"](query, query, key, key, query, query, None, causal) == forward * 5 // 2  # fmt: skip


def test_attention_of_documents_counts_what_each_sees_of_its_own() -> None:
    query, key = torch.empty(60, 4, 16, device="meta"), torch.empty(90, 2, 16, device="meta")
    borders = torch.empty(4, device="meta")  # of three documents: 20 queries and 30 keys each
    for causal, seen in ((False, 3 * 20 * 30), (True, 3 * (20 * 10 + 20 * 20 // 2))):
        flops = 4 * 4 * 16 * seen
        more = (borders, borders, 20, 30, causal)
        assert attention.FLOPS["_varlen_attn"](query, key, key, *more) == flops
        back = (key, query, query, *more)
        assert attention.FLOPS["_varlen_attn_backward"](query, query, key, *back) == flops * 5 // 2


def test_bytes_are_what_an_operation_reads_and_writes() -> None:
    table, rows = torch.empty(1000, 4), torch.empty(10, 4)
    assert _bytes("embedding", [table, torch.empty(10)], [rows]) == 2 * 160  # not the whole table
    assert _bytes("zeros", [], [rows]) == 160
    assert _bytes("index_add_", [table, rows, torch.empty(10)], [table]) == 2 * (160 + 40)
    assert _bytes("add", [rows, rows[:1].expand(10, 4)], [rows]) == 160 + 160 + 160
    assert _bytes("add", [rows, torch.empty(4).expand(10, 4)], [rows]) == 160 + 16 + 160


@pytest.mark.parametrize(
    ("lists", "launches"),
    [
        *((([torch.empty(1)] * (most + more),) * lists, 1 + more) for lists, most in ((1, 110), (2, 64), (3, 48), (4, 36), (5, 30)) for more in (0, 1)),
        (([torch.empty(1)] * 65, [torch.empty(1)] * 65), 2), ((torch.empty(1),), 1),
        (tuple([torch.empty(1)] * 31 for _ in range(6)), 2), (([torch.empty(320 * 65536 + 1, device="meta")],), 2),
    ],
)  # fmt: skip
def test_operations_over_lists_launch_as_often_as_their_tensors_need(
    lists: Any, launches: int
) -> None:
    assert _launches(lists) == launches


def test_what_is_exchanged_for_counting_is_put_back_after_an_error() -> None:
    import torch.nn.functional as F
    from torch import nn

    def held() -> list[Any]:
        return [F.dropout, F.scaled_dot_product_attention, dict(CHUNK_ELEMENTS), nn.Module.to, torch.get_default_dtype()]  # fmt: skip

    before = held()

    def failing() -> None:
        assert held() != before
        raise ZeroDivisionError

    for entered in (counting(Ceilings()), nothing_moves(), made_in(torch.bfloat16)):
        with pytest.raises(ZeroDivisionError), entered:
            failing()
        assert held() == before


# --- evaluations and advice --------------------------------------------------------------------


def test_an_evaluation_is_said_with_its_share_where_steps_are_known() -> None:
    found = PlannedEvaluation(30.0, 570.0)
    assert found.share == 0.05
    assert found.rows() == [["an evaluation", "at most 30.0 s, 5 % of the time"]]
    assert found.numbers() == {"evaluation_seconds": 30.0, "evaluation_share": 0.05}
    assert PlannedEvaluation(30.0, None).rows() == [["an evaluation", "at most 30.0 s"]]


def memory(**changes: Any) -> RunMemory:
    """A run for which nothing is left to advise but its length."""
    training: dict[str, Any] = {"output_dir": "r", "batch_size": 1, "activation_checkpointing": True}  # fmt: skip
    training |= changes.pop("training", {})
    given: dict[str, Any] = {
        "model": ModelSection(path="m", dtype="bfloat16"), "method": PTuningV2Method(),
        "deepspeed": DeepSpeedSection(offload_optimizer="cpu"), "evaluation": None,
        "max_length": 512, "longest": 300,
    } | changes  # fmt: skip
    return RunMemory(training=TrainingSection(**training), **given)


LAST = "data.max_length (now 512; the longest example has 300 tokens)"
LONG_ROWS = {"longest": LONG + 1, "max_length": 2 * LONG}


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, None),
        ({"training": {"batch_size": 4, "gradient_accumulation_steps": 3}},
         "training.batch_size=1 training.gradient_accumulation_steps=12 (now 4 and 3): learns the same"),
        ({"training": {"activation_checkpointing": False}}, "training.activation_checkpointing=true: the same numbers, a third more time"),
        ({"deepspeed": None}, "deepspeed.zero_stage=2, or 3 to shard the weights too, over several GPUs"),
        ({"deepspeed": DeepSpeedSection()}, "deepspeed.offload_optimizer=cpu: slower steps"),
        ({"deepspeed": DeepSpeedSection(config="ds.json")}, None),
        ({"model": ModelSection(path="m")}, "model.dtype=bfloat16 (now auto)"),
        ({"model": ModelSection(path="m", dtype="float32")}, "model.dtype=bfloat16 (now float32)"),
        ({"model": ModelSection(path="m", dtype="float16")}, None),
        ({"method": LoraMethod()}, "model.quantization=nf4: the frozen weights take a quarter of bfloat16's"),
        ({"method": LoraMethod(), "model": ModelSection(path="m", dtype="bfloat16", quantization="nf4")}, None),
        ({"method": FullMethod()}, "method.kind=lora: a few weights learn, and only they have optimizer states"),
        ({"evaluation": EvaluationSection(batch_size=7)}, "evaluation.batch_size (now 7), if it ran out while replies were generated"),
        ({"evaluation": EvaluationSection(generate=False)}, None),
    ],
)  # fmt: skip
def test_every_option_that_would_need_less_memory_is_named_where_it_would(
    changes: dict[str, Any], advice: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunMemory, "_is_mixture", lambda _: False)
    assert memory(**changes).less() == [*([advice] if advice else []), LAST]


def test_long_rows_have_options_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    host = "training.offload_activations=true: what layers are recomputed from goes to the host's memory"  # fmt: skip
    shared = "training.sequence_parallel=2 or more: as many GPUs share each row"
    assert memory(**LONG_ROWS).less()[:-1] == [host, shared]
    assert memory(**LONG_ROWS | {"longest": LONG}).less()[:-1] == []
    moved = {"activation_checkpointing": True, "offload_activations": True}
    assert memory(**LONG_ROWS, training=moved).less()[:-1] == [shared]
    assert memory(**LONG_ROWS, training={"sequence_parallel": 2}).less()[:-1] == [host]
    monkeypatch.setattr(RunMemory, "_is_mixture", lambda _: True)
    assert memory(method=LoraMethod()).less() == [LAST], "experts are not held in 4 bits"
    assert memory(method=FullMethod()).less()[0].startswith("method.kind=lora")


def test_only_an_error_of_memory_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_memory, "local_folder", lambda *_, **__: tmp_path)
    with pytest.raises(ValueError, match="other"), memory().explained():
        raise ValueError("other")
    with pytest.raises(OutOfMemoryError) as error, memory().explained():
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    text = str(error.value)
    assert text.startswith("out of memory: CUDA out of memory. Tried to allocate 2 GiB.\n")
    assert "No plan could be made" in text
    assert text.endswith(f"To reduce memory, cheapest first:\n  {LAST}")
