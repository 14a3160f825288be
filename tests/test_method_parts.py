"""Small parts of the methods, each alone: files beside, names, casts, experts, shards, prefixes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import transformers_weight_conversion as conversion
from safetensors.torch import load_file
from torch import nn

from finetune import methods
from finetune.artifacts.base_record import BaseRecord
from finetune.config.schema import FullMethod, LoraMethod, PTuningV2Method
from finetune.errors import ConfigError, ModelError
from finetune.methods import carried, freezing, full, lora, lora_experts
from finetune.methods.adapter_rows import AdapterRows, can_share
from finetune.methods.lora_forward import LowRank
from finetune.methods.optimizers import matrices
from finetune.models.load import load_model

# --- the files beside what was trained -----------------------------------------------------------------

WITH_ADAPTER = {
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "vocab.json",
    "merges.txt",
}  # fmt: skip
WITH_MODEL = WITH_ADAPTER | {
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "modeling_chatglm.py",
}  # fmt: skip


def test_a_model_gets_all_that_opens_it_and_an_adapter_its_tokenizer(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in {*WITH_MODEL, "config.json", "model.safetensors", "README.md", "optimizer.pt"}:
        (base / name).write_text(name)
    record = BaseRecord(str(base), None, "x")
    for carry, names in ((carried.carry_model_files, WITH_MODEL), (carried.carry_tokenizer, WITH_ADAPTER)):  # fmt: skip
        folder = tmp_path / carry.__name__
        folder.mkdir()
        carry(record, folder)
        assert {path.name for path in folder.iterdir()} == names
        assert all(path.read_text() == path.name for path in folder.iterdir())


def test_a_base_that_has_gone_costs_an_adapter_its_tokenizer_and_a_model_the_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = BaseRecord(str(tmp_path / "gone"), None, "x")
    carried.carry_tokenizer(record, tmp_path)
    assert "no tokenizer lies beside the adapter" in capsys.readouterr().err
    with pytest.raises(ModelError):
        carried.carry_model_files(record, tmp_path)


@pytest.mark.parametrize(
    "method", [LoraMethod(rank=2), PTuningV2Method(num_virtual_tokens=2)], ids=["lora", "prefix"]
)
def test_an_adapter_says_which_commit_of_its_base_it_belongs_to_and_opens_for_use(
    method: Any, tiny_glm: Path, tmp_path: Path
) -> None:
    model = methods.attach(load_model(tiny_glm), method)
    methods.save(model, tmp_path, base=BaseRecord(str(tiny_glm), "a1b2", "x"))
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["revision"], said["inference_mode"]) == ("a1b2", True)
    assert (tmp_path / "tokenizer.json").is_file()
    assert "a1b2" in (tmp_path / "finetune.json").read_text()


# --- names ---------------------------------------------------------------------------------------------

NAMES = ["model.visual.blocks.0.w", "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gate_proj.weight", "lm_head.weight"]  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "vision", "frozen"),
    [
        ([], None, []),
        (["layers"], None, NAMES[1:3]),
        (["^lm_head"], None, NAMES[3:]),
        (["vision"], "visual", NAMES[:1]),
        (["gate_proj", "vision"], "visual", [NAMES[0], NAMES[2]]),
    ],
)
def test_a_pattern_is_found_anywhere_in_a_name_and_vision_is_that_of_the_family(
    patterns: list[str], vision: str | None, frozen: list[str]
) -> None:
    assert freezing.frozen_names(NAMES, patterns, vision=vision) == set(frozen)


def test_every_pattern_that_freezes_nothing_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        freezing.frozen_names(iter(NAMES), ["(", "vision", "layers", "tower"])
    lines = str(caught.value).splitlines()
    assert [line.split(" is ")[0] for line in lines] == [
        "model.freeze: '('", "model.freeze: 'vision'", "model.freeze: 'tower'",
    ]  # fmt: skip
    assert "model.layers.*.mlp.gate.weight" in lines[1]
    many = [f"part{number}.weight" for number in range(1000)]
    with pytest.raises(ConfigError) as caught:
        freezing.frozen_names(many, ["tower"])
    assert 400 < len(str(caught.value)) < 500


def test_routers_are_told_from_gates_of_an_mlp() -> None:
    router = r"model\.layers\.\d+\.mlp\.gate"
    assert freezing.routers(NAMES, router) == {"model.layers.0.mlp.gate.weight"}
    assert freezing.routers(NAMES, None) == set()


def test_lora_plus_raises_b_of_layers_and_of_tables() -> None:
    scale: Any = methods.rate_scale(LoraMethod(lora_plus_ratio=8))
    names = ("x.lora_B.default.weight", "x.lora_embedding_B.default", "x.lora_A.default.weight", "x.lora_embedding_A.default")  # fmt: skip
    assert [scale(name) for name in names] == [8, 8, 1, 1]
    assert methods.rate_scale(LoraMethod()) is None
    assert methods.rate_scale(FullMethod()) is None


def test_parts_and_names_of_layers_may_stand_in_one_list() -> None:
    import re

    from finetune.models.families import FAMILIES

    glm4v = FAMILIES["glm4v"]
    regex: Any = lora._without_parts(["vision", "lm_head"], glm4v)
    for name in ("lm_head", "model.lm_head", "model.visual.blocks.3.attn.qkv"):
        assert re.fullmatch(regex, name), name
    for name in ("my_lm_head", "model.language_model.layers.0.self_attn.q_proj"):
        assert not re.fullmatch(regex, name), name
    assert lora._without_parts(["q_proj"], glm4v) == ["q_proj"]
    assert lora._without_parts(None, glm4v) is None
    with pytest.raises(ConfigError, match="no vision encoder"):
        lora._without_parts(["vision"], FAMILIES["glm"])


def test_frozen_layers_get_no_adapter_and_others_do(tiny_glm: Path) -> None:
    model = methods.attach(
        load_model(tiny_glm), LoraMethod(rank=2, target_modules=["q_proj", "o_proj"]),
        freeze=[r"layers\.0\.self_attn\.q_proj"],
    )  # fmt: skip
    found = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in model.named_parameters() if "lora_A" in name}  # fmt: skip
    assert found == {
        "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
    }  # fmt: skip


# --- adapters that are opened --------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_glm: Path, tmp_path: Path) -> Path:
    model = methods.attach(load_model(tiny_glm), LoraMethod(rank=2, dropout=0.5))
    folder = tmp_path / "adapter"
    folder.mkdir()
    methods.save(model, folder, base=BaseRecord(str(tiny_glm), None, "another's"))
    return folder


def test_an_adapter_opens_for_replies_and_on_another_base_only_by_force(
    tiny_glm: Path, saved: Path
) -> None:
    with pytest.raises(ModelError, match="was trained on"):
        lora.load_adapter(load_model(tiny_glm), saved)
    opened = lora.load_adapter(load_model(tiny_glm), saved, force=True)
    assert not any(module.training for module in opened.modules())


@pytest.mark.parametrize("place", [0, 1])
def test_one_number_of_an_adapter_that_is_not_finite_is_found(
    place: int, tiny_glm: Path, saved: Path
) -> None:
    from safetensors.torch import save_file

    weights = load_file(saved / "adapter_model.safetensors")
    name = sorted(weights)[place]
    weights[name].view(-1)[-1] = float("nan")
    save_file(weights, saved / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=f"{name} holds numbers that are not finite .1 of "):
        lora.load_adapter(load_model(tiny_glm), saved, force=True)


def test_a_lack_of_memory_is_not_taken_for_a_bad_adapter(
    tiny_glm: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lora, "PeftModelForCausalLM", full_memory)
    with pytest.raises(torch.OutOfMemoryError):
        lora.load_adapter(load_model(tiny_glm), saved, force=True)
    monkeypatch.setattr(lora, "PeftModelForCausalLM", lambda *_, **__: 1 / 0)
    with pytest.raises(ModelError, match=r"cannot be used .ZeroDivisionError"):
        lora.load_adapter(load_model(tiny_glm), saved, force=True)


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({}, True),
        ({"use_dora": True}, False),
        ({"use_rslora": True}, True),
        ({"merged": True}, False),
        ({"plain": True}, False),
        ({"beside": True}, False),
    ],
)
def test_only_plain_lora_shares_a_batch(
    change: dict[str, Any], shared: bool, tiny_glm: Path
) -> None:
    if change == {"plain": True}:
        assert not can_share(load_model(tiny_glm))
        return
    if change == {"beside": True}:  # another layer of its own
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"])
        assert not can_share(get_peft_model(load_model(tiny_glm), config))
        return
    merged = change.pop("merged", False)
    model = methods.attach(load_model(tiny_glm), LoraMethod(rank=2, **change))
    if merged:
        model.merge_adapter()
    assert can_share(model) is shared


def test_each_row_of_a_batch_has_what_its_own_adapter_adds(tiny_glm: Path) -> None:
    ids = torch.tensor([[10, 40, 41], [50, 51, 52], [60, 61, 62], [10, 11, 12]])
    adapters, alone = {}, {}
    with torch.no_grad():
        for seed, name in enumerate(("a", "b")):
            torch.manual_seed(seed)
            adapters[name] = methods.attach(load_model(tiny_glm), LoraMethod(rank=2)).eval()
            for weight_name, weight in adapters[name].named_parameters():
                if "lora_B" in weight_name:
                    weight.normal_(std=0.5)
            alone[name] = adapters[name](input_ids=ids).logits
        base = load_model(tiny_glm)
        alone["base"] = base(input_ids=ids).logits
        rows = AdapterRows(base)
        for name, adapted in adapters.items():
            rows.put(name, adapted)
        for names in (["a", "base", "b", "a"], ["a"] * 4, ["base"] * 4, ["b", "a", "a", "b"]):
            rows.choose(names)
            found = rows(input_ids=ids).logits
            expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert (alone["a"] - alone["base"]).abs().max() > 0.1
        rows.drop("a")
        rows.choose(["a", "b", "b", "b"])
        found = rows(input_ids=ids).logits
        torch.testing.assert_close(found[0], alone["base"][0], atol=1e-4, rtol=1e-4)


def test_dropout_of_layers_that_stand_as_parameters_is_not_what_peft_would_refuse(
    tmp_path: Path,
) -> None:
    folder = tiny.save_model(tmp_path / "model", "glm4_moe")
    for targets, dropout in ((["q_proj", "up_proj"], 0.0), (["q_proj"], 0.5)):
        section = LoraMethod(rank=2, dropout=0.5, target_modules=targets)
        model = methods.attach(load_model(folder), section)
        place = tmp_path / "-".join(targets)
        place.mkdir()
        methods.save(model, place, base=BaseRecord(str(folder), None, "x"))
        said = json.loads((place / "adapter_config.json").read_text())
        assert said["lora_dropout"] == dropout
        assert bool(said["target_parameters"]) is (len(targets) == 2)


def test_peft_takes_names_as_it_does_after_ours_were_told(tiny_glm: Path) -> None:
    theirs = conversion.convert_peft_config_for_transformers

    def failing() -> None:
        with lora_experts.targets_as_named():
            assert conversion.convert_peft_config_for_transformers is not theirs
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        failing()
    assert conversion.convert_peft_config_for_transformers is theirs


def test_layers_among_parameters_are_adapted_as_layers_again() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.q_proj = nn.Linear(2, 2), nn.Linear(2, 2)

    config: Any = SimpleNamespace(
        target_modules=["q_proj"], target_parameters=["up_proj.weight", "experts.down_proj"]
    )
    lora_experts.as_layers(Model(), config)
    assert config.target_modules == ["q_proj", "up_proj"]
    assert config.target_parameters == ["experts.down_proj"]
    config.target_parameters = ["up_proj.weight"]
    config.target_modules = "q_.*"
    lora_experts.as_layers(Model(), config)
    assert (config.target_modules, config.target_parameters) == (["q_proj", "up_proj"], None)


# --- A and B in another format -------------------------------------------------------------------------


def low_rank() -> LowRank:
    layer = nn.Linear(3, 2, bias=False)
    layer.__class__ = LowRank
    return layer  # type: ignore[return-value]


def test_each_scale_and_format_has_a_cast_of_its_own() -> None:
    layer = low_rank()
    wide = layer.weight.detach()
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):
            for scale in (2.0, 0.5, 1.0):
                assert torch.equal(layer.cast(dtype, scale), (wide * scale).to(dtype))
    assert layer.cast(torch.float32) is layer.weight


def test_a_cast_is_kept_between_passes_and_gone_with_the_mode_and_in_a_copy() -> None:
    import copy

    layer = low_rank()
    layer(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    assert layer.kept is not None
    assert torch.equal(layer.weight.grad, torch.ones(2, 3))  # type: ignore[arg-type]
    assert copy.deepcopy(layer).kept is None
    assert layer.eval().kept is None
    layer.cast(torch.bfloat16, 3.0).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((2, 3), 4.0))  # type: ignore[arg-type]


# --- what Muon updates --------------------------------------------------------------------------------


def test_tables_and_the_head_are_no_matrices_of_muons_under_any_wrapper() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(4, 2), nn.Linear(2, 2), nn.Linear(2, 4)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Model()
    assert matrices(model) == {"inner.weight"}
    wrapped = nn.Module()
    wrapped.model = model
    wrapped.get_base_model = lambda: model  # type: ignore[assignment]
    assert matrices(wrapped) == {"model.inner.weight"}


def test_a_weight_that_is_apart_counts_with_all_of_its_numbers() -> None:
    weight = nn.Parameter(torch.zeros(0, dtype=torch.bfloat16))
    assert full._num_bytes(weight) == 0
    weight.ds_numel = 12
    assert full._num_bytes(weight) == 24
