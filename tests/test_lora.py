"""LoRA: what is hit, what it computes, what is saved and who may open it (law 9)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from closeness import additions, assert_close
from peft import PeftModel

from finetune import methods
from finetune.artifacts.weights import model_fingerprint
from finetune.config.schema import FullMethod, LoraMethod, PTuningV2Method
from finetune.errors import ConfigError, ModelError
from finetune.methods import BaseRecord, lora
from finetune.models.load import load_model

IDS = torch.tensor([[372, 374, 377, 10, 40, 41, 378, 10, 60, 377]])
LABELS = torch.tensor([[-100, -100, -100, -100, -100, -100, -100, 10, 60, 377]])


@pytest.fixture(params=["chatglm", "glm", "glm4"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(f"tiny_{family}"))


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.clone()


def adapted(folder: Path, family: str, *, noisy: bool = True, **options: Any) -> Any:
    """A model with adapters, B not zero unless asked."""
    torch.manual_seed(0)
    model = methods.attach(load_model(folder), LoraMethod(**options))
    if noisy:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
    return model


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_a_fresh_adapter_computes_what_the_base_computes(
    folder: Path, family: str, options: dict[str, bool]
) -> None:
    model = load_model(folder)
    base = logits(model)
    fresh = logits(adapted(folder, family, noisy=False, **options))
    if options.get("use_dora"):  # which divides by the norm of the weight that it multiplies with
        assert_close(fresh, base, additions(model.config, 10))
    else:
        assert torch.equal(fresh, base)


def test_attention_and_mlp_of_the_text_layers_are_adapted_by_default(
    folder: Path, family: str
) -> None:
    names = {
        name.rpartition(".")[2]: n
        for name, n in methods.trained_modules(adapted(folder, family)).items()
    }
    published = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    split = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert names == dict.fromkeys(published if family == "chatglm" else split, 2)  # 2 layers


@pytest.mark.parametrize(
    ("targets", "matched"),
    [
        (["query_key_value"], {"transformer.encoder.layers.*.self_attention.query_key_value": 2}),
        (
            ["layers.1.mlp.dense_4h_to_h", "dense"],
            {
                "transformer.encoder.layers.*.self_attention.dense": 2,
                "transformer.encoder.layers.*.mlp.dense_4h_to_h": 1,
            },
        ),
        (r".*\.0\.mlp\.dense_.*", {
            "transformer.encoder.layers.*.mlp.dense_h_to_4h": 1,
            "transformer.encoder.layers.*.mlp.dense_4h_to_h": 1,
        }),
        ("all-linear", {
            "transformer.encoder.layers.*.self_attention.query_key_value": 2,
            "transformer.encoder.layers.*.self_attention.dense": 2,
            "transformer.encoder.layers.*.mlp.dense_h_to_4h": 2,
            "transformer.encoder.layers.*.mlp.dense_4h_to_h": 2,
        }),
    ],
)  # fmt: skip
def test_targets_can_be_endings_a_regex_or_all_linear_layers(
    tiny_chatglm: Path, targets: Any, matched: dict[str, int]
) -> None:
    model = adapted(tiny_chatglm, "chatglm", target_modules=targets)
    assert methods.trained_modules(model) == matched


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            ["query_key_value", "dens"],
            r"'dens' matches no module.*did you mean 'dense'\?.*dense x 2",
        ),
        (r".*\.q_proj", "q_proj' matches no module"),
        ("(", "is not a regex"),
        ([r"mlp"], "'transformer.encoder.layers.0.mlp', a MLP; name the linear layers inside"),
    ],
)
def test_a_target_that_matches_no_layer_is_refused_by_name(
    tiny_chatglm: Path, targets: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        adapted(tiny_chatglm, "chatglm", target_modules=targets)


def test_rslora_scales_by_the_root_of_the_rank(tiny_chatglm: Path) -> None:
    plain = adapted(tiny_chatglm, "chatglm", rank=4, alpha=8)
    rooted = adapted(tiny_chatglm, "chatglm", rank=4, alpha=8, use_rslora=True)

    def scale(model: Any) -> float:
        layer = model.base_model.model.transformer.encoder.layers[0].self_attention.dense
        return float(layer.scaling["default"])

    assert (scale(plain), scale(rooted)) == (2.0, 4.0)


def test_adapters_are_trained_in_float32_while_the_base_stays_bfloat16(
    folder: Path, family: str
) -> None:
    model = methods.attach(
        load_model(folder, dtype="bfloat16"), LoraMethod(use_dora=True, dropout=0.0)
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    model.train()
    model(input_ids=IDS, labels=LABELS, num_items_in_batch=3.0).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())
    assert all(torch.isfinite(p.grad).all() for p in trained.values())


def test_a_bfloat16_run_saves_float32_adapters(tiny_glm4: Path, tmp_path: Path) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 4)
    settings = runs.config(
        tiny_glm4, data, tmp_path / "run", training__max_steps=2, model__dtype="bfloat16"
    )
    runs.run_here(settings)
    saved = runs.weights(tmp_path / "run/checkpoint-2")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    # A step of float32 is finer than bfloat16 could hold.
    some = next(tensor for name, tensor in saved.items() if "lora_B" in name)
    assert not torch.equal(some, some.bfloat16().float())


# --- saving and opening ----------------------------------------------------------------------------


def record(folder: Path) -> BaseRecord:
    return BaseRecord(str(folder), None, model_fingerprint(folder))


def test_peft_alone_opens_what_is_saved(folder: Path, family: str, tmp_path: Path) -> None:
    model = adapted(folder, family)
    methods.save(model, tmp_path, base=record(folder))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(folder), None)
    opened = PeftModel.from_pretrained(load_model(folder), tmp_path)
    assert torch.equal(logits(opened), logits(model))


def test_saved_names_are_the_published_ones(tiny_chatglm: Path, tmp_path: Path) -> None:
    methods.save(adapted(tiny_chatglm, "chatglm"), tmp_path, base=record(tiny_chatglm))
    names = set(runs.weights(tmp_path))
    layer = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value"
    assert {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"} <= names


def test_restoring_gives_the_same_bits_back(folder: Path, family: str, tmp_path: Path) -> None:
    model = adapted(folder, family)
    methods.save(model, tmp_path, base=record(folder))
    other = adapted(folder, family, noisy=False)
    methods.restore(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert any(p.requires_grad for p in other.parameters())


def test_an_adapter_of_another_rank_is_not_restored(tiny_glm: Path, tmp_path: Path) -> None:
    methods.save(adapted(tiny_glm, "glm", rank=4), tmp_path, base=record(tiny_glm))
    with pytest.raises(ModelError, match=r"lora_A\.weight is \(4, 32\) and not \(8, 32\)"):
        methods.restore(adapted(tiny_glm, "glm", rank=8), tmp_path)


def test_an_adapter_opens_on_its_own_base_only(tiny_chatglm: Path, tmp_path: Path) -> None:
    import tiny

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    model = adapted(tiny_chatglm, "chatglm")
    methods.save(model, adapter, base=record(tiny_chatglm))
    opened = lora.load_adapter(load_model(tiny_chatglm), adapter)
    assert torch.equal(logits(opened), logits(model))
    copied = Path(shutil.copytree(tiny_chatglm, tmp_path / "copied"))
    lora.load_adapter(load_model(copied), adapter)  # the same weights elsewhere
    other = tiny.save_model(tmp_path / "other", "chatglm", seed=1)
    with pytest.raises(ModelError, match="its weights or its config differ"):
        lora.load_adapter(load_model(other), adapter)
    lora.load_adapter(load_model(other), adapter, force=True)


def test_a_pickled_adapter_is_not_opened(tiny_chatglm: Path, tmp_path: Path) -> None:
    methods.save(adapted(tiny_chatglm, "chatglm"), tmp_path, base=record(tiny_chatglm))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="only safetensors"):
        lora.load_adapter(load_model(tiny_chatglm), tmp_path)


def test_lora_plus_gives_the_b_matrices_a_higher_rate(tiny_chatglm: Path, tmp_path: Path) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 4)
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=1, training__warmup_steps=0,
        training__lr_schedule="constant", method__lora_plus_ratio=16,
    )  # fmt: skip
    runs.run_here(settings)
    state = torch.load(tmp_path / "run/checkpoint-1/optimizer.pt", weights_only=True)
    groups = [(group["lr"], len(group["params"])) for group in state["param_groups"]]
    assert sorted(groups) == [(0.01, 8), (0.16, 8)]  # 2 layers x 4 matrices


def test_a_full_run_saves_a_model_in_the_bases_names(tiny_chatglm: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    data = runs.write_dialogues(tmp_path / "train.jsonl", 4)
    settings = runs.config(tiny_chatglm, data, tmp_path / "run", training__max_steps=2)
    settings["method"] = {"kind": "full"}
    runs.run_here(settings)
    saved = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    base = load_file(tiny_chatglm / "model.safetensors")
    assert {name: t.shape for name, t in saved.items()} == {
        name: t.shape for name, t in base.items()
    }
    # Resuming from it goes on as if it had not been stopped.
    whole = runs.config(tiny_chatglm, data, tmp_path / "whole", training__max_steps=2)
    whole["method"] = {"kind": "full"}
    whole["training"]["save_every_steps"] = 1
    runs.run_here(whole)
    shutil.rmtree(tmp_path / "whole/checkpoint-2")
    runs.run_here(whole)
    again = load_file(tmp_path / "whole/checkpoint-2/model.safetensors")
    assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_lora_plus_raises_b_and_nothing_else() -> None:
    from finetune.training.arguments import Rates

    rates = Rates(0.01, {}, methods.rate_scale(LoraMethod(lora_plus_ratio=16)))
    assert rates.of("model.layers.0.mlp.down_proj.lora_B.default.weight") == pytest.approx(0.16)
    assert rates.of("model.embed_tokens.lora_embedding_B.default") == pytest.approx(0.16)
    assert rates.of("model.layers.0.mlp.down_proj.lora_A.default.weight") == 0.01
    assert not rates.is_one
    for section in (LoraMethod(), PTuningV2Method(), FullMethod()):
        assert Rates(0.01, {}, methods.rate_scale(section)).is_one
