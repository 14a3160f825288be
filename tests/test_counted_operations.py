"""What single operations come to: kernels, bytes, FLOPs, and the memory that lives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_counting import CEILINGS
from torch import Tensor

from finetune.planning.counting import Counting, Ledger, counting, shapes_only

aten = torch.ops.aten


def ran(work: Callable[[Tensor], object]) -> dict[str, tuple[int, int]]:
    """Kernels and bytes by name of what is done with 4 x 8 float32 numbers, 128 bytes."""
    with shapes_only():
        given = torch.empty(4, 8)
        with counting(CEILINGS) as counter:
            work(given)
    rows = counter.ledger.kernels.items()
    return {name: (row.number, row.bytes) for (_, name, _), row in rows}


NOTHING: dict[str, Callable[[Tensor], object]] = {
    "another view": lambda x: x.detach().t()[1:].unsqueeze(0),
    "an unsafe view": lambda x: aten._unsafe_view(x, [8, 4]),
    "an alias": lambda x: aten._reshape_alias(x, [8, 4], [4, 1]),
    "as it comes": lambda x: torch.empty(4, 8),
    "as it comes, like": torch.empty_like,
    "as it comes, new": lambda x: x.new_empty(3),
    "as it comes, with strides": lambda x: torch.empty_strided((4, 8), (8, 1)),
    "as it comes, new with strides": lambda x: x.new_empty_strided((4, 8), (8, 1)),
    "smaller": lambda x: x.resize_(2, 2),
    "another storage": lambda x: x.set_(x.untyped_storage(), 0, (2,), (1,)),
    "a question": lambda x: aten.is_same_size(x, x),
}


@pytest.mark.parametrize("what", NOTHING)
def test_no_kernel_runs_for_a_view_or_for_memory_as_it_comes(what: str) -> None:
    assert ran(NOTHING[what]) == {}


FILLS: dict[str, Callable[[Tensor], object]] = {
    "zeros": lambda x: torch.zeros(4, 8), "ones": lambda x: torch.ones(4, 8), "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like, "full": lambda x: torch.full((4, 8), 1.0), "full_like": lambda x: torch.full_like(x, 1.0),
    "fill_": lambda x: x.fill_(1.0), "zero_": lambda x: x.zero_(), "new_zeros": lambda x: x.new_zeros(4, 8),
    "new_ones": lambda x: x.new_ones(4, 8), "new_full": lambda x: x.new_full((4, 8), 1.0), "arange": lambda x: torch.arange(32.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FILLS)
def test_what_only_writes_reads_nothing(name: str) -> None:
    assert ran(FILLS[name]) == {name: (1, 128)}


def test_a_single_number_is_four_bytes() -> None:
    assert ran(lambda x: torch.scalar_tensor(1.0)) == {"scalar_tensor": (1, 4)}


def places(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.long)


GATHERS: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "embedding": (lambda x: F.embedding(places(2), x), 2 * 64), "index_select": (lambda x: x.index_select(0, places(2)), 2 * 64),
    "gather": (lambda x: x.gather(0, places(2, 8)), 2 * 64), "index": (lambda x: x[places(2)], 2 * 64),
    "scatter_": (lambda x: x.scatter_(0, places(2, 8), torch.empty(2, 8)), 2 * (64 + 128)),
    "scatter_add_": (lambda x: x.scatter_add_(0, places(2, 8), torch.empty(2, 8)), 2 * (64 + 128)),
    "index_add_": (lambda x: x.index_add_(0, places(2), torch.empty(2, 8)), 2 * (64 + 16)),
    "add": (lambda x: x + x[:1], 128 + 32 + 128),
}  # fmt: skip


@pytest.mark.parametrize("name", GATHERS)
def test_what_takes_rows_of_a_table_moves_these_alone(name: str) -> None:
    work, moved = GATHERS[name]
    assert ran(work) == {name: (1, moved)}


def test_operations_of_one_name_add_up_in_number_bytes_flops_and_seconds() -> None:
    with shapes_only(), counting(CEILINGS) as counter:
        for _ in range(3):
            _ = torch.empty(8, 32) @ torch.empty(32, 16)
        counter.phase = "backward"
        _ = torch.empty(8, 32, dtype=torch.bfloat16) @ torch.empty(32, 16, dtype=torch.bfloat16)
    ledger = counter.ledger
    assert list(ledger.kernels) == [("forward", "mm", "float32"), ("backward", "mm", "bfloat16")]  # fmt: skip
    each = 2 * 8 * 32 * 16
    assert (ledger.total("number"), ledger.total("flops")) == (4, 4 * each)
    assert (ledger.total("flops", dtype="float32"), ledger.total("flops", dtype="bfloat16")) == (3 * each, each)  # fmt: skip
    assert ledger.total("bytes") == 3 * 4 * (256 + 512 + 128) + 2 * (256 + 512 + 128)
    assert ledger.total("seconds") == pytest.approx(4 * 2.5e-6)


def test_attention_under_autocast_moves_half_as_much_and_its_largest_mask_is_noted() -> None:
    with shapes_only():
        query, key = torch.empty(1, 4, 32, 16), torch.empty(1, 2, 32, 16)
        with counting(CEILINGS) as counter, torch.autocast("cpu", dtype=torch.bfloat16):
            for size in (32, 1):
                mask = torch.empty(1, 1, size, 32, dtype=torch.bool)
                F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    [row] = [row for (_, name, _), row in counter.ledger.kernels.items() if name == "attention"]
    # A query and what comes out, key and value in 2 bytes, a float32 sum for each query, and the masks.
    each = 2 * (2 * 4 * 32 * 16 + 2 * 2 * 32 * 16) + 4 * 4 * 32
    assert row.bytes == 2 * each + 32 * 32 + 32
    assert counter.ledger.mask_bytes == 32 * 32


@pytest.mark.parametrize(("p", "training", "kernels"), [(0.1, True, 1), (0.0, True, 0), (0.1, False, 0)])  # fmt: skip
def test_dropout_that_drops_nothing_is_no_kernel(p: float, training: bool, kernels: int) -> None:
    assert len(ran(lambda x: F.dropout(x, p, training))) == kernels


def test_experts_multiply_their_own_rows_alone() -> None:
    with shapes_only(), counting(CEILINGS) as counter:
        rows, weights = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((64, 32), (4, 32, 16)))  # fmt: skip
        torch._grouped_mm(rows, weights, torch.empty(4, dtype=torch.int32))
    assert counter.ledger.total("flops", dtype="bfloat16") == 2 * 64 * 32 * 16


def test_the_peak_of_a_phase_is_its_own_and_only_of_the_kinds_that_are_asked_for() -> None:
    found = Ledger(kinds={1: "weights", 2: "activations"})
    found.events = [(1, 100, "forward"), (2, 10, "forward"), (3, 5, "backward"), (2, -10, "backward"), (4, 7, "optimizer")]  # fmt: skip
    assert {phase: sum(held.values()) for phase, held in found.peaks().items()} == {"forward": 110, "backward": 115, "optimizer": 112}  # fmt: skip
    assert found.peak()["transients"] == 5
    assert found.peak(("activations", "transients")) == {"activations": 10, "transients": 5}
    assert found.peak(("transients",)) == {"transients": 12}


def test_a_storage_is_counted_once_named_last_and_gone_with_its_last_tensor() -> None:
    with shapes_only():
        counter = Counting(CEILINGS)
        one = torch.empty(100)
        for tensor in (one, one[:3], one.t()):
            counter.note(tensor)
        counter.name_living("activations")
        assert counter.ledger.kinds == {1: "activations"}
        counter.note(one, "weights")
        counter.name_living("activations")
        other = torch.empty(10)
        counter.note(other)
        del one, tensor
        assert [size for _, size, _ in counter.ledger.events] == [400, 40, -400]
        assert counter.ledger.kinds == {1: "weights"}


def test_a_fused_optimizer_launches_as_often_as_its_five_lists_need() -> None:
    with shapes_only():
        weights = [torch.nn.Parameter(torch.empty(4)) for _ in range(61)]
        optimizer = torch.optim.AdamW(weights, fused=True)
        for weight in weights:
            weight.grad = torch.empty(4)
        with counting(CEILINGS) as counter:
            optimizer.step()
    numbers = {name: row.number for (_, name, _), row in counter.ledger.kernels.items()}
    assert numbers["_fused_adamw_"] == 3, "30 tensors a launch"
