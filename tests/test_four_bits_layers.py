"""Layers in 4 bits, with a library in the place of bitsandbytes that keeps its weights wide."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.models import quantization
from finetune.models.quantization import FEW_ROWS, FourBits, know_checkpoints, take_over


class Linear4bit(nn.Linear):
    """As bitsandbytes' layer is called; notes what it is asked itself."""

    def __init__(self, *sizes: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(*sizes, dtype=dtype)
        self.weight.quant_state = SimpleNamespace(dtype=dtype, shape=self.weight.shape)
        self.requires_grad_(False)
        self.support_avx512bf16_for_cpu = True
        self.theirs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.theirs += 1
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    library, layers, functional = (ModuleType(f"bitsandbytes{part}") for part in ("", ".nn", ".functional"))  # fmt: skip
    layers.Linear4bit = Linear4bit  # type: ignore[attr-defined]
    functional.dequantize_4bit = lambda flat, state: flat.view(state.shape)  # type: ignore[attr-defined]
    for module in (library, layers, functional):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    quantization._layer_class.cache_clear()
    yield
    quantization._layer_class.cache_clear()


class Layer(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear4bit(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def taken_over() -> Any:
    model = nn.Sequential(Layer(), Linear4bit(3, 2), nn.Linear(2, 2))
    take_over(model)
    return model


def test_every_layer_in_4_bits_is_ours_and_knows_what_recomputes_it() -> None:
    model = taken_over()
    first, second = model[0].inner, model[1]
    for layer in (first, second):
        assert isinstance(layer, FourBits)
        assert isinstance(layer, Linear4bit)
        assert layer.wide_dtype is torch.float32
        assert not layer.support_avx512bf16_for_cpu
        assert torch.equal(layer.wide(), layer.weight)
    assert type(model[2]) is nn.Linear
    assert first._recomputed_in() is model[0]
    assert second._recomputed_in is None
    del first._recomputed_in
    know_checkpoints(model)
    assert first._recomputed_in() is model[0]


def test_what_learns_goes_through_our_product_and_a_copy_is_no_part_of_the_state() -> None:
    model = taken_over()
    rows = torch.randn(5, 4, requires_grad=True)
    out = model[0](rows)
    expected = nn.functional.linear(rows, model[0].inner.weight, model[0].inner.bias)
    torch.testing.assert_close(out, expected)
    (found,) = torch.autograd.grad(out.square().sum(), rows)
    (exact,) = torch.autograd.grad(expected.square().sum(), rows)
    torch.testing.assert_close(found, exact)
    assert model[0].inner.theirs == 0
    assert set(model.state_dict()) == {"0.inner.weight", "0.inner.bias", "1.weight", "1.bias", "2.weight", "2.bias"}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_wide_weight_of_a_layer_that_is_recomputed_is_made_once(
    training: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = taken_over()
    model[0].train(training).gradient_checkpointing = checkpointing
    model[0]._gradient_checkpointing_func = lambda function, *given: function(*given)
    layer = model[0].inner
    made: list[int] = []
    wide = type(layer).wide
    monkeypatch.setattr(type(layer), "wide", lambda self: made.append(1) or wide(self))
    layer(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert len(made) == (1 if training and checkpointing else 2)
    made.clear()
    layer(torch.randn(2, 4))  # nothing in front of it learns
    assert len(made) == 1


@pytest.mark.parametrize(
    ("rows", "grad", "cuda", "narrow", "theirs"),
    [
        (FEW_ROWS, False, True, False, True), (FEW_ROWS + 1, False, True, False, False),
        (1, True, True, False, False), (1, False, False, False, False), (1, False, False, True, True),
        (1, True, False, True, True),
    ],
)  # fmt: skip
def test_few_rows_on_a_gpu_and_other_formats_are_bitsandbytes_own_affair(
    rows: int, grad: bool, cuda: bool, narrow: bool, theirs: bool
) -> None:
    layer = taken_over()[1]

    class Given(torch.Tensor):
        is_cuda = cuda

    given = torch.randn(rows, 3).to(torch.bfloat16 if narrow else torch.float32).as_subclass(Given)
    with torch.set_grad_enabled(grad):
        assert layer(given).shape == (rows, 2)
    assert layer.theirs == theirs
