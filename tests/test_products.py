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
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(random(2, 8)).dtype is torch.bfloat16
        assert len(calls) == 1


@pytest.mark.parametrize("broken", ["gone", "wrong"])
def test_an_operator_that_is_gone_or_wrong_is_not_used(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(rows: torch.Tensor, weight: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        if broken == "gone":
            raise AttributeError("_linear_pointwise")
        return rows @ weight.to_dense().T

    monkeypatch.setattr(products, "_by_onednn", product)
    assert not products._is_right()


@pytest.mark.parametrize(("width", "out"), [(1600, 70), (96, 70), (1600, 6)])
def test_a_packed_layer_gives_a_row_the_same_bits_alone_and_beside_others(
    width: int, out: int, calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "FEWEST_PACKED", 1)
    layer, rows = ReplyingLinear(width, out).eval(), random(9, 1, width)
    with torch.no_grad(), products.packed(layer):
        calls.clear()
        whole = layer(rows)
        for first, last in ((0, 1), (1, 3), (2, 6), (0, 8)):
            assert torch.equal(layer(rows[first:last]), whole[first:last])
        assert layer(rows[0]).shape == (1, out)
        assert layer(rows[0, 0]).shape == (out,)
        torch.testing.assert_close(whole, F.linear(rows, layer.weight, layer.bias))
    is_added_otherwise = products._in_pairs[out, width, torch.get_num_threads()]
    assert ((2, width) in calls) == is_added_otherwise  # a row alone is then multiplied as two


def test_weights_are_packed_while_replies_are_written_and_no_longer(
    calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "FEWEST_PACKED", 1)
    layer, rows = ReplyingLinear(8, 8).eval(), random(2, 8)
    with torch.no_grad():
        before = layer(rows)
        with products.packed(layer), products.packed(layer):
            assert [pack.weight for pack in products._packs.values()] == [layer.weight]
        assert not products._packs
        with pytest.raises(ZeroDivisionError), products.packed(layer):
            raise ZeroDivisionError
        layer.weight += 1
        with products.packed(layer):
            assert not torch.equal(layer(rows), before)
        torch.testing.assert_close(layer(rows), F.linear(rows, layer.weight, layer.bias))


def test_a_model_of_more_than_a_quarter_of_the_free_memory_is_not_packed(
    calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "FEWEST_PACKED", 1)
    layer = ReplyingLinear(8, 8)
    for free, number in ((4 * 8 * 8 * 4, 1), (4 * 8 * 8 * 4 - 1, 0)):
        monkeypatch.setattr(products, "free_bytes", lambda free=free: free)
        with products.packed(layer):
            assert len(products._packs) == number
    monkeypatch.setattr(products, "free_bytes", lambda: 1 << 40)
    for other in (ReplyingLinear(8, 8).bfloat16(), nn.Linear(8, 8)):
        with products.packed(other):
            assert not products._packs


def test_products_one_by_one_give_each_row_its_own_bits(
    calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, rows = random(70, 96), random(1, 5, 96)
    with torch.no_grad():
        for fewest in (1, 10**9):
            monkeypatch.setattr(products, "FEWEST", fewest)
            alone = torch.cat([linear(row, weight) for row in rows.split(1, dim=1)], dim=1)
            with products.one_by_one():
                assert torch.equal(linear(rows, weight), alone)
    assert calls == [(1, 1, 96)] * 10


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
