"""Opening models: which families, from which files, and what is said when it cannot be done."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.artifacts.resolve import local_folder
from finetune.errors import ModelError
from finetune.models.families import FAMILIES, family_of
from finetune.models.kernels.products import ReplyingLinear
from finetune.models.load import load_model
from finetune.models.loss import SupervisedHead

NAMES = ("chatglm", "glm", "glm4")


@pytest.fixture
def folder(tiny_glm: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(tiny_glm, tmp_path / "model")


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_every_family_loads_whole_in_eval_mode(name: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue(f"tiny_{name}")
    model = load_model(place, dtype="float32")
    assert not model.training
    assert isinstance(model.get_output_embeddings(), SupervisedHead)
    assert family_of(model.config).model_type == name
    assert model.config._attn_implementation == "document_sdpa"
    stored = load_file(place / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in stored.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_keeps_its_architecture_and_weights(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place = request.getfixturevalue(f"tiny_{name}")
    load_model(place, dtype="float32").save_pretrained(tmp_path)
    before = json.loads((place / "config.json").read_text(encoding="utf-8"))
    after = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert after["architectures"] == before["architectures"]
    assert after["model_type"] == name
    stored, saved = (load_file(f / "model.safetensors") for f in (place, tmp_path))
    assert stored.keys() == saved.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in stored.items())


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    place = tiny.save_model(tmp_path / "tied", "glm", tie_word_embeddings=True)
    model = load_model(place)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(1, 9).unsqueeze(0)
    model(ids, labels=ids).loss.backward()
    model.zero_grad()


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float32", torch.float32),
        ("auto", torch.float32),
    ],
)
def test_every_weight_has_the_dtype_that_was_asked_for(
    tiny_chatglm: Path, asked: str, got: torch.dtype
) -> None:
    if asked == "auto" and torch.cuda.is_available():
        pytest.skip("auto is bfloat16 on this GPU")
    model = load_model(tiny_chatglm, dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {got}
    assert getattr(model, "sums_in_float32", False) is (got is torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_default_lora_targets_are_all_linear_layers_of_the_blocks(
    name: str, request: pytest.FixtureRequest
) -> None:
    model = load_model(request.getfixturevalue(f"tiny_{name}"))
    pattern = FAMILIES[name].lora_targets
    linear = {
        n for n, module in model.named_modules() if type(module) in (nn.Linear, ReplyingLinear)
    }
    hit = {n for n, _ in model.named_modules() if re.fullmatch(pattern, n)}
    assert hit == linear  # the head is a SupervisedHead and stays out
    assert len(hit) == 2 * {"chatglm": 4, "glm": 6, "glm4": 6}[name]


def test_lora_targets_leave_the_vision_tower_alone() -> None:
    vision = "transformer.vision.transformer.layers.0.attention.query_key_value"
    assert re.fullmatch(FAMILIES["chatglm"].lora_targets, vision) is None


def test_a_missing_package_for_flash_attention_is_named(tiny_glm: Path) -> None:
    with pytest.raises(ModelError, match=r"flash-attn.*model\.attention: sdpa"):
        load_model(tiny_glm, attention="flash_attention_2")


@pytest.mark.parametrize("model_type", ["llama", "glm_moe_dsa", "chatglm4", None])
def test_other_families_are_refused_by_name(folder: Path, model_type: str | None) -> None:
    change_config(folder, model_type=model_type)
    with pytest.raises(ModelError, match=rf"model_type {model_type!r} .*chatglm.*glm.*glm4"):
        load_model(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such checkpoint folder"):
        load_model(tmp_path / "nowhere")


def test_a_hub_id_that_cannot_be_fetched_is_named() -> None:
    with pytest.raises(ModelError, match=r"some-org/some-model.*cannot be fetched"):
        local_folder("some-org/some-model")


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(tmp_path)


def test_an_adapter_folder_is_not_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="is an adapter"):
        load_model(tmp_path)


def test_a_damaged_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ', encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        load_model(folder)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(folder)


def test_a_checkpoint_in_few_bits_is_refused(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ModelError, match="is quantised; give the unquantised"):
        load_model(folder)


def test_missing_weights_are_named_instead_of_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing: model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(folder)


def test_left_over_weights_are_named(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"unknown: model\.layers\.1\..* more"):
        load_model(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=48)
    with pytest.raises(ModelError, match=r"of another shape: model\.layers\.0\.mlp\.down_proj"):
        load_model(folder)


def test_what_a_config_says_of_outputs_changes_none(folder: Path) -> None:
    change_config(folder, return_dict=False, output_hidden_states=True)
    out = load_model(folder, dtype="float32")(input_ids=torch.tensor([[1, 2]]))
    assert out.logits.shape[:2] == (1, 2)
    assert out.hidden_states is None


def test_a_billion_labels_are_refused_before_they_are_made(folder: Path) -> None:
    change_config(folder, num_labels=10**9)
    with pytest.raises(ModelError, match="num_labels is 1000000000"):
        load_model(folder, dtype="float32")
