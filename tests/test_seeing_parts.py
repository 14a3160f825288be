"""Models that see, part by part: the tower's graph, spans, caches, grids of patches, and features on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pictures
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from finetune.models.chatglm.spans import Spans, positions, remember
from finetune.models.load import load_model
from finetune.models.vision.grids import GridModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.save_model(tmp_path_factory.mktemp("glm4v") / "model")


@pytest.fixture
def seeing(folder: Path) -> Any:
    return load_model(folder)


@pytest.fixture
def grid(tmp_path: Path) -> Any:
    return load_model(pictures.save_grid_model(tmp_path / "grid"))


def pixels(count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 3, pictures.SIZE, pictures.SIZE, generator=generator)


SPAN = [pictures.BOI, *[tiny.PAD_ID] * pictures.NUM_PATCHES, pictures.EOI]
IDS = torch.tensor([[10, 40, *SPAN, 41]])


# --- the tower -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learns", ["nothing", "one weight", "all"])
@pytest.mark.parametrize("grad", [True, False])
def test_what_the_tower_makes_has_a_graph_where_something_in_it_learns(
    learns: str, grad: bool, seeing: Any
) -> None:
    tower = seeing.transformer.vision.requires_grad_(learns == "all")
    if learns == "one weight":
        tower.linear_proj.gate_proj.weight.requires_grad_(True)
    assert tower.is_trained is (learns != "nothing")
    with torch.set_grad_enabled(grad):
        assert tower.features(pixels()).requires_grad is (grad and learns != "nothing")
        assert torch.is_grad_enabled() is grad
        ran: list[int] = []
        hook = tower.register_forward_hook(lambda *_: ran.append(1))
        seeing(torch.tensor([[5, 6]]))
        assert bool(ran) is (grad and learns != "nothing")
        hook.remove()


def test_a_narrow_model_takes_wide_pixels_and_features_and_the_rows_of_its_own_table(folder: Path) -> None:  # fmt: skip
    model: Any = load_model(folder, dtype="bfloat16")
    with torch.no_grad():
        seen = model(IDS, pixel_values=pixels()).logits
        features = model.transformer.vision.features(pixels())
        assert torch.equal(model(IDS, image_features=features.float()).logits, seen)
        assert torch.equal(model(IDS, pixel_values=pixels().bfloat16()).logits, seen)
        wide = load_model(folder)
        table = wide.get_input_embeddings()
        narrow = table(IDS).bfloat16()
    assert not torch.equal(narrow.float(), table(IDS))
    assert len(Spans.of_embeds(narrow, table, wide.config)) == 1


# --- spans -----------------------------------------------------------------------------------------------


def test_rows_that_are_shorter_than_an_image_show_none() -> None:
    for ids in ([1, 2, 0, 0], [1, 0, 2], [2, 1], [1], [0, 2, 1, 0]):
        given = torch.tensor([ids])
        assert len(Spans(given.eq(1), given.eq(2), 4)) == 0


class Cache:
    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


def test_a_cache_remembers_images_behind_text_and_forgets_those_that_were_cropped() -> None:
    given = torch.tensor([[5, 1, 0, 0, 2, 6]])
    spans: Any = Spans(given.eq(1), given.eq(2), 2)
    cache = Cache(0)
    remember(cache, spans)
    cache.length = 9  # three tokens of text came behind it
    remember(cache, spans)
    assert cache.standing_patches.int().tolist() == [[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]]  # type: ignore[attr-defined]  # fmt: skip
    cache.length = 15
    one = torch.zeros(1, 1)
    assert positions(one, None, cache, None).tolist() == [[13]]
    cache.length = 7  # cropped to behind the first
    assert positions(one, None, cache, None).tolist() == [[6]]
    remember(cache, spans)
    assert cache.standing_patches.shape == (1, 13)  # type: ignore[attr-defined]
    cache.length = 2
    assert positions(one, None, cache, None).tolist() == [[2]]


def test_a_mask_of_four_dimensions_says_nothing_of_positions() -> None:
    tokens, mask = torch.zeros(1, 3), torch.zeros(1, 1, 3, 3)
    assert positions(tokens, mask, None, None).tolist() == [[0, 1, 2]]


# --- generation --------------------------------------------------------------------------------------------


def test_images_that_a_cache_has_seen_are_left_out_and_wrong_numbers_are_counted_by_the_model(
    seeing: Any,
) -> None:
    twice = torch.cat([IDS, IDS], 1)
    both = pixels(2)
    shown = {"pixel_values": both, "image_features": torch.arange(2.0).view(2, 1, 1)}
    found = seeing._unseen(shown, twice, IDS.shape[1])
    assert torch.equal(found["pixel_values"], both[1:])
    assert found["image_features"].flatten().tolist() == [1.0]
    assert torch.equal(seeing._unseen(shown, twice, 0)["pixel_values"], both)
    one = {"pixel_values": both[:1]}
    assert seeing._unseen(one, twice, IDS.shape[1]) is one
    assert seeing._unseen({}, twice, 5) == {}


def test_embeddings_with_images_go_in_whole_at_the_first_step(seeing: Any) -> None:
    embeds = seeing.get_input_embeddings()(IDS)
    inputs = seeing.prepare_inputs_for_generation(
        IDS[:, :0], next_sequence_length=1, inputs_embeds=embeds, is_first_iteration=True,
        pixel_values=pixels(),
    )  # fmt: skip
    assert inputs["pixel_values"].shape[0] == 1
    mask = seeing._prepare_attention_mask_for_generation(embeds, _asked(), {})
    assert mask.tolist() == [[1] * IDS.shape[1]]


def _asked() -> Any:
    from transformers import GenerationConfig

    asked = GenerationConfig(pad_token_id=tiny.PAD_ID, eos_token_id=1)
    asked._pad_token_tensor, asked._eos_token_tensor = torch.tensor(tiny.PAD_ID), torch.tensor([1])
    return asked


def test_without_a_word_nothing_is_shown_again_behind_a_cache(seeing: Any) -> None:
    inputs = seeing.prepare_inputs_for_generation(IDS, is_first_iteration=False, pixel_values=pixels())  # fmt: skip
    assert "pixel_values" not in inputs


# --- grids -------------------------------------------------------------------------------------------------


def image_of(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A row with one image of 2 x 2 patches, which are one token."""
    ids = torch.tensor([[5, pictures.BOI, model.config.image_token_id, pictures.EOI, 6]])
    generator = torch.Generator().manual_seed(5)
    patches = torch.randn(4, 3 * 2 * 14 * 14, generator=generator)
    return ids, {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 2, 2]])}


def test_an_image_without_its_pixels_is_an_error_in_a_prompt_and_its_kinds_need_not_be_said(
    grid: Any,
) -> None:
    ids, shown = image_of(grid)
    with pytest.raises(ValueError, match="image tokens in input_ids but no pixel_values"):
        grid(input_ids=ids)
    with torch.no_grad():
        plain = grid(input_ids=ids, **shown).logits
        assert torch.equal(grid(input_ids=ids, **shown, mm_token_type_ids=torch.zeros_like(ids)).logits, plain)  # fmt: skip
        grid.model.config.return_dict = False
        assert torch.equal(grid(input_ids=ids, **shown).logits, plain)
        grid.model.config.return_dict = True
        first = grid(input_ids=ids, **shown, use_cache=True)
        assert grid.model.rope_deltas is not None
        deltas = grid.model.rope_deltas.clone()
        more = grid(input_ids=ids[:, :1], past_key_values=first.past_key_values)
    assert torch.equal(grid.model.rope_deltas, deltas), "what follows counts on from the image"
    assert more.logits.shape[1] == 1


@torch.no_grad()
def test_texts_in_one_row_are_apart_whichever_positions_say_so(grid: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    apart = torch.cat([grid(input_ids=part).logits for part in ids.split([2, 3], 1)], 1)
    flat = torch.tensor([[0, 1, 0, 1, 2]])
    three = flat.expand(3, 1, -1)
    for places in (flat, three, torch.cat([flat[None], three])):
        packed = grid(input_ids=ids, position_ids=places, use_cache=False).logits
        torch.testing.assert_close(packed, apart)


@torch.no_grad()
def test_an_empty_cache_is_a_beginning_like_none(grid: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    alone = grid(input_ids=ids).logits
    grid.model.rope_deltas = torch.tensor([[-7]])
    cache = DynamicCache(config=grid.config.get_text_config())
    assert torch.equal(grid(input_ids=ids, past_key_values=cache).logits, alone)
    assert grid.model.rope_deltas is None


@pytest.mark.parametrize("trained", [True, False])
def test_a_batch_without_images_runs_an_encoder_that_learns_and_changes_nothing(
    trained: bool, grid: Any
) -> None:
    grid.requires_grad_(trained).train()
    ids = torch.tensor([[5, 6, 7]])
    ran: list[int] = []
    grid.model.visual.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        alone = grid(input_ids=ids).logits
    assert not ran
    out = grid(input_ids=ids).logits
    assert bool(ran) is trained
    torch.testing.assert_close(out, alone)
    if trained:
        out.sum().backward()
        assert all(weight.grad is not None for weight in grid.model.visual.parameters())


def test_layers_of_a_mixture_that_sees_which_predict_ahead_may_lie_in_its_folder(tmp_path: Path) -> None:  # fmt: skip
    import json

    folder = pictures.save_grid_model(tmp_path / "model", "glm4v_moe")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    ahead = {"model.language_model.layers.3.eh_proj.weight": torch.ones(2, 2)}
    save_file(load_file(file) | ahead, file, metadata={"format": "pt"})
    load_model(folder)


def test_a_mixture_that_sees_hands_out_its_routes(tmp_path: Path) -> None:
    model: Any = load_model(pictures.save_grid_model(tmp_path / "model", "glm4v_moe"))
    said = model(input_ids=torch.tensor([[5, 6, 7]]), output_router_logits=True)
    assert type(said) is MoeCausalLMOutputWithPast
    assert len(said.router_logits) == 2
    assert type(model).forward.__annotations__["return"] is MoeCausalLMOutputWithPast
    assert type(model.model)._can_set_experts_implementation()
    assert not type(model.model).is_custom_code()


def test_only_the_whole_row_of_an_images_token_is_part_of_an_image() -> None:
    table = torch.nn.Embedding(4, 3)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[1.0, 2, 3], [1, 2, 4], [5, 2, 3], [9, 9, 9]]))
    model: Any = SimpleNamespace(config=SimpleNamespace(image_token_id=0), get_input_embeddings=lambda: table)  # fmt: skip
    kinds = GridModel.kinds_of_rows(model, table(torch.tensor([[1, 0, 2, 0, 3]])))
    assert kinds.tolist() == [[0, 1, 0, 1, 0]]
