"""Mixtures of experts: transformers' numbers from our classes, published names on disk, the router left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mixtures
import pytest
import tiny
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper

from finetune import methods
from finetune.artifacts.base_record import BaseRecord
from finetune.artifacts.weights import TensorInfo, model_fingerprint, tensors
from finetune.config.schema import FullMethod, LoraMethod, PTuningV2Method
from finetune.errors import ConfigError, ModelError
from finetune.export.merge import merge
from finetune.methods import full, lora
from finetune.methods.experts_forward import ExpertsLora
from finetune.models.load import load_model
from finetune.models.moe.routing import balances, expert_use


@pytest.fixture(scope="module", params=mixtures.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixtures.save_model(tmp_path_factory.mktemp(family) / "model", family)


def ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 370, (rows, length), generator=torch.Generator().manual_seed(3))


def test_logits_are_those_of_transformers(folder: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0  # padded on the left, as in batches that are decoded
    ours = load_model(folder)
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}):
            wanted = theirs(input_ids=ids(), **given).logits
            assert torch.allclose(ours(input_ids=ids(), **given).logits, wanted, atol=1e-5)
    greedy: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(ids(), **greedy), theirs.generate(ids(), **greedy))


def test_hidden_states_attentions_and_routes_are_handed_out_as_by_transformers(
    folder: Path,
) -> None:
    asked = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        wanted = theirs.eval()(input_ids=ids(), **asked)
        given = load_model(folder, attention="eager")(input_ids=ids(), **asked)
    for name in ("hidden_states", "attentions", "router_logits"):
        assert len(given[name]) == len(wanted[name]) > 1
        for ours, their in zip(given[name], wanted[name], strict=True):
            assert torch.allclose(ours, their, atol=1e-5)


def test_experts_lie_apart_on_disk_as_published(folder: Path) -> None:
    names = tensors(folder)
    for layer in (1, 2, 3):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            assert f"model.layers.{layer}.mlp.experts.3.{leaf}.weight" in names
    assert "model.layers.3.eh_proj.weight" in names
    assert not [name for name in names if name.endswith("gate_up_proj")]


def test_every_way_to_run_the_experts_gives_the_same_logits_and_gradients(folder: Path) -> None:
    model = load_model(folder)
    assert model.config._experts_implementation == "grouped_mm"
    found = {}
    for way in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(way)
        assert model.config._experts_implementation == way
        model.zero_grad()
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        weight = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
        found[way] = weight.grad.clone()
    for gradient in found.values():
        assert torch.allclose(gradient, found["grouped_mm"], atol=1e-6)


def test_full_tuning_trains_everything_but_the_router(folder: Path) -> None:
    model = methods.attach(load_model(folder), FullMethod())
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)}


def test_packed_documents_do_not_see_each_other(folder: Path) -> None:
    model = load_model(folder)
    row = ids(1, 12)
    places = torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        packed = model(input_ids=row, position_ids=places, use_cache=False).logits
        apart = [model(input_ids=part, use_cache=False).logits for part in (row[:, :5], row[:, 5:])]
    assert torch.allclose(packed, torch.cat(apart, 1), atol=1e-5)


def test_a_prefix_works_on_keys_and_values_and_is_refused_on_latents(
    family: str, folder: Path
) -> None:
    section = PTuningV2Method(num_virtual_tokens=4)
    if family == "glm4_moe_lite":
        with pytest.raises(ConfigError, match=r"does not run on glm4_moe_lite: .*MLA.*use lora or"):
            methods.attach(load_model(folder), section)
        return
    text = [5, 6, 7, 8]
    model = methods.attach(load_model(folder), section, start_ids=text).eval()
    whole = torch.cat([torch.tensor([text] * 2), ids()], 1)
    with torch.no_grad():
        wanted = load_model(folder)(input_ids=whole).logits[:, 4:]
        assert torch.allclose(model(input_ids=ids()).logits, wanted, atol=1e-4)


def test_the_bias_of_the_router_stays_float32_when_all_else_is_cast(folder: Path) -> None:
    model = load_model(folder)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before = model.get_buffer(name).clone()
    model.bfloat16()
    assert torch.equal(model.get_buffer(name), before)
    assert model.get_parameter("model.layers.1.mlp.gate.weight").dtype is torch.bfloat16


def test_the_router_scores_in_float32_under_autocast(folder: Path) -> None:
    router = load_model(folder).get_submodule("model.layers.1.mlp.gate")
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    wanted = router(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router(hidden)
    for tensor, same in zip(found, wanted, strict=True):
        assert torch.equal(tensor, same)


def test_choices_of_real_tokens_are_counted_once(folder: Path) -> None:
    model = load_model(folder).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    row = ids(2, 10)
    row[1, 6:] = tiny.PAD_ID
    model(input_ids=row, labels=row, use_cache=False).loss.backward()
    use = expert_use(model)
    assert use is not None
    numbers = torch.tensor(use.read()).view(len(use.layers), -1)
    assert use.layers == (1, 2)
    assert numbers.sum(1).tolist() == [2.0 * 16] * 2  # two experts for each of 10 + 6 tokens
    assert sum(use.read()) == 0
    model.eval()(input_ids=row)
    assert sum(use.read()) == 0


def test_balance_says_how_evenly_experts_are_used() -> None:
    even, one, half = balances([3, 4, 5], [5, 5, 5, 5, 9, 0, 0, 0, 2, 2, 0, 0])
    assert (even.layer, even.largest_share, even.entropy) == (3, 0.25, pytest.approx(1.0))
    assert (one.largest_share, one.entropy) == (1.0, pytest.approx(0.0))
    assert (half.largest_share, half.entropy) == (0.5, pytest.approx(0.5))


def test_four_bits_and_float16_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r"experts, which are fused .* leave model\.quantization out"
    ):
        load_model(folder, quantization="nf4")
    with pytest.raises(ModelError, match=r"not computed in float16.* use model\.dtype: bfloat16"):
        load_model(folder, dtype="float16")
    assert load_model(folder, dtype="bfloat16").dtype is torch.bfloat16


def test_a_config_that_asks_for_more_experts_than_there_are_is_refused(
    family: str, tmp_path: Path
) -> None:
    folder = mixtures.save_model(tmp_path / "model", family)
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8").replace('"n_routed_experts": 4', '"n_routed_experts": 40000')  # fmt: skip
    config.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match="asks for about"):
        load_model(folder)


def test_lora_adapts_attention_shared_experts_and_the_dense_layer(folder: Path) -> None:
    model = methods.attach(load_model(folder), LoraMethod(rank=4))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    inner = {name.removeprefix("base_model.model.model.layers.") for name in adapted}
    assert {"0.mlp.down_proj", "1.mlp.shared_experts.gate_proj", "2.self_attn.o_proj"} <= inner
    assert not [name for name in inner if ".experts" in name or name.endswith(".gate")]


def test_full_tuning_saves_published_names_and_the_layer_ahead_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full, "MAX_SHARD_BYTES", 60_000)
    model = methods.attach(load_model(folder), FullMethod())
    for weight in model.parameters():
        weight.data += 0.01 * weight.requires_grad
    base = BaseRecord(str(folder), None, model_fingerprint(folder))
    methods.save(model, tmp_path, base=base)
    saved, before = tensors(tmp_path), tensors(folder)
    assert saved.keys() == before.keys()
    assert {name: t.shape for name, t in saved.items()} == {n: t.shape for n, t in before.items()}
    for name, tensor in before.items():
        untouched = name.startswith("model.layers.3.") or ".mlp.gate." in name
        assert (bytes_of(saved[name]) == bytes_of(tensor)) is untouched, name
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert {name: tensor.file.name for name, tensor in saved.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.size for tensor in saved.values())
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = methods.attach(load_model(folder), FullMethod())
    methods.restore(again, tmp_path)
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids()).logits
        for other in (stock, again.eval(), load_model(tmp_path)):
            assert torch.allclose(other(input_ids=ids()).logits, wanted, atol=1e-5)


EXPERTS = ["o_proj", "shared_experts.up_proj", "experts"]


@pytest.mark.parametrize("targets", [None, EXPERTS, ["experts.down_proj"]])
def test_an_adapter_opens_here_and_in_plain_peft_and_merges_alike(
    folder: Path, tmp_path: Path, targets: list[str] | None
) -> None:
    section = LoraMethod(rank=4, dropout=0.0 if targets else 0.1, target_modules=targets)
    model: Any = methods.attach(load_model(folder), section).eval()
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.05
    saved = tmp_path / "adapter"
    saved.mkdir()
    base = BaseRecord(str(folder), None, model_fingerprint(folder))
    methods.save(model, saved, base=base)
    with torch.no_grad():
        wanted = model(input_ids=ids()).logits
        untuned = load_model(folder)(input_ids=ids()).logits
    assert not torch.allclose(wanted, untuned, atol=1e-2)
    opened = lora.load_adapter(load_model(folder), saved)
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plain = PeftModel.from_pretrained(stock, saved).eval()
    report = merge(saved, tmp_path / "merged", check="full")
    assert report.largest_difference is not None
    assert report.largest_difference < 1e-5
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        for other in (opened, plain, merged, plain.merge_and_unload()):
            assert torch.allclose(other(input_ids=ids()).logits, wanted, atol=1e-5)
    lora.restore(methods.attach(load_model(folder), section), saved)
    for name, tensor in tensors(folder).items():
        if name.startswith("model.layers.3."):  # predicts ahead: nothing here reads it
            assert bytes_of(tensors(tmp_path / "merged")[name]) == bytes_of(tensor)


@pytest.mark.parametrize("targets", [["experts"], ["experts.down_proj", "o_proj"]])
def test_adapters_of_experts_learn_as_with_peft_and_make_no_weights_anew(
    folder: Path, targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = LoraMethod(rank=4, dropout=0.0, target_modules=targets)
    model = methods.attach(load_model(folder), section)
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.05
    found = {}
    for way in ("ours", "PEFT's"):
        model.zero_grad()
        with monkeypatch.context() as patched:
            if way == "ours":
                patched.delattr(ParamWrapper, "_activate_lora")
            else:
                patched.setattr(ExpertsLora, "_adapters", lambda self: None)
            loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
            loss.backward()
        gradients = {n: w.grad.clone() for n, w in model.named_parameters() if w.requires_grad}
        found[way] = float(loss.detach()), gradients
    assert found["ours"][0] == pytest.approx(found["PEFT's"][0], abs=1e-6)
    for name, gradient in found["ours"][1].items():
        assert torch.allclose(gradient, found["PEFT's"][1][name], atol=1e-6), name


def bytes_of(tensor: TensorInfo) -> bytes:
    return tensor.file.read_bytes()[tensor.start : tensor.end]


def test_routed_experts_want_no_dropout_no_dora_and_no_zero_3(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"method\.dropout is 0\.1, but .* set method\.dropout: 0"
    ):
        methods.attach(load_model(folder), LoraMethod(target_modules=["experts"]))
    with pytest.raises(ConfigError, match=r"method\.use_dora: PEFT opens no DoRA"):
        methods.attach(load_model(folder), LoraMethod(use_dora=True))
    dealt_out = load_model(folder)
    next(dealt_out.parameters()).ds_id = 0
    with pytest.raises(
        ConfigError, match=r"ZeRO-3 has not gathered them; set deepspeed\.zero_stage: 2"
    ):
        methods.attach(dealt_out, LoraMethod(dropout=0.0, target_modules=["experts"]))
    with pytest.raises(ConfigError, match=r"mlp\.experts\.gate_up_proj x 2"):
        methods.attach(load_model(folder), LoraMethod(target_modules=["expert"]))
