"""GLM-4 in the published layout, part by part: dropout, config, spans, caches, tokenizer, kernels' check."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pictures
import pytest
import tiny
import torch

from finetune.errors import ModelError
from finetune.models import kernels
from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.spans import Spans, _standing_before, positions, remember
from finetune.models.kernels import check, stock_layers, torch_forms
from finetune.models.load import load_model
from finetune.models.moe.modeling import _real_tokens, first_dense, layers_for_prediction
from finetune.models.moe.routing import ExpertUse
from finetune.models.tokenizer import ChatGLM4Tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[10, 40, 41, 60, 61, 62]])


# --- dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_for_training_alone(option: str, tmp_path: Path) -> None:
    for attention in ("sdpa", "eager"):
        folder = tiny.save_model(tmp_path / f"{attention}", "chatglm", **{option: 0.5})
        model = load_model(folder, attention=attention)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, model(IDS).logits)
            model.train()
            assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_dropout_of_the_tower_is_for_training_with_gradients(tmp_path: Path) -> None:
    vision = pictures.VISION | {"dropout_prob": 0.5}
    folder = pictures.save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": vision}))
    tower: Any = load_model(folder).transformer.vision
    pixels = torch.rand(1, 3, pictures.SIZE, pictures.SIZE)

    def varies() -> bool:
        return not torch.equal(tower(pixels), tower(pixels))

    assert not varies()
    tower.train()
    assert varies()
    with torch.no_grad():
        assert not varies()  # as in the features that are kept on disk


# --- the config ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("fp32_residual_connection", True), ("quantization_bit", 8), ("pre_seq_len", 128)],
)
def test_what_a_config_switches_on_that_is_not_glm4_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"`{key}` is set"):
        ChatGLMConfig(**{key: value})
    for off in (None, False, 0):
        ChatGLMConfig(**{key: off})  # type: ignore[arg-type]


def test_peft_finds_the_sizes_of_a_prefix_and_vllm_whether_the_head_is_tied(tiny_chatglm: Path) -> None:  # fmt: skip
    config = ChatGLMConfig.from_pretrained(tiny_chatglm)
    said = config.to_dict()
    assert (said["num_key_value_heads"], said["head_dim"]) == (2, 8)
    assert json.loads(config.to_json_string())["tie_word_embeddings"] is False
    assert ChatGLMConfig().image_patches == 0


@pytest.mark.parametrize(
    ("size", "patch", "places", "fits"),
    [(56, 14, 17, True), (56, 14, 16, False), (42, 14, 10, False), (28, 14, 5, True), (57, 14, 17, False)],
)  # fmt: skip
def test_positions_of_the_tower_must_fit_an_image_of_whole_pairs_of_patches(
    size: int, patch: int, places: int, fits: bool
) -> None:
    vision = pictures.VISION | {"image_size": size, "patch_size": patch, "num_positions": places}
    given = {"vision_config": vision, "boi_token_id": 1, "eoi_token_id": 2}
    if fits:
        assert ChatGLMConfig(**given).image_patches == (size // patch // 2) ** 2  # type: ignore[arg-type]
        return
    with pytest.raises(ModelError, match="do not fit an image of"):
        ChatGLMConfig(**given)  # type: ignore[arg-type]


# --- spans -----------------------------------------------------------------------------------------


def spans(ids: list[list[int]], patches: int = 2) -> Spans:
    given = torch.tensor(ids)
    return Spans(given.eq(1), given.eq(2), patches)


ROW = [[5, 1, 0, 0, 2, 6], [5, 6, 7, 8, 9, 5]]
"""Boi 1, two placeholders and eoi 2 from the second place of the first row on."""


def test_an_image_stands_between_a_boi_and_an_eoi_in_their_distance_alone() -> None:
    assert len(spans(ROW)) == 1
    assert len(spans([[1, 0, 2, 0, 0, 0]])) == len(spans([[1, 0, 0, 0, 2, 0]])) == 0
    assert len(spans([[0, 2, 0, 0, 1, 0]])) == 0  # not around the end of a row
    found = spans(ROW)
    assert found.covered().int().tolist() == [[0, 1, 1, 1, 1, 0], [0] * 6]
    assert found.standing().int().tolist() == [[0, 0, 0, 1, 0, 0], [0] * 6]


@pytest.mark.parametrize(("cached", "unseen"), [(0, True), (1, True), (5, False), (6, False)])
def test_an_image_is_unseen_when_it_begins_where_the_cache_ends(cached: int, unseen: bool) -> None:
    assert spans(ROW).unseen(cached).tolist() == [unseen]
    for inside in (2, 3, 4):
        with pytest.raises(ValueError, match="the cache ends inside an image"):
            spans(ROW).unseen(inside)


class Cache:
    """So many tokens, and what was noted."""

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


def test_positions_stand_still_at_the_patches_of_an_image_and_go_on_behind_a_cache() -> None:
    tokens = torch.zeros(2, 6)
    found = positions(tokens, None, None, spans(ROW))
    assert found.tolist() == [[0, 1, 2, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    assert positions(tokens, mask, None, spans(ROW)).tolist() == [[0, 1, 2, 2, 3, 4], [0, 0, 0, 1, 2, 3]]  # fmt: skip
    cache = Cache(0)
    remember(cache, spans(ROW))
    cache.length = 6
    next_one = torch.zeros(2, 1)
    assert positions(next_one, None, cache, None).tolist() == [[5], [6]]
    more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    assert positions(next_one, more, cache, None).tolist() == [[5], [4]]


def test_rows_of_a_cache_that_were_multiplied_stand_beside_each_other() -> None:
    cache = Cache(0)
    remember(cache, spans(ROW))
    cache.length = 6
    ahead: Any = _standing_before(cache, 4)  # two replies for each row
    assert ahead.flatten().tolist() == [1, 1, 0, 0]
    assert _standing_before(Cache(3), 4) == 0
    remember(cache, spans([[5, 5], [5, 5]]))
    assert cache.standing_patches.shape == (2, 8)  # type: ignore[attr-defined]


# --- generation of a model that sees -------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(pictures.save_model(tmp_path_factory.mktemp("glm4v") / "model"))


def prompt() -> torch.Tensor:
    return torch.tensor([[10, pictures.BOI, *[370] * 4, pictures.EOI, 11]])


@pytest.mark.parametrize(("first", "cached", "shown"), [(True, True, True), (False, True, False), (False, False, True), (True, False, True)])  # fmt: skip
def test_images_go_in_with_the_prompt_and_again_only_where_nothing_is_cached(
    first: bool, cached: bool, shown: bool, seeing: Any
) -> None:
    inputs = seeing.prepare_inputs_for_generation(
        prompt(), is_first_iteration=first, use_cache=cached,
        pixel_values=torch.zeros(1, 3, pictures.SIZE, pictures.SIZE),
    )  # fmt: skip
    assert ("pixel_values" in inputs) is shown


def test_the_placeholders_of_an_image_are_no_padding(seeing: Any) -> None:
    from transformers import GenerationConfig

    asked = GenerationConfig(pad_token_id=370, eos_token_id=1)
    asked._pad_token_tensor, asked._eos_token_tensor = torch.tensor(370), torch.tensor([1])
    ids = torch.cat([torch.tensor([[370]]), prompt()], 1)
    mask = seeing._prepare_attention_mask_for_generation(ids, asked, {})
    assert mask.tolist() == [[0, 1, 1, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("length", "cached", "given", "looks"),
    [
        (1, None, False, True), (1, 0, False, True), (1, 3, False, False), (2, 3, False, True),
        (1, 3, True, True),
    ],
)  # fmt: skip
def test_images_are_looked_for_but_in_a_replys_next_token(
    length: int, cached: int | None, given: bool, looks: bool, seeing: Any
) -> None:
    inner = seeing.transformer
    cache = None if cached is None else Cache(cached)
    images = (torch.zeros(1) if given else None, None)
    ids = torch.zeros(1, length, dtype=torch.long)
    assert inner._may_show(ids, cache, images) is looks
    assert inner._may_show(None, cache, images) is given


@pytest.mark.parametrize("shared", [False, True])
def test_a_tower_that_is_dealt_out_runs_in_every_process_also_where_nothing_learns(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_model(pictures.save_model(tmp_path / "model"))
    model.requires_grad_(False)
    ran: list[int] = []
    tower = model.transformer.vision
    real = type(tower).nothing
    monkeypatch.setattr(type(tower), "nothing", lambda self: ran.append(1) or real(self))
    if shared:
        next(tower.parameters()).ds_id = 0
    with torch.no_grad():
        model(IDS)
    assert len(ran) == shared


# --- the tokenizer -----------------------------------------------------------------------------------


def test_a_tokenizer_keeps_what_it_is_told_and_pads_on_the_left_otherwise(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path, tiktoken=True)
    source = {"vocab_file": str(tmp_path / "tokenizer.model")}

    def made(**told: Any) -> dict[str, Any]:
        return ChatGLM4Tokenizer.convert_to_native_format(**source, **told)

    plain = made(auto_map={"x": 1})
    assert (plain["padding_side"], plain["eos_token"], plain["pad_token"]) == ("left", "<|endoftext|>", "<|endoftext|>")  # fmt: skip
    assert "auto_map" not in plain
    assert "[gMASK]" in plain["chat_template"]
    told = made(padding_side="right", eos_token="<|user|>", pad_token="[MASK]", chat_template="x")
    assert (told["padding_side"], told["eos_token"], told["pad_token"], told["chat_template"]) == ("right", "<|user|>", "[MASK]", "x")  # fmt: skip


# --- kernels -----------------------------------------------------------------------------------------


def test_a_kernel_is_used_when_it_deviates_by_its_band_at_most_and_by_a_number() -> None:
    assert check._problem(lambda: [0.0, 0.01], 0.01) is None
    assert "differs from torch by 2.0e-02" in str(check._problem(lambda: [0.0, 0.02], 0.01))
    assert "differs from torch by nan" in str(check._problem(lambda: [float("nan")], 0.01))
    assert check._problem(lambda: 1 / 0, 0.01) == "ZeroDivisionError: division by zero"  # type: ignore[arg-type, return-value]
    assert {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3} == check.BANDS


def test_inside_of_running_kernels_those_before_come_back_after_an_error() -> None:
    x = torch.zeros(1)

    def inside() -> None:
        with kernels.running(("rotate",), "cpu"):
            assert kernels.runs("rotate", x)
            assert not kernels.runs("swiglu", x)
            raise ValueError("broken")

    with kernels.running(("swiglu",), "cpu"):
        with pytest.raises(ValueError, match="broken"):
            inside()
        assert kernels.runs("swiglu", x)
        assert not kernels.runs("rotate", x)
    assert not kernels.runs("swiglu", x)


def test_only_silu_has_a_kernel_in_transformers_layers(tiny_glm: Path, tmp_path: Path) -> None:
    other = tiny.save_model(tmp_path / "gelu", "glm", hidden_act="gelu")
    for folder, ours in ((tiny_glm, True), (other, False)):
        model = load_model(folder)
        kinds = [type(m) for n, m in model.named_modules() if n.endswith(".mlp")]
        assert all((kind in stock_layers._OURS.values()) is ours for kind in kinds)


@pytest.mark.parametrize("place", [1, 2])
def test_heads_that_lie_elsewhere_are_turned_by_transformers(place: int) -> None:
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

    states = torch.randn(2, 1, 3, 4, 8).unbind(0)
    given = [one.transpose(1, 2) if place == 2 else one for one in states]
    angles = torch.arange(4.0)[None, :, None] * torch.tensor([1.0, 0.1])
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    with torch.no_grad():
        found = apply_rotary_pos_emb(*given, cos, sin, unsqueeze_dim=place)
    half = [part[:, None, :, :2] for part in (cos, sin)]
    for one, turned in zip(states, found, strict=True):
        expected = torch_forms.rotate(one.requires_grad_(False), *half)
        torch.testing.assert_close(turned.transpose(1, 2) if place == 2 else turned, expected)


# --- mixtures ------------------------------------------------------------------------------------------


def test_padding_on_the_right_is_not_counted_and_the_same_token_inside_is() -> None:
    ids = torch.tensor([[7, 0, 8, 0, 0], [0, 7, 7, 7, 7]])
    real = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    found = _real_tokens(ids, None, 0)
    assert found is not None
    assert found.int().tolist() == real
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    given = _real_tokens(ids, mask, 0)
    assert given is not None
    assert given.tolist() == mask.bool().tolist()
    assert _real_tokens(None, None, 0) is None
    assert _real_tokens(ids, None, None) is None
    assert _real_tokens(ids, mask[None, None], None) is None


def test_counts_begin_again_when_they_were_read_and_are_none_where_a_layer_was_not_used() -> None:
    use = ExpertUse([1, 2], 3)
    with use.counting(torch.tensor([[True, False]])):
        use.add(0, torch.tensor([[0, 1], [0, 2]]))
        use.add(1, torch.tensor([[2, 1], [0, 2]]))
    use.add(0, torch.tensor([[0, 1], [0, 2]]))  # recomputed
    assert use.read() == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    with use.counting(None):
        use.add(0, torch.tensor([[0, 1]]))
    assert use.read() == [0.0] * 6
    with use.counting(None):
        use.add(0, torch.tensor([[2, 1]]))
        use.add(1, torch.tensor([[2, 1]]))
    assert use.read() == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]


def test_layers_in_front_of_and_behind_the_mixtures_are_told() -> None:
    assert layers_for_prediction(SimpleNamespace(num_hidden_layers=5, num_nextn_predict_layers=2)) == [5, 6]  # fmt: skip
    assert layers_for_prediction(SimpleNamespace(num_hidden_layers=5, num_nextn_predict_layers=None)) == []  # fmt: skip
    text = SimpleNamespace(n_routed_experts=4, first_k_dense_replace=2, mlp_layer_types=None)
    assert first_dense(text) == 2
    text.mlp_layer_types = ["dense", "sparse", "sparse"]
    assert first_dense(text) == 1
    text.mlp_layer_types = ["dense"] * 3
    assert first_dense(text) == 3
    assert first_dense(SimpleNamespace()) == 0


@pytest.mark.parametrize("family", ["glm4_moe", "glm4_moe_lite"])
def test_layers_that_predict_ahead_may_lie_in_a_folder_at_the_published_depth_and_at_ones_own(
    family: str, tmp_path: Path
) -> None:
    model: Any = load_model(tiny.save_model(tmp_path / "model", family))
    published: set[str] = set()
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.models"):
            published |= set(kind.__dict__.get("_keys_to_ignore_on_load_unexpected") or ())
    assert published
    assert published <= set(model._keys_to_ignore_on_load_unexpected)
    ahead = layers_for_prediction(model.config)
    own = {rf"model\.layers\.{number}\." for number in ahead}
    assert own <= set(model._keys_to_ignore_on_load_unexpected)
