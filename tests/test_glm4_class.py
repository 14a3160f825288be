"""What transformers, PEFT and accelerate read of GLM-4's classes: sizes, names, plans, first values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from finetune.errors import ModelError
from finetune.models.chatglm.configuration import ChatGLMConfig, ChatGLMVisionConfig
from finetune.models.chatglm.layers import Block, RotaryEmbedding, SelfAttention, eager_attention
from finetune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from finetune.models.families import FAMILIES, REFUSED, family_of
from finetune.models.load import load_model

MARKERS = {"boi_token_id": 1, "eoi_token_id": 2}
SMALL: dict[str, Any] = {
    "num_layers": 2, "padded_vocab_size": 99, "hidden_size": 32, "ffn_hidden_size": 24, "kv_channels": 8,
    "num_attention_heads": 4, "multi_query_group_num": 2, "seq_length": 64,
}  # fmt: skip


# --- sizes -----------------------------------------------------------------------------------------------


def test_without_a_word_the_text_is_glm_4_9bs(glm4_assets: Path) -> None:
    published = json.loads((glm4_assets / "assets/glm-4-9b-chat/config.json").read_text())
    said = {name: getattr(ChatGLMConfig(), name) for name in ChatGLMConfig.__dataclass_fields__}
    both = (said.keys() & published.keys()) - {"architectures", "transformers_version"}
    differ = {name for name in both if said[name] != published[name]}
    assert differ == {
        "rope_ratio",
        "eos_token_id",
        "pad_token_id",
    }  # of the longer, and of its tokens
    assert len(both) > 20
    assert (ChatGLMConfig().rope_ratio, ChatGLMConfig().initializer_range) == (1, 0.02)


def test_without_a_word_the_tower_is_glm_4vs(glm4_assets: Path) -> None:
    published = json.loads((glm4_assets / "golden/glm4v/full_param_shapes.json").read_text())
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig(vision_config=ChatGLMVisionConfig(), **MARKERS))  # fmt: skip
    assert {name: list(weight.shape) for name, weight in model.named_parameters()} == published
    tiny = json.loads((glm4_assets / "golden/glm4v/glm4v_tiny/config.json").read_text())
    vision = ChatGLMVisionConfig()
    for name in ("layer_norm_eps", "scaling_factor", "hidden_act", "dropout_prob", "patch_size", "in_channels"):  # fmt: skip
        assert getattr(vision, name) == tiny["vision_config"][name], name
    assert vision.hidden_size // vision.num_heads == 112  # EVA2-CLIP-E's heads
    assert vision.num_attention_heads == 16
    assert model.config.image_patches == 1600


@pytest.mark.parametrize(
    "alias",
    [
        "num_hidden_layers", "vocab_size", "intermediate_size", "head_dim", "num_key_value_heads",
        "max_position_embeddings", "rms_norm_eps",
    ],
)  # fmt: skip
def test_a_size_has_transformers_name_too(alias: str) -> None:
    own = ChatGLMConfig.attribute_map[alias]
    config = ChatGLMConfig(**SMALL)
    assert getattr(config, alias) == getattr(config, own)
    setattr(config, alias, 12)
    assert getattr(config, own) == 12


def test_names_of_sizes_are_those_that_transformers_asks_for(tiny_glm: Path) -> None:
    theirs = load_model(tiny_glm).config
    config = ChatGLMConfig(**SMALL)
    read = {
        "num_hidden_layers": 2, "vocab_size": 99, "intermediate_size": 24, "head_dim": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": config.layernorm_epsilon,
    }  # fmt: skip
    for name, value in read.items():
        assert getattr(config, name) == value
        assert hasattr(theirs, name)


NEEDED = (
    "hidden_size", "num_hidden_layers", "num_heads", "intermediate_size", "layer_norm_eps", "patch_size",
    "image_size", "in_channels", "num_positions", "scaling_factor",
)  # fmt: skip


@pytest.mark.parametrize("key", NEEDED)
def test_a_tower_that_lacks_one_of_its_sizes_is_refused(key: str) -> None:
    vision = {name: value for name, value in pictures.VISION.items() if name != key}
    with pytest.raises(ModelError, match=f"`vision_config.{key}` is missing"):
        ChatGLMConfig(vision_config=vision, **MARKERS)


@pytest.mark.parametrize("key", MARKERS)
def test_an_image_without_either_of_its_ends_is_refused(key: str) -> None:
    with pytest.raises(ModelError, match=f"`{key}` is missing"):
        ChatGLMConfig(vision_config=pictures.VISION, **MARKERS | {key: None})


@pytest.mark.parametrize("key", ["post_layer_norm", "add_bias_linear", "apply_residual_connection_post_layernorm"])  # fmt: skip
def test_every_field_that_glm4_says_is_asked_for(key: str) -> None:
    values = {name: value for name, value in ChatGLMConfig(**SMALL).to_dict().items() if name != key}  # fmt: skip
    with pytest.raises(ModelError, match=f"`{key}` is missing"):
        ChatGLMConfig.from_dict(values)


def test_the_published_name_of_the_number_of_layers_may_be_said_alone() -> None:
    values = ChatGLMConfig(**SMALL).to_dict()
    values.pop("num_hidden_layers", None)
    assert ChatGLMConfig.from_dict(values | {"num_layers": 3}).num_layers == 3


def test_what_is_saved_is_what_was_read_and_what_was_changed(tmp_path: Path) -> None:
    values = json.loads(ChatGLMConfig(**SMALL).to_json_string()) | {
        "_name_or_path": "org/name", "attn_implementation": "sdpa", "architectures": ["ChatGLMModel"],
        "transformers_version": "4.1", "torch_dtype": "bfloat16", "model_type": "chatglm", "mine": {"a": [1]},
        "num_hidden_layers": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = ChatGLMConfig.from_pretrained(tmp_path)
    assert json.loads(config.to_json_string()) == values | {"tie_word_embeddings": False}
    values["mine"]["a"].append(2)
    config.mine["a"].append(3)  # one that was read is no other
    config.hidden_dropout = 0.5
    config.dtype = torch.float32
    said = json.loads(config.to_json_string())
    assert said["hidden_dropout"] == 0.5
    assert said["torch_dtype"] == "float32"
    assert said["_name_or_path"] == "org/name"
    assert said["mine"] == {"a": [1, 3]}
    nowhere = {key: value for key, value in values.items() if key != "_name_or_path"}
    (tmp_path / "config.json").write_text(json.dumps(nowhere))
    assert str(tmp_path) not in ChatGLMConfig.from_pretrained(tmp_path).to_json_string()


# --- names and plans ---------------------------------------------------------------------------------------


def small(**more: Any) -> Any:
    torch.manual_seed(0)
    return ChatGLMForConditionalGeneration(ChatGLMConfig(**SMALL | more))


def test_a_plan_for_several_gpus_has_every_matrix_of_a_layer_and_the_head() -> None:
    model = small()
    plan = {f"transformer.{name}": style for name, style in model.config.base_model_tp_plan.items()}
    plan |= type(model)._tp_plan
    patterns = {re.compile(name.replace(".", r"\.").replace("*", r"\d+")): style for name, style in plan.items()}  # fmt: skip
    matrices = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}  # fmt: skip
    for name in matrices:
        (style,) = (style for pattern, style in patterns.items() if pattern.fullmatch(name))
        assert style in ALL_PARALLEL_STYLES
        # q, k and v, or gate and up, lie in one: a process needs its rows of each of them.
        joined = name.endswith(("query_key_value", "dense_h_to_4h", "output_layer"))
        assert style == ("colwise_gather_output" if joined else "rowwise_split_input")
    assert len(matrices) == 2 * 4 + 1


def test_layers_are_not_split_over_devices_and_any_attention_may_be_asked_for() -> None:
    from accelerate import infer_auto_device_map

    model = small()
    assert {type(module).__name__ for module in model.modules()} >= set(model._no_split_modules)
    layer = sum(w.nbytes for w in model.transformer.encoder.layers[0].parameters())
    table = model.transformer.embedding.word_embeddings.weight.nbytes
    limits = {0: table + layer + layer // 2, 1: 10 * table, "cpu": 0}
    places = infer_auto_device_map(model, limits, no_split_module_classes=model._no_split_modules)
    assert not [name for name in places if re.search(r"layers\.\d+\.", name)]
    assert set(model._skip_keys_device_placement) == {"past_key_values"}
    for kind in ("_supports_flash_attn", "_supports_sdpa", "_supports_flex_attn", "_supports_attention_backend"):  # fmt: skip
        assert getattr(model, kind)


def test_hidden_states_and_attentions_are_those_of_the_layers() -> None:
    model = small()
    model.config._attn_implementation = "eager"
    ids = torch.tensor([[5, 6, 7]])
    said = model.eval()(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(one.shape) for one in said.attentions] == [(1, 4, 3, 3)] * 2
    torch.testing.assert_close(said.attentions[0].sum(-1), torch.ones(1, 4, 3))
    assert len(said.hidden_states) == 3
    assert torch.equal(said.hidden_states[-1], said.last_hidden_state)


def test_what_a_file_does_not_hold_is_set_as_at_first() -> None:
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    vision = {"vision_config": pictures.VISION, **MARKERS}
    for more in (vision, {"rope_parameters": scaled}):
        model = small(**more)
        first = {name: buffer.clone() for name, buffer in model.named_buffers()}
        assert ("transformer.rotary_pos_emb.original_inv_freq" in first) is (more is not vision)
        assert ("transformer.rotary_pos_emb.inv_freq" in model.state_dict()) is (more is vision)
        tower = model.transformer.vision
        markers = (
            [] if tower is None else [tower.boi, tower.eoi, tower.patch_embedding.cls_embedding]
        )
        with torch.no_grad():
            for tensor in (*model.buffers(), *markers):
                tensor.fill_(7.0)
        for module in model.modules():
            model._init_weights(module)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, first[name]), name
        assert not any(marker.any() for marker in markers)


def test_a_file_with_angles_opens_where_they_are_scaled(tiny_chatglm: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(tiny_chatglm, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    scaled = {"rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": scaled}))
    plain, model = (load_model(place).transformer.rotary_pos_emb for place in (tiny_chatglm, folder))  # fmt: skip
    places = torch.arange(6)[None]
    for one, other in zip(model(torch.zeros(1), 2 * places), plain(torch.zeros(1), places), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
def test_every_auto_class_gives_the_one_class(auto: Any, tiny_chatglm: Path) -> None:
    assert type(auto.from_pretrained(tiny_chatglm)) is ChatGLMForConditionalGeneration


def test_the_tower_is_the_encoder_of_images_and_of_nothing_else() -> None:
    seeing, text = small(vision_config=pictures.VISION, **MARKERS), small()
    assert seeing.get_encoder("image") is seeing.transformer.vision
    assert seeing.get_encoder() is seeing
    assert text.get_encoder("image") is text
    assert seeing.transformer.get_encoder("image") is seeing.transformer.vision


def test_tables_that_are_replaced_are_used() -> None:
    model = small().eval()
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    table, head = nn.Embedding(99, 32), nn.Linear(32, 50, bias=False)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
    assert not torch.equal(model(ids).logits, before)
    model.set_output_embeddings(head)
    assert model(ids).logits.shape == (1, 3, 50)


# --- dropout and calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["self_attention", "mlp"])
def test_what_each_half_of_a_layer_adds_is_dropped_in_training(part: str) -> None:
    layer = Block(ChatGLMConfig(**SMALL | {"hidden_dropout": 0.5}), 0)
    ones = torch.ones(1, 3, 32)
    nothing = torch.zeros(1, 3, 32)
    for name in ("self_attention", "mlp"):
        adds = ones if name == part else nothing
        module: Any = nn.Module()
        module.forward = lambda *_, adds=adds, name=name, **__: (adds, None) if name == "self_attention" else adds  # fmt: skip
        setattr(layer, name, module)
    assert torch.equal(layer.eval()(nothing), ones)
    dropped = layer.train()(nothing)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


def test_attention_is_weighed_in_float32_and_handed_on_as_it_came() -> None:
    layer = SelfAttention(ChatGLMConfig(**SMALL), 0)
    assert layer.is_causal
    query, key = (10 * torch.randn(1, heads, 5, 8).bfloat16() for heads in (4, 2))
    out, weights = eager_attention(layer, query, key, key, None, 0.5)
    assert (out.dtype, weights.dtype) == (torch.bfloat16, torch.bfloat16)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.5
    assert torch.equal(weights, scores.float().softmax(-1).bfloat16())


def test_angles_of_far_positions_are_made_in_float32() -> None:
    rotary = RotaryEmbedding(ChatGLMConfig(**SMALL))
    places = torch.tensor([[0, 1001, 4097]])
    wide, narrow = (rotary(torch.zeros(1, dtype=kind), places) for kind in (torch.float32, torch.bfloat16))  # fmt: skip
    for one, other in zip(wide, narrow, strict=True):
        assert torch.equal(one.bfloat16(), other)


def test_ids_or_embeddings_and_pixels_or_features_are_given_and_never_both() -> None:
    model = small(vision_config=pictures.VISION, **MARKERS)
    ids = torch.tensor([[5, 1, 0, 0, 0, 0, 2, 6]])
    embeds = model.get_input_embeddings()(ids)
    pixels, features = torch.zeros(1, 3, 56, 56), torch.zeros(1, 6, 32)
    for given in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**given)
    with pytest.raises(ValueError, match="either pixel_values or image_features"):
        model(ids, pixel_values=pixels, image_features=features)
    text = small()
    with pytest.raises(
        ValueError, match="no vision part; leave pixel_values and image_features out"
    ):
        text(ids, pixel_values=pixels, image_features=features)
    nothing = torch.zeros(0, 3, 56, 56)  # of a batch that shows no image
    words = torch.tensor([[5, 6, 7]])
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(words, pixel_values=nothing).logits, model(words).logits)
        assert model(ids, image_features=features).logits.shape == (1, 8, 99)


@torch.no_grad()
def test_a_cache_is_made_where_one_is_asked_for() -> None:
    model = small().eval()
    ids = torch.tensor([[5, 6, 7]])
    assert model(ids, use_cache=False).past_key_values is None
    made = model(ids, use_cache=True).past_key_values
    assert isinstance(made, DynamicCache)
    assert made.get_seq_length() == 3
    model.config.use_cache = False
    assert model(ids).past_key_values is None


# --- families ----------------------------------------------------------------------------------------------


def test_every_family_that_is_refused_says_why_and_what_is_taken() -> None:
    reasons = {
        "glm_moe_dsa": "GLM-5.*chosen tokens", "glm5_next": "GLM-5.3-Flash.*chosen tokens",
        "glmga": "GLM-GA.*image processor resizes", "glm_image": "GLM-Image.*no chat model",
        "glmasr": "GLM-ASR.*no chat model",
    }  # fmt: skip
    assert reasons.keys() == REFUSED.keys()
    for name, said in reasons.items():
        with pytest.raises(ModelError, match=rf"{name!r} \({said}.*supported are .*GLM-4\.1V"):
            family_of({"model_type": name})
    for odd in (["glm"], 7, {"glm": 1}):
        with pytest.raises(ModelError, match="is not supported; supported are"):
            family_of({"model_type": odd})


@pytest.mark.parametrize("name", ["glm4v_moe", "glm4_moe", "glm4_moe_lite"])
def test_at_full_depth_every_expert_router_and_projection_is_found(name: str) -> None:
    family = FAMILIES[name]
    config = family.config_class()
    text = config.get_text_config()
    text.num_hidden_layers = 12
    with torch.device("meta"):
        names = [one for one, _ in family.model_class(config).named_modules()]
    dense = text.first_k_dense_replace if name != "glm4_moe_lite" else 1

    def found(pattern: str | None) -> list[str]:
        return [one for one in names if re.fullmatch(str(pattern), one)]

    assert len(found(family.experts)) == len(found(family.router)) == 12 - dense
    assert len(found(family.attention)) == 12
    assert len(found(family.rotary)) == 1
    leaves = [one.rpartition(".")[2] for one in found(family.lora_targets)]
    for leaf in ("gate_proj", "up_proj", "down_proj", "o_proj"):
        assert leaves.count(leaf) == 12
    linear = ("q_proj", "k_proj", "v_proj") if name != "glm4_moe_lite" else ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # fmt: skip
    for leaf in linear:
        assert leaves.count(leaf) == 12
