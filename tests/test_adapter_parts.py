"""LoRA's own arithmetic, adapters of experts, several adapters in a batch, prefixes and Muon, part by part."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mixtures
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from finetune import methods
from finetune.config.schema import LoraMethod
from finetune.errors import ConfigError
from finetune.methods import experts_forward, lora_experts
from finetune.methods.adapter_rows import AdapterRows, can_share
from finetune.methods.experts_forward import ExpertsLora
from finetune.methods.lora_forward import LoraLinear, LowRank, use_input_format
from finetune.models.kernels.products import one_by_one
from finetune.models.load import load_model

IDS = torch.tensor([[10, 40, 41], [50, 51, 52]])


# --- LoRA on a layer ---------------------------------------------------------------------------------------


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 4)).to(dtype),
        LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["0"]} | options),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    use_input_format(model)
    return model


def is_plain(model: Any, x: torch.Tensor) -> bool:
    layer: Any = model.base_model.model[0]
    assert isinstance(layer, LoraLinear)
    return bool(layer._is_plain(x))


def test_what_is_not_plain_lora_in_its_own_format_is_left_to_peft() -> None:
    x = torch.randn(3, 6)
    assert is_plain(adapted(), x)
    assert not is_plain(adapted(), x.bfloat16())
    assert not is_plain(adapted(), x[0])
    assert is_plain(adapted(torch.bfloat16), x.bfloat16())
    assert not is_plain(adapted(use_dora=True), x)
    assert not is_plain(adapted(lora_bias=True), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain(adapted(), x)
        assert is_plain(adapted(torch.bfloat16), x.bfloat16())
    model = adapted()
    with model.disable_adapter():
        assert not is_plain(model, x)
    model.merge_adapter()
    assert not is_plain(model, x)
    other = adapted()
    other.base_model.model[0].base_layer = nn.Bilinear(6, 6, 4)
    assert not is_plain(other, x)
    named = adapted().base_model.model[0]
    named.lora_B["default"].__class__ = nn.Linear
    assert not named._is_plain(x)
    named.lora_B["default"].__class__ = LowRank
    named.lora_A["default"].__class__ = nn.Linear
    assert not named._is_plain(x)


def test_rows_of_several_adapters_are_pefts_affair() -> None:
    model = adapted().eval()
    x = torch.randn(2, 6)
    with torch.no_grad():
        base = model.base_model.model[0].base_layer(x)
        mixed = model(x, adapter_names=["default", "__base__"])
        torch.testing.assert_close(mixed[1], base[1])
        torch.testing.assert_close(mixed[0], model(x)[0])
    assert (mixed[0] - base[0]).abs().max() > 0.1


def test_a_weight_that_changed_without_a_step_or_is_another_is_cast_anew() -> None:
    low = LowRank(3, 2, bias=False)
    narrow = torch.bfloat16
    with torch.no_grad():
        first = low.cast(narrow).clone()
        low.weight.mul_(2)
        assert torch.equal(low.cast(narrow), 2 * first)
        low.weight.data = low.weight.data * 2  # counts no version
        low.weight = nn.Parameter(low.weight.data)
        assert torch.equal(low.cast(narrow), 4 * first)
    low = LowRank(3, 2, bias=False)
    with torch.inference_mode():
        low.cast(narrow)
    rows = torch.ones(1, 3, dtype=narrow)
    low(rows).sum().backward()
    assert low.weight.grad is not None
    # A frozen one is made wide without a graph.
    low.requires_grad_(False)
    assert not low.cast(narrow).requires_grad
    # One that learns has a graph of its own for each pass of a step and none after it.
    low.requires_grad_(True)
    again = low.cast(narrow)
    assert again.requires_grad
    assert low.cast(narrow) is again
    again.sum().backward()
    assert low._attached is None
    assert low.cast(narrow, 2.0).grad_fn is not again.grad_fn


def test_a_weight_that_is_dealt_out_adds_to_a_copy() -> None:
    low = LowRank(3, 2, bias=False)
    rows, onto = torch.randn(4, 3), torch.randn(4, 2)
    before = onto.clone()
    low.weight.ds_id = 0  # type: ignore[attr-defined]
    with torch.no_grad():
        found = low(rows, onto=onto, scale=3.0)
        assert torch.equal(onto, before)
        del low.weight.ds_id  # type: ignore[attr-defined]
        assert torch.equal(low(rows, onto=onto, scale=3.0), found)
    assert torch.equal(onto, found)
    torch.testing.assert_close(found, before + 3.0 * rows @ low.weight.T)


def test_rows_that_are_to_be_apart_are_multiplied_apart() -> None:
    low, seen = LowRank(3, 2, bias=False), []
    real = nn.functional.linear
    rows, onto = torch.randn(3, 3), torch.randn(3, 2)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch, one_by_one():
        patch.setattr(nn.functional, "linear", lambda x, w: seen.append(len(x)) or real(x, w))
        found = low(rows)
        added = low(rows, onto=onto.clone(), scale=2.0)
    assert seen == [1, 1, 1]
    with torch.no_grad():
        torch.testing.assert_close(found, low(rows))
        torch.testing.assert_close(added, onto + 2.0 * found)


# --- LoRA on experts -----------------------------------------------------------------------------------------


def with_experts(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    section = LoraMethod(**{"rank": 4, "dropout": 0.0, "target_modules": ["experts"]} | options)
    model: Any = methods.attach(load_model(mixtures.save_model(folder, "glm4_moe")), section)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return model


def experts_of(model: Any) -> Any:
    return next(module for module in model.modules() if isinstance(module, ExpertsLora))


def test_adapters_of_experts_are_ours_where_they_are_whole_and_alone(tmp_path: Path) -> None:
    model = with_experts(tmp_path / "model")
    outer = experts_of(model)
    inside = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert [type(m) is ExpertsLora for m in inside] == [True, False] * 2
    found = outer._adapters()
    assert set(found) == {"gate_up_proj", "down_proj"}
    assert {scale for _, _, scale in found.values()} == {outer.scaling["default"]}
    with model.disable_adapter():
        assert outer._adapters() is None
    model.merge_adapter()
    assert outer._adapters() is None
    model.unmerge_adapter()
    assert outer._adapters() is not None
    outer._active_adapter = ["default", "other"]
    assert outer._adapters() is None


def test_what_experts_and_their_adapters_give_is_as_narrow_as_what_came(tmp_path: Path) -> None:
    outer = experts_of(with_experts(tmp_path / "model", rank=8).bfloat16())
    assert outer._adapters() is not None
    chosen, weights = torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.full((3, 2), 0.5)
    with torch.no_grad():
        assert outer(torch.randn(3, 32).bfloat16(), chosen, weights).dtype is torch.bfloat16


@pytest.mark.parametrize(("rank", "ours"), [(4, True), (8, True), (2, False), (3, False)])
def test_ranks_whose_rows_are_not_whole_sixteens_of_bytes_are_pefts(rank: int, ours: bool, tmp_path: Path) -> None:  # fmt: skip
    assert (experts_of(with_experts(tmp_path / "model", rank=rank))._adapters() is not None) is ours


def test_experts_of_another_form_stay_pefts() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))

    model = nn.Module()
    model.experts = Experts()
    tuned = get_peft_model(model, LoraConfig(r=4, target_parameters=["experts.down_proj"], target_modules=[]))  # type: ignore[arg-type]  # fmt: skip
    experts_forward.use_in(tuned)
    assert any(type(m) is ParamWrapper for m in tuned.modules())


def test_adapters_of_experts_compute_in_the_models_format_and_add_as_pefts(tmp_path: Path) -> None:
    model = with_experts(tmp_path / "model")
    with torch.no_grad():
        ours = model(input_ids=IDS).logits
        with model.disable_adapter():
            base = model(input_ids=IDS).logits
        for module in model.modules():
            if isinstance(module, ExpertsLora):
                module.__class__ = ParamWrapper
        torch.testing.assert_close(model(input_ids=IDS).logits, ours, atol=1e-5, rtol=1e-4)
    assert (ours - base).abs().max() > 1e-3
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, ours, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "parameters", "modules", "apart", "said"),
    [
        ({}, [], ["q_proj"], True, None), ({"dropout": 0.1}, [], ["up_proj"], False, None),
        ({"use_dora": True}, [], ["q_proj"], False, None),
        ({}, ["experts.down_proj"], [], True, "ZeRO-3"), ({"dropout": 0.1}, ["experts.down_proj"], [], False, "method.dropout is 0.1"),
        ({"use_dora": True}, ["experts.down_proj"], [], False, "use_dora"),
        *(({"use_dora": True}, [], [f"x.{leaf}"], False, "use_dora") for leaf in ("gate_proj", "up_proj", "down_proj")),
    ],
)  # fmt: skip
def test_each_option_that_peft_has_no_form_for_is_refused_where_it_has_none(
    options: Any, parameters: list[str], modules: list[str], apart: bool, said: str | None
) -> None:
    section = LoraMethod(**{"dropout": 0.0} | options)
    if said is None:
        lora_experts.check_options(section, parameters, modules, apart=apart)
        return
    with pytest.raises(ConfigError, match=said):
        lora_experts.check_options(section, parameters, modules, apart=apart)


def test_experts_are_asked_for_by_their_own_name_only() -> None:
    names = ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    cases: list[tuple[str, bool, list[str]]] = [
        ("experts", False, names), ("mlp.experts", False, names), ("experts.down_proj", False, names[1:]),
        ("down_proj", False, []), ("shared_experts", False, []), ("shared_experts.down_proj", False, []),
        (r".*\.experts", True, names), (r".*experts\.down.*", True, names[1:]), (r".*\.down_proj", True, []),
        (names[0], False, names[:1]), ("perts", False, []),
    ]  # fmt: skip
    for pattern, regex, found in cases:
        assert lora_experts.asked_for(pattern, names, regex=regex) == found, pattern
    assert lora_experts.expert_parameters(nn.Linear(1, 1), None) == []


def test_layers_of_a_mixture_stand_in_the_file_as_peft_reads_them(tmp_path: Path) -> None:
    model = with_experts(tmp_path / "model", target_modules=["experts", "o_proj", "shared_experts.down_proj"])  # fmt: skip
    config = copy.deepcopy(model.peft_config["default"])
    config.exclude_modules = ["x"]
    lora_experts.as_peft_reads_it(model, config)
    layers = "model.layers.{}."
    assert config.target_modules == [layers.format(n) + "self_attn.o_proj" for n in (0, 1, 2)]
    own = [f"{layers.format(n)}mlp.{part}" for n in (1, 2) for part in ("experts.down_proj", "experts.gate_up_proj", "shared_experts.down_proj.weight")]  # fmt: skip
    assert config.target_parameters == own
    assert config.exclude_modules is None


# --- adapters side by side ---------------------------------------------------------------------------------


def test_what_is_not_plain_lora_has_a_batch_of_its_own(tiny_glm: Path) -> None:
    def tuned() -> Any:
        model = methods.attach(load_model(tiny_glm), LoraMethod(rank=2, target_modules=["q_proj"]))
        return model, next(m for m in model.modules() if isinstance(m, LoraLinear))

    assert can_share(tuned()[0])
    for change in (
        lambda layer: setattr(layer, "lora_variant", {"default": 1}),
        lambda layer: setattr(layer.lora_A["default"], "__class__", nn.Linear),
        lambda layer: setattr(layer.lora_B["default"], "__class__", nn.Linear),
        lambda layer: setattr(layer, "merged_adapters", ["default"]),
        lambda layer: setattr(layer, "base_layer", nn.Embedding(2, 2)),
        lambda layer: setattr(layer, "__class__", type("Other", (LoraLinear,), {})),
    ):
        model, layer = tuned()
        change(layer)
        assert not can_share(model)


def test_a_base_in_4_bits_is_not_shared(tiny_glm: Path) -> None:
    from finetune.models.quantization import FourBits

    class Narrow(FourBits, nn.Linear):
        pass

    model = methods.attach(load_model(tiny_glm), LoraMethod(rank=2, target_modules=["q_proj"]))
    next(m for m in model.modules() if isinstance(m, LoraLinear)).base_layer.__class__ = Narrow
    assert not can_share(model)


def test_adapters_have_their_own_scale_and_layers_and_the_base_its_own_things(tiny_glm: Path) -> None:  # fmt: skip
    base = load_model(tiny_glm)
    with torch.no_grad():
        rows = AdapterRows(base)
        assert rows.config is base.config
        plain = rows(input_ids=IDS).logits
        alone = {}
        for name, targets, alpha in (("a", ["q_proj"], 2.0), ("b", ["down_proj", "o_proj"], 12.0)):
            model: Any = methods.attach(load_model(tiny_glm), LoraMethod(rank=2, alpha=alpha, target_modules=targets)).eval()  # fmt: skip
            for weight_name, weight in model.named_parameters():
                if "lora_B" in weight_name:
                    nn.init.normal_(weight, std=0.3)
            rows.put(name, model)
            alone[name] = model(input_ids=IDS).logits
        for names in (["a", "b"], ["b", "a"], ["b", "b"], ["unknown", "a"]):
            rows.choose(names)
            found = rows(input_ids=IDS).logits
            expected = torch.stack([alone.get(name, plain)[row] for row, name in enumerate(names)])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        rows.drop("a")
        rows.choose(["b", "a"])
        assert torch.equal(rows(input_ids=IDS).logits[1], plain[1])
