"""LoRA's forward pass is ours: the numbers of PEFT's, in the model's format, cast once a step."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from finetune.config.schema import LoraMethod
from finetune.methods.lora_forward import LoraLinear, LowRank, use_input_format
from finetune.planning.counting import counting, shapes_only
from finetune.planning.roofline import Ceilings
from finetune.planning.step import Shape, count_step
from finetune.planning.subjects import own


class Two(nn.Module):
    """A linear layer with a bias, a nonlinearity, one without."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40)
        self.second = nn.Linear(40, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(*, ours: bool, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Both layers with an adapter that is not zero."""
    torch.manual_seed(0)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"]} | options
    )
    model = get_peft_model(Two().to(dtype), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # its bias too, where it has one
            nn.init.normal_(weight, std=0.3)
    if ours:
        use_input_format(model)
    return model.train()


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def outcome(model: Any, given: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(7)  # of dropout
    out = model(given)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return out.detach(), list(torch.autograd.grad(out.float().square().sum(), weights))


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"lora_dropout": 0.3}, {"use_rslora": True}, {"use_dora": True}),
        {"lora_bias": True, "target_modules": ["first"]},
    ],
    ids=str,
)
def test_output_and_gradients_are_pefts(options: dict[str, Any]) -> None:
    ours, theirs = adapted(ours=True, **options), adapted(ours=False, **options)
    (found, gradients), (expected, their_gradients) = outcome(ours, x()), outcome(theirs, x())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_in_bfloat16_it_stays_within_a_percent_of_float64() -> None:
    ours = adapted(ours=True, dtype=torch.bfloat16)
    found, gradients = outcome(ours, x(torch.bfloat16))
    expected, exact = outcome(adapted(ours=False, dtype=torch.bfloat16).double(), x(torch.bfloat16).double())  # fmt: skip
    assert found.dtype is torch.bfloat16
    assert all(gradient.dtype is torch.float32 for gradient in gradients)
    assert float((found - expected).norm() / expected.norm()) < 1e-2
    for one, other in zip(gradients, exact, strict=True):
        assert float((one - other).norm() / other.norm()) < 2e-2


def test_two_active_adapters_add_up_as_pefts_do() -> None:
    found = []
    for ours in (True, False):
        model = adapted(ours=False)
        torch.manual_seed(3)
        model.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules=["first"], init_lora_weights=False))  # fmt: skip
        model.base_model.set_adapter(["default", "other"])
        if ours:
            use_input_format(model)
        found.append(model(x()))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_merged_and_disabled_adapters_are_pefts_affair() -> None:
    model = adapted(ours=True).eval()
    with torch.no_grad():
        tuned = model(x())
        model.merge_adapter()
        torch.testing.assert_close(model(x()), tuned, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert float((model(x()) - tuned).abs().max()) > 0.1


def test_evaluation_gives_the_bits_of_training() -> None:
    model = adapted(ours=True, dtype=torch.bfloat16)
    trained = model(x(torch.bfloat16))
    with torch.inference_mode():
        assert torch.equal(model.eval()(x(torch.bfloat16)), trained)


def test_weights_are_cast_once_a_step_and_anew_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(ours=True, dtype=torch.bfloat16)
    casts = []
    multiply = torch.mul

    def counted(*given: Any, **options: Any) -> Tensor:
        casts.extend(["cast"] if given[0].dtype is torch.float32 else [])
        return multiply(*given, **options)

    monkeypatch.setattr(torch, "mul", counted)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.5, fused=True)
    for _ in range(2):  # two passes of a step
        model(x(torch.bfloat16)).sum().backward()
    assert len(casts) == 4
    before = model(x(torch.bfloat16))
    assert len(casts) == 4
    optimizer.step()
    assert not torch.equal(model(x(torch.bfloat16)), before)
    assert len(casts) == 8


def test_two_passes_add_up_their_gradients() -> None:
    found = []
    for passes in (1, 2):
        model = adapted(ours=True)
        for part in x().chunk(passes):
            model(part).square().sum().backward()
        found.append([weight.grad for weight in model.parameters() if weight.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_after_a_backward_pass_nothing_holds_the_graph() -> None:
    model = adapted(ours=True, dtype=torch.bfloat16)
    layer = model.base_model.model.first.lora_B["default"]
    hooked = weakref.WeakSet[Any]()

    class Holder:
        def see(self, grad: Tensor) -> None:
            return None

    holder = Holder()
    hooked.add(holder)
    layer.weight.register_hook(holder.see)  # as DeepSpeed's hooks hold its engine
    holder.model = model  # type: ignore[attr-defined]
    model(x(torch.bfloat16)).sum().backward()
    del holder, model, layer
    gc.collect()
    assert not hooked


def test_weights_that_were_loaded_count_at_once() -> None:
    model = adapted(ours=True, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        before = model(x(torch.bfloat16))
        state = {
            name: 2 * weight for name, weight in model.state_dict().items() if "lora_B" in name
        }
        model.load_state_dict(state, strict=False)
        assert not torch.equal(model(x(torch.bfloat16)), before)


def test_a_model_that_has_run_can_be_copied() -> None:
    model = adapted(ours=True, dtype=torch.bfloat16)
    expected = model(x(torch.bfloat16))
    assert torch.equal(copy.deepcopy(model)(x(torch.bfloat16)), expected)


def test_state_and_types_stay_pefts() -> None:
    ours, theirs = adapted(ours=True), adapted(ours=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    layer = ours.base_model.model.first
    assert isinstance(layer, LoraLinear)
    assert isinstance(layer, type(theirs.base_model.model.first))
    assert isinstance(layer.lora_A["default"], LowRank)


def test_no_product_of_a_bfloat16_model_is_float32(tmp_path: Path) -> None:
    sizes = {
        "model_type": "chatglm", "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96,
        "num_attention_heads": 4, "kv_channels": 16, "multi_query_attention": True,
        "multi_query_group_num": 2, "padded_vocab_size": 256, "add_qkv_bias": True,
        "add_bias_linear": False, "rmsnorm": True, "layernorm_epsilon": 1e-6, "seq_length": 1024,
        "rope_ratio": 1, "original_rope": True, "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    cost = count_step(own(tmp_path, LoraMethod(), checkpointing=True), Shape(1, 64))
    assert cost.flops["float32"] == 0


def test_the_sum_makes_no_second_output() -> None:
    with shapes_only():
        layer = nn.Linear(64, 4096, bias=False)
        low = LowRank(8, 4096, bias=False)
        rows, few = torch.empty(32, 64), torch.empty(32, 8)
        with counting(Ceilings()) as counter, torch.no_grad():
            low(few, onto=layer(rows))
    outputs = [size for _, size, _ in counter.ledger.events if size == 32 * 4096 * 4]
    assert len(outputs) == 1
