"""What a step costs is counted: by hand for single operations, to the last byte for a whole step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune.config.schema import FullMethod, LoraMethod, PTuningV2Method
from finetune.planning.counting import counting, shapes_only
from finetune.planning.roofline import Ceilings, seconds
from finetune.planning.step import Shape, count_layers, count_step
from finetune.planning.subjects import own

CEILINGS = Ceilings()

SIZES = {
    "model_type": "chatglm", "num_layers": 40, "hidden_size": 4096, "ffn_hidden_size": 13696,
    "num_attention_heads": 32, "kv_channels": 128, "multi_query_attention": True,
    "multi_query_group_num": 2, "padded_vocab_size": 151552, "add_qkv_bias": True,
    "add_bias_linear": False, "rmsnorm": True, "layernorm_epsilon": 1.5625e-07, "seq_length": 131072,
    "rope_ratio": 500, "original_rope": True, "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "tie_word_embeddings": False,
    "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329,
}  # fmt: skip
"""GLM-4-9B-Chat's published sizes."""


@pytest.fixture
def nine_billion(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    return tmp_path


def small(folder: Path, **sizes: Any) -> Path:
    text = json.dumps(SIZES | {"hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16, "num_attention_heads": 4, "padded_vocab_size": 512} | sizes)  # fmt: skip
    (folder / "config.json").write_text(text)
    return folder


def test_a_matrix_product_counts_its_kernel_bytes_and_flops() -> None:
    with shapes_only(), counting(CEILINGS) as counter:
        _ = torch.empty(8, 32, dtype=torch.bfloat16) @ torch.empty(32, 16, dtype=torch.bfloat16)
    [((_, name, kind), row)] = counter.ledger.kernels.items()
    assert (name, kind, row.number) == ("mm", "bfloat16", 1)
    assert row.flops == 2 * 8 * 32 * 16
    assert row.bytes == 2 * (8 * 32 + 32 * 16 + 8 * 16)


def test_a_product_added_in_place_counts_its_flops_too() -> None:
    with shapes_only(), counting(CEILINGS) as counter:
        torch.empty(8, 16).addmm_(torch.empty(8, 32), torch.empty(32, 16))
    assert counter.ledger.total("flops", dtype="float32") == 2 * 8 * 32 * 16


def test_views_cost_nothing_and_a_copy_reads_and_writes() -> None:
    with shapes_only(), counting(CEILINGS) as counter:
        turned = torch.empty(4, 8).t()[1:, :2]
        turned.contiguous()
    assert counter.ledger.total("number") == 1
    assert counter.ledger.total("bytes") == 2 * 4 * 7 * 2


def test_the_peak_is_what_is_alive_at_once_by_kind() -> None:
    with shapes_only():
        weight = torch.empty(100)
        with counting(CEILINGS) as counter:
            counter.note(weight, "weights")
            first = weight + 1
            counter.note(first, "activations")
            second = first + 1
            del first
            _ = second[:50] + 1
    peak = counter.ledger.peak()
    assert peak["weights"] == peak["activations"] == peak["transients"] == 400
    assert sum(peak.values()) == 1200


def test_dropout_and_attention_are_one_kernel_each_as_on_a_gpu() -> None:
    with shapes_only(), counting(CEILINGS) as counter:
        query = torch.empty(1, 4, 32, 16, dtype=torch.bfloat16)
        key = torch.empty(1, 2, 32, 16, dtype=torch.bfloat16)
        F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        nn.Dropout(0.1)(query)
    names = {name: row for (_, name, _), row in counter.ledger.kernels.items()}
    assert {name: row.number for name, row in names.items()} == {
        "attention": 1,
        "native_dropout": 1,
    }
    assert names["attention"].flops == 4 * 4 * 32 * 32 * 16 // 2


def test_a_kernel_takes_the_largest_of_its_three_times() -> None:
    assert seconds(CEILINGS, "bfloat16", flops=int(650e12), moved=8) == 1.0
    assert seconds(CEILINGS, "float32", flops=int(45e12), moved=8) == 1.0
    assert seconds(CEILINGS, "attention", flops=int(350e12), moved=8) == 1.0
    assert seconds(CEILINGS, "-", flops=0, moved=int(2.7e12)) == 1.0
    assert seconds(CEILINGS, "-", flops=0, moved=8, number=4) == 4 * 2.5e-6


@pytest.mark.parametrize("method", [LoraMethod(), PTuningV2Method(), FullMethod()], ids=lambda m: m.kind)  # fmt: skip
def test_depth_follows_from_two_and_three_layers(method: Any, tmp_path: Path) -> None:
    folder = small(tmp_path, num_layers=7)
    subject = own(folder, method, checkpointing=True)
    shape = Shape(batch=2, length=640)
    whole = count_layers(subject, shape, CEILINGS, 7)
    followed = count_step(subject, shape, CEILINGS)
    assert (followed.bytes, followed.flops, followed.peak) == (
        whole.bytes,
        whole.flops,
        whole.peak,
    )
    assert followed.flops["float32"] == 0, "what is float32 computes under autocast"
    trains_all = method.kind == "full"
    assert (followed.peak["adapters"] == 0) is trains_all
    assert (followed.peaks["optimizer"]["gradients"] > followed.peak["weights"] / 2) is trains_all
    # The optimizer's launches take 36 tensors each: a launch begun is a launch.
    assert followed.kernels == pytest.approx(whole.kernels, abs=3)
    assert followed.milliseconds == pytest.approx(whole.milliseconds, abs=0.01)


def test_a_step_of_glm_4_9b_is_counted_exactly(nine_billion: Path) -> None:
    subject = own(nine_billion, LoraMethod(), checkpointing=True)
    cost = count_step(subject, Shape(batch=1, length=4096))
    assert cost.kernels == 4099
    assert cost.bytes == 452_132_988_356
    assert cost.flops["float32"] == 0
    assert cost.milliseconds < 515
    assert cost.peak["weights"] == 2 * 9_399_951_360 + 4 * 32  # the rotation's frequencies
    assert cost.peak["adapters"] == (4 + 2) * 21_176_320  # float32, and cast for the step
    assert cost.working / 4096 < 556_000
    assert cost.peak["optimizer"] == pytest.approx(8 * 21_176_320, rel=1e-4)
    # Attention sees the lower half of the square: one pass, one again, and twice and a half back.
    one_pass = 40 * 4 * 32 * 4096 * 4096 * 128 // 2
    assert cost.flops["attention"] == one_pass * 9 // 2


def test_attention_behind_a_prefix_is_counted_as_attention(nine_billion: Path) -> None:
    subject = own(nine_billion, PTuningV2Method(num_virtual_tokens=128), checkpointing=True)
    cost = count_step(subject, Shape(batch=1, length=4096))
    assert cost.flops["float32"] == 0
    one_pass = 40 * 4 * 32 * 128 * (4096 * 4096 // 2 + 4096 * 128)  # a half square, and the prefix
    assert cost.flops["attention"] == one_pass * 9 // 2
    assert cost.mask_bytes == 0
    assert cost.milliseconds < 420


def test_an_operation_over_many_tensors_counts_all_of_its_launches() -> None:
    with shapes_only(), counting(CEILINGS) as counter:
        torch._foreach_mul_([torch.empty(4) for _ in range(250)], 2.0)
    rows = {name: row for (_, name, _), row in counter.ledger.kernels.items()}
    assert rows["_foreach_mul_"].number == 3  # 110 tensors a launch
