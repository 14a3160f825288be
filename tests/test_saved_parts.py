"""What methods write and put back: bytes, shards, names, records; and which method made an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mixtures
import pytest
import tiny
import torch
from peft import PeftType
from safetensors.torch import load_file, save, save_file
from torch import nn

from finetune import methods
from finetune.artifacts.base_record import BaseRecord
from finetune.config.schema import FullMethod, LoraMethod, PTuningV2Method
from finetune.errors import ConfigError, ModelError
from finetune.methods import carried, full, full_experts, lora, ptuning_v2
from finetune.methods.tensor_file import DTYPES, save_tensors
from finetune.models.load import load_model

SECTIONS: dict[str, Any] = {
    "lora": LoraMethod(rank=2), "ptuning_v2": PTuningV2Method(num_virtual_tokens=2), "full": FullMethod(),
}  # fmt: skip


def record(folder: Path, revision: str | None = None) -> BaseRecord:
    return BaseRecord(str(folder), revision, "x")


# --- bytes -----------------------------------------------------------------------------------------------


def test_tensors_of_every_format_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    tensors = {f"{number}-{dtype}": torch.arange(3).to(dtype) for number, dtype in enumerate(DTYPES)}  # fmt: skip
    for length in range(8):  # headers of every length, to whole eights
        save_tensors(tensors | {"x" * length or "y": torch.ones(1)}, tmp_path / "ours")
        expected = save(tensors | {"x" * length or "y": torch.ones(1)}, metadata={"format": "pt"})
        assert (tmp_path / "ours").read_bytes() == expected


# --- shards and names ------------------------------------------------------------------------------------


def test_a_shard_may_be_just_as_large_as_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
    for weight in model.parameters():  # as ZeRO-3 leaves it
        weight.data, weight.ds_numel = torch.zeros(0), 4
    for most, number in ((32, 2), (31, 4), (8, 4), (64, 1), (48, 2)):  # of 16 bytes each
        monkeypatch.setattr(full, "MAX_SHARD_BYTES", most)
        shards = full._shards(model)
        assert len(shards) == number
        assert [name for shard in shards for name in shard] == list(model.state_dict())
        assert all(shards)


def test_a_model_of_one_shard_has_no_index_and_of_more_a_number_of_each(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = methods.attach(load_model(tiny_glm), FullMethod())
    for place, most in (("one", 10**9), ("more", 60_000)):
        monkeypatch.setattr(full, "MAX_SHARD_BYTES", most)
        (tmp_path / place).mkdir()
        methods.save(model, tmp_path / place, base=record(tiny_glm))
    assert [path.name for path in (tmp_path / "one").glob("model*")] == ["model.safetensors"]
    files = sorted(path.name for path in (tmp_path / "more").glob("model-*"))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]  # fmt: skip
    assert full.MAX_SHARD_BYTES < 10**9


def test_shards_of_a_checkpoint_are_of_five_gigabytes() -> None:
    import importlib

    assert importlib.import_module("finetune.methods.full").MAX_SHARD_BYTES == 5 * 10**9


@pytest.mark.parametrize("kind", SECTIONS)
def test_the_record_names_the_method_and_the_commit_of_the_base(
    kind: str, tiny_glm: Path, tmp_path: Path
) -> None:
    model = methods.attach(load_model(tiny_glm), SECTIONS[kind])
    methods.save(model, tmp_path, base=record(tiny_glm, "a1b2"))
    said = json.loads((tmp_path / "finetune.json").read_text())
    assert said["method"] == kind
    assert said["base"] == {"path": str(tiny_glm), "revision": "a1b2", "fingerprint": "x"}
    assert (tmp_path / "tokenizer.json").is_file()
    assert (tmp_path / "generation_config.json").is_file() is (kind == "full")


@pytest.mark.parametrize("kind", ["lora", "ptuning_v2"])
def test_a_base_from_a_hub_is_named_as_peft_looks_it_up(kind: str, tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(carried, "carry_tokenizer", lambda *_: None)
    model = methods.attach(load_model(tiny_glm), SECTIONS[kind])
    methods.save(model, tmp_path, base=BaseRecord("hf://owner/name", None, "x"))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/name"  # fmt: skip


@pytest.mark.parametrize("kind", SECTIONS)
def test_what_is_attached_is_told_and_its_weights_are_those_that_are_saved(
    kind: str, tiny_glm: Path, tmp_path: Path
) -> None:
    model: Any = methods.attach(load_model(tiny_glm), SECTIONS[kind])
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    asked: list[str] = []

    def gather(names: Any) -> dict[str, Any]:
        asked.extend(names)
        return full.own_weights(model)(names)

    assert methods._attached(model).kind == kind
    methods.save(model, tmp_path, base=record(tiny_glm), gather=gather)
    assert set(asked) == set(methods.saved_names(model))
    assert trained == set(asked)
    weights = full.own_weights(model)(asked)
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_what_is_trained_of_a_whole_model_is_counted(tiny_glm: Path) -> None:
    whole = methods.attach(load_model(tiny_glm), FullMethod())
    number = len(list(whole.parameters()))
    assert methods.trained_modules(whole) == {"every weight": number}
    part = methods.attach(load_model(tiny_glm), FullMethod(), freeze=["layers"])
    assert methods.trained_modules(part) == {"weights": 3, "frozen weights": number - 3}


# --- put back --------------------------------------------------------------------------------------------


def test_a_checkpoint_that_lacks_weights_is_not_resumed(tiny_glm: Path, tmp_path: Path) -> None:
    model = methods.attach(load_model(tiny_glm), FullMethod())
    methods.save(model, tmp_path, base=record(tiny_glm))
    held = load_file(tmp_path / "model.safetensors")
    gone = sorted(held)[:4]
    save_file(
        {name: t for name, t in held.items() if name not in gone}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ModelError, match=f"lacks {', '.join(gone[:3])}; it cannot be resumed"):
        methods.restore(model, tmp_path)


def test_weights_of_every_shard_are_put_back(tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(full, "MAX_SHARD_BYTES", 60_000)
    model = methods.attach(load_model(tiny_glm), FullMethod())
    methods.save(model, tmp_path, base=record(tiny_glm))
    other = methods.attach(load_model(tiny_glm), FullMethod())
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    methods.restore(other, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_tied_head_is_saved_once_and_put_back(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "tied", "glm", tie_word_embeddings=True)
    model = methods.attach(load_model(folder), FullMethod())
    (tmp_path / "saved").mkdir()
    methods.save(model, tmp_path / "saved", base=record(folder))
    held = load_file(tmp_path / "saved/model.safetensors")
    assert held.keys() == load_file(folder / "model.safetensors").keys()
    assert "lm_head.weight" not in held
    assert set(methods.saved_names(model)) == held.keys()
    methods.restore(methods.attach(load_model(folder), FullMethod()), tmp_path / "saved")


def test_an_adapter_of_other_layers_or_with_noise_is_not_put_back(
    tiny_glm: Path, tmp_path: Path
) -> None:
    def attached(*targets: str) -> Any:
        return methods.attach(
            load_model(tiny_glm), LoraMethod(rank=2, target_modules=list(targets))
        )

    methods.save(attached("q_proj"), tmp_path, base=record(tiny_glm))
    methods.restore(attached("q_proj"), tmp_path)
    for targets in (("k_proj",), ("q_proj", "k_proj")):
        with pytest.raises(ModelError):
            methods.restore(attached(*targets), tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    for number, tensor in enumerate(held.values()):
        tensor.view(-1)[0] = float("nan" if number else "inf")
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ModelError, match=rf"\({len(held)} of {len(held)} tensors do\); use an earlier"
    ):
        methods.restore(attached("q_proj"), tmp_path)


# --- LoRA's own file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "written"), [(16, "16"), (8.5, "8.5"), (4.0, "4")])
def test_an_adapters_config_says_what_was_set_and_the_run_goes_on_as_before(
    alpha: float, written: str, tiny_glm: Path, tmp_path: Path
) -> None:
    section = LoraMethod(rank=2, alpha=alpha, dropout=0.25, target_modules=["v_proj", "k_proj", "q_proj"])  # fmt: skip
    model: Any = methods.attach(load_model(tiny_glm), section)
    methods.save(model, tmp_path, base=record(tiny_glm, "a1b2"))
    text = (tmp_path / "adapter_config.json").read_text()
    assert f'"lora_alpha": {written},' in text
    said = json.loads(text)
    assert said["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert (said["r"], said["lora_dropout"], said["bias"], said["inference_mode"]) == (2, 0.25, "none", True)  # fmt: skip
    config = model.peft_config["default"]
    assert not config.inference_mode
    assert config.revision is None
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert len(names) == 2 * 3 * 2


def test_a_table_that_peft_saves_beside_its_adapters_is_no_stranger(tiny_glm: Path, tmp_path: Path) -> None:  # fmt: skip
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(load_model(tiny_glm), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False))  # type: ignore[arg-type]  # fmt: skip
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(".lora_" not in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    opened = lora.load_adapter(load_model(tiny_glm), tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(
            opened(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits
        )


def test_a_regex_is_of_whole_names_and_three_misfits_are_named(tiny_glm: Path, tmp_path: Path) -> None:  # fmt: skip
    with pytest.raises(ConfigError, match="matches no module"):
        methods.attach(
            load_model(tiny_glm), LoraMethod(target_modules=r"layers\.0\.mlp\.down_proj")
        )
    model = methods.attach(load_model(tiny_glm), LoraMethod(rank=2))
    methods.save(model, tmp_path, base=record(tiny_glm))
    file = tmp_path / "adapter_model.safetensors"
    save_file(
        {name.replace("layers.1.", "layers.7."): t for name, t in load_file(file).items()}, file
    )
    with pytest.raises(ModelError, match=r"\(6 in all\)") as caught:
        lora.load_adapter(load_model(tiny_glm), tmp_path, force=True)
    assert str(caught.value).count("layers.1.") == 3


def test_layers_that_peft_left_out_are_noticed(tiny_glm: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(lora, "matched_modules", lambda _: {"x": 3})
    with pytest.raises(ConfigError, match="matches 2 layers but PEFT adapted 3"):
        methods.attach(load_model(tiny_glm), LoraMethod(target_modules=["q_proj"]))
    methods.attach(load_model(tiny_glm), LoraMethod(target_modules="all-linear"))


def test_an_adapter_without_a_record_opens_with_a_word(
    tiny_glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, code in (("lora", lora), ("ptuning_v2", ptuning_v2)):
        folder = tmp_path / kind
        folder.mkdir()
        methods.save(methods.attach(load_model(tiny_glm), SECTIONS[kind]), folder, base=record(tiny_glm))  # fmt: skip
        (folder / "finetune.json").unlink()
        opened = code.load_adapter(load_model(tiny_glm), folder)
        assert "does not say which base it belongs to" in capsys.readouterr().out
        assert not any(module.training for module in opened.modules())
        if kind == "lora":
            kinds = {type(m).__name__ for m in opened.modules()}
            assert "LoraLinear" in kinds


def test_tables_and_convolutions_may_be_adapted_and_saved(tmp_path: Path) -> None:
    import pictures

    folder = pictures.save_model(tmp_path / "model")
    targets = ["word_embeddings", "vision.conv", "dense"]
    model: Any = methods.attach(load_model(folder), LoraMethod(rank=2, target_modules=targets))
    (tmp_path / "adapter").mkdir()
    methods.save(model, tmp_path / "adapter", base=record(folder))
    held = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert any("word_embeddings.lora_embedding_A" in name for name in held)
    assert any("vision.conv.lora_A" in name for name in held)
    assert all(".lora_" in name for name in held)
    opened = lora.load_adapter(load_model(folder), tmp_path / "adapter", force=True)
    assert methods.trained_modules(opened) == methods.trained_modules(model)


# --- experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj"])
def test_experts_that_are_frozen_get_no_adapter(frozen: str, tmp_path: Path) -> None:
    folder = mixtures.save_model(tmp_path / "model", "glm4_moe")
    section = LoraMethod(rank=4, dropout=0.0, target_modules=["experts", "q_proj"])
    model = methods.attach(load_model(folder), section, freeze=[rf"experts\.{frozen}", r"layers\.0\.self_attn"])  # fmt: skip
    found = methods.trained_modules(model)
    other = "down_proj" if frozen == "gate_up_proj" else "gate_up_proj"
    assert found == {f"model.layers.*.mlp.experts.{other}": 2, "model.layers.*.self_attn.q_proj": 2}


def test_an_adapter_of_experts_that_is_opened_computes_as_one_that_is_trained(tmp_path: Path) -> None:  # fmt: skip
    folder = mixtures.save_model(tmp_path / "model", "glm4_moe")
    section = LoraMethod(rank=4, dropout=0.0, target_modules=["experts"])
    model = methods.attach(load_model(folder), section)
    (tmp_path / "adapter").mkdir()
    methods.save(model, tmp_path / "adapter", base=record(folder))
    opened = lora.load_adapter(load_model(folder), tmp_path / "adapter", force=True)
    for one in (model, opened):
        assert sum(type(module).__name__ == "ExpertsLora" for module in one.modules()) == 2


def test_the_head_of_a_mixture_is_no_linear_layer_among_all(tmp_path: Path) -> None:
    folder = mixtures.save_model(tmp_path / "model", "glm4_moe")
    model = methods.attach(load_model(folder), LoraMethod(rank=2, target_modules="all-linear"))
    found = methods.trained_modules(model)
    assert "lm_head" not in found
    assert "model.layers.*.self_attn.q_proj" in found


def test_files_of_the_base_are_those_of_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # fmt: skip
    asked: list[Any] = []

    def fetched(path: str, revision: str | None, files: Any = None) -> Path:
        asked.append((path, revision, files))
        return tmp_path

    (tmp_path / "config.json").write_text("{}")
    for module in (carried, full_experts):
        monkeypatch.setattr(module, "local_folder", fetched)
    monkeypatch.setattr(full_experts, "tensors_of", lambda _: {})
    base = BaseRecord("org/name", "a1b2", "x")
    (tmp_path / "out").mkdir()
    carried.carry_model_files(base, tmp_path / "out")
    carried.carry_tokenizer(base, tmp_path / "out")
    assert full_experts.ahead_of(base) == {}
    assert [one[:2] for one in asked] == [("org/name", "a1b2")] * 3
    assert [bool(one[2]) for one in asked] == [False, True, False]  # a tokenizer needs no weights


# --- which method it is ------------------------------------------------------------------------------------


def test_an_adapter_is_of_the_method_of_its_kind() -> None:
    for kind, peft_type in (("lora", PeftType.LORA), ("ptuning_v2", PeftType.PREFIX_TUNING)):
        assert methods.of_adapter(peft_type.value, Path("x")).kind == kind
    for said in ("IA3", None, "lora", ["LORA"]):
        with pytest.raises(ModelError, match="only LORA, PREFIX_TUNING can be opened"):
            methods.of_adapter(said, Path("x"))


def test_what_others_may_do_with_a_method_is_told() -> None:
    facts = {
        name: (m.result, m.trains_the_model, m.served_by_vllm, m.has_rates, m.merging is None, m.less_memory_if_quantized)
        for name, m in methods.METHODS.items()
    }  # fmt: skip
    assert facts == {
        "lora": ("adapter", False, True, True, True, False),
        "ptuning_v2": ("prefix", False, False, False, False, True),
        "full": ("full", True, False, False, True, True),
    }
    assert "nf4" in methods.METHODS["lora"].less_memory
    assert "method.kind=lora" in methods.METHODS["full"].less_memory


def test_tensors_that_lie_apart_are_written_as_they_read(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    apart = {"column": whole[:, 1], "every second": torch.arange(6.0)[::2], "turned": whole.T, "one": whole[0, 0], "none": whole[:0]}  # fmt: skip
    save_tensors(apart, tmp_path / "t.safetensors")
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == apart.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in apart.items())
