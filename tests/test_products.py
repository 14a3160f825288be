"""Products of replies: torch's numbers, by oneDNN where that is faster and no gradient is wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune.models.kernels import products, torch_forms
from finetune.models.kernels.products import ReplyingLinear, linear
from finetune.models.load import load_model


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes that went through oneDNN, on any processor."""
    if not products._is_right():
        pytest.skip("this torch has no product of oneDNN's")
    seen: list[torch.Size] = []
    original = products._by_onednn

    def watched(rows: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(rows.shape)
        return original(rows, *rest)

    monkeypatch.setattr(products, "_gains", lambda: True)
    monkeypatch.setattr(products, "_by_onednn", watched)
    monkeypatch.setattr(products, "FEWEST", 1)
    return seen


@pytest.mark.parametrize("rows", [(1,), (4, 1), (2, 3, 5)])
def test_a_layer_that_replies_gives_torchs_numbers(
    rows: tuple[int, ...], calls: list[torch.Size]
) -> None:
    weight, bias = random(70, 48), random(70)
    states = random(*rows, 96)[..., 1::2]  # a view that does not lie in one piece
    with torch.no_grad():
        for one in (None, bias):
            torch.testing.assert_close(linear(states, weight, one), F.linear(states, weight, one))
    assert calls == [states.shape] * 2


def test_what_wants_a_gradient_or_is_narrow_or_small_stays_with_torch(
    calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = ReplyingLinear(8, 8).eval()
    layer(random(2, 8)).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer.train()(random(2, 8))
        linear(random(2, 8).bfloat16(), random(4, 8).bfloat16())
        monkeypatch.setattr(products, "FEWEST", 65)
        layer.eval()(random(2, 8))
        assert not calls
        monkeypatch.setattr(products, "FEWEST", 64)
        layer(random(2, 8))
        assert len(calls) == 1


@pytest.mark.parametrize("broken", ["gone", "wrong"])
def test_an_operator_that_is_gone_or_wrong_is_not_used(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(rows: torch.Tensor, weight: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        if broken == "gone":
            raise AttributeError("_linear_pointwise")
        return rows @ weight.T

    monkeypatch.setattr(products, "_by_onednn", product)
    assert not products._is_right()


def test_every_plain_layer_of_a_loaded_model_multiplies_so(
    calls: list[torch.Size], tiny_glm: Path
) -> None:
    model = load_model(tiny_glm, dtype="float32")
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert plain == []
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(calls) == len(layers)


@pytest.mark.parametrize(("channels", "pairs"), [(8, 4), (10, 2)])
def test_a_rotation_without_gradient_gives_the_same_numbers(channels: int, pairs: int) -> None:
    states = random(2, 7, 3, channels).transpose(1, 2)
    cos, sin = random(2, 1, 7, pairs), random(2, 1, 7, pairs + 1)[..., 1:]
    by_steps = torch_forms.rotate(states, cos, sin)
    with torch.no_grad():
        torch.testing.assert_close(torch_forms.rotate(states, cos, sin), by_steps)
