"""Families whose images keep their shape: several images in any turn give transformers' own numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pictures
import pytest
import runs
import tiny
import torch
import transformers
from closeness import SMOOTH_STEPS, assert_trained_alike
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.artifacts.plain_files import read_json
from finetune.config.schema import LoraMethod
from finetune.errors import ConfigError, ModelError
from finetune.export.merge import merge
from finetune.generation.load import open_model
from finetune.methods import attach
from finetune.models.families import FAMILIES
from finetune.models.load import load_model

FAMILIES_OF_GRIDS = sorted(pictures.GRID_FAMILIES)
ADAPTED = {"glm4v_moe": 4 * 3 + 3 + 3 * 2}
"""Layers of the text; of a mixture attention, the dense layer and the shared experts. Else 6 in each of two."""
SHAPES = [(4, 4), (4, 6), (2, 8), (6, 4), (2, 2)]
"""Height and width of images, in patches."""


@dataclass(frozen=True)
class Pair:
    """Our model and transformers' own, of one folder."""

    folder: Path
    ours: Any
    theirs: Any

    def row(self, *parts: int | tuple[int, int]) -> list[int]:
        """Token ids of text, and of images by their shapes."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                patches = [self.ours.config.image_token_id] * (part[0] * part[1] // 4)
                ids += [pictures.BOI, *patches, pictures.EOI]
        return ids

    def shown(self, *shapes: tuple[int, int]) -> dict[str, Tensor]:
        """What the image processor would make of images of these shapes."""
        if not shapes:
            return {}
        generator = torch.Generator().manual_seed(0)
        width = 3 * 2 * 14 * 14
        pixels = [torch.randn(h * w, width, generator=generator) for h, w in shapes]
        grid = torch.tensor([(1, *shape) for shape in shapes])
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": grid}

    def kinds(self, ids: Tensor) -> dict[str, Tensor]:
        """What their processor gives besides."""
        return {"mm_token_type_ids": (ids == self.ours.config.image_token_id).int()}


@pytest.fixture(scope="module", params=FAMILIES_OF_GRIDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = pictures.save_grid_model(tmp_path_factory.mktemp(request.param), request.param)
    (name,) = read_json(folder / "config.json")["architectures"]
    theirs = getattr(transformers, name).from_pretrained(folder).eval()
    assert type(theirs).__module__.startswith("transformers.")
    return Pair(folder, load_model(folder), theirs)


def closeness(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


TWO_TURNS = (1, 2, *SHAPES[:2], 7, 8, 9, SHAPES[2], 5, *SHAPES[3:], 6)


@pytest.mark.parametrize(
    "parts", [(1, 2, 3, 4), (1, 2, SHAPES[1], 3), TWO_TURNS], ids=["text", "image", "images"]
)
def test_logits_are_transformers_own(pair: Pair, parts: tuple[Any, ...]) -> None:
    ids = torch.tensor([pair.row(*parts)])
    shown = pair.shown(*[part for part in parts if not isinstance(part, int)])
    with torch.no_grad():
        ours = pair.ours(input_ids=ids, **shown).logits
        theirs = pair.theirs(input_ids=ids, **shown, **pair.kinds(ids)).logits
    assert closeness(ours, theirs) < 1e-5
    if shown:
        blank = shown | {"pixel_values": 0 * shown["pixel_values"]}
        with torch.no_grad():
            assert closeness(pair.ours(input_ids=ids, **blank).logits[:, -1], ours[:, -1]) > 1e-3


def padded(rows: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), tiny.PAD_ID), torch.zeros(len(rows), width).long()
    for number, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, at], mask[number, at] = torch.tensor(row), 1
    return ids, mask


@pytest.mark.parametrize("left", [True, False])
def test_a_batch_of_rows_with_and_without_images_is_transformers_own(
    pair: Pair, left: bool
) -> None:
    rows = [pair.row(1, 2, 3), pair.row(*TWO_TURNS), pair.row(4, SHAPES[0], SHAPES[4], 5)]
    ids, mask = padded(rows, left=left)
    shown = pair.shown(*SHAPES, SHAPES[0], SHAPES[4])
    with torch.no_grad():
        ours = pair.ours(input_ids=ids, attention_mask=mask, **shown).logits
        given = {"attention_mask": mask, **shown, **pair.kinds(ids)}
        theirs = pair.theirs(input_ids=ids, **given).logits
    assert closeness(ours[mask.bool()], theirs[mask.bool()]) < 1e-5


def test_replies_with_a_cache_are_transformers_own(pair: Pair) -> None:
    rows = [pair.row(1, 2, 3), pair.row(*TWO_TURNS)]
    ids, mask = padded(rows, left=True)
    shown, fixed = pair.shown(*SHAPES), {"max_new_tokens": 8, "do_sample": False}
    fixed |= {"eos_token_id": None, "pad_token_id": tiny.PAD_ID}
    with torch.no_grad():
        theirs = pair.theirs.generate(
            input_ids=ids, attention_mask=mask, **shown, **pair.kinds(ids), **fixed
        )
        ours = pair.ours.generate(input_ids=ids, attention_mask=mask, **shown, **fixed)
        written = torch.tensor([rows[1]])
        for _ in range(8):
            step = pair.ours(input_ids=written, **shown).logits[:, -1:].argmax(-1)
            written = torch.cat([written, step], dim=1)
    assert torch.equal(ours, theirs)
    assert ours[1, ids.shape[1] :].tolist() == written[0, len(rows[1]) :].tolist()


@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_packed_dialogues_with_images_are_as_blind_to_each_other_as_rows(
    pair: Pair, attention: str
) -> None:
    model = pair.ours if attention == "auto" else load_model(pair.folder, attention=attention)
    rows = [pair.row(1, 2, *SHAPES[:2], 3), pair.row(4, 5, 6), pair.row(7, SHAPES[3], 8)]
    shown = [pair.shown(*SHAPES[:2]), {}, pair.shown(SHAPES[3])]
    places, alone = [], []
    with torch.no_grad():
        for row, images in zip(rows, shown, strict=True):
            ids = torch.tensor([row])
            counted = torch.arange(len(row)).expand(3, 1, -1)
            if images:
                grid = images["image_grid_thw"]
                counted, _ = pair.theirs.model.get_rope_index(ids, **pair.kinds(ids), image_grid_thw=grid)  # fmt: skip
            places.append(counted)
            alone.append(model(input_ids=ids, **images, use_cache=False).logits)
        together = {
            name: torch.cat([one[name] for one in shown if one])
            for name in ("pixel_values", "image_grid_thw")
        }
        packed = model(
            input_ids=torch.tensor([[token for row in rows for token in row]]), position_ids=torch.cat(places, dim=2),
            use_cache=False, **together,
        ).logits  # fmt: skip
    assert closeness(packed, torch.cat(alone, dim=1)) < 1e-5


def test_features_in_the_place_of_pixels_give_the_same_logits(pair: Pair) -> None:
    ids = torch.tensor([pair.row(*TWO_TURNS)])
    shown = pair.shown(*SHAPES)
    with torch.no_grad():
        seen = pair.ours.model.get_image_features(**shown).pooler_output
        kept = {"image_features": torch.cat(seen), "image_grid_thw": shown["image_grid_thw"]}
        with_pixels = pair.ours(input_ids=ids, **shown).logits
        with_features = pair.ours(input_ids=ids, **kept).logits
    assert torch.equal(with_features, with_pixels)
    with pytest.raises(ValueError, match="either pixel_values or image_features"):
        pair.ours(input_ids=ids, **shown | kept)


@pytest.mark.parametrize("left", [True, False])
def test_images_in_rows_of_the_token_table_give_the_logits_of_ids(pair: Pair, left: bool) -> None:
    rows = [pair.row(1, 2, 3), pair.row(*TWO_TURNS), pair.row(4, SHAPES[0], SHAPES[4], 5)]
    ids, mask = padded(rows, left=left)
    shown = pair.shown(*SHAPES, SHAPES[0], SHAPES[4]) | {"attention_mask": mask}
    with torch.no_grad():
        embeds = pair.ours.get_input_embeddings()(ids)
        of_ids = pair.ours(input_ids=ids, **shown).logits
        deltas = pair.ours.model.rope_deltas
        pair.ours.model.rope_deltas = None
        of_rows = pair.ours(inputs_embeds=embeds, **shown).logits
        assert torch.equal(pair.ours.model.rope_deltas, deltas)
        assert torch.equal(of_rows[mask.bool()], of_ids[mask.bool()])
        counted = torch.arange(ids.shape[1]).expand(3, len(rows), -1)
        own = pair.ours(inputs_embeds=embeds, position_ids=counted, **shown).logits
        same = pair.ours(input_ids=ids, position_ids=counted, **shown).logits
    assert torch.equal(own, same)
    assert not torch.equal(own[mask.bool()], of_ids[mask.bool()])


def test_replies_to_rows_of_the_token_table_are_those_to_ids(pair: Pair) -> None:
    ids, shown = torch.tensor([pair.row(*TWO_TURNS)]), pair.shown(*SHAPES)
    fixed = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    replies = pair.ours.generate(ids, **shown, **fixed)[:, ids.shape[1] :]
    embeds = pair.ours.get_input_embeddings()(ids)
    assert torch.equal(pair.ours.generate(inputs_embeds=embeds, **shown, **fixed), replies)


def test_every_argument_of_a_loss_arrives(pair: Pair) -> None:
    ids = torch.tensor([pair.row(1, SHAPES[4], 2, 3, 4)] * 2)
    shown = pair.shown(SHAPES[4], SHAPES[4])
    weights = torch.arange(ids.numel()).view(ids.shape) / 10
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    with torch.no_grad():
        logits = pair.ours(input_ids=ids, attention_mask=mask, **shown).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")  # fmt: skip
        given = {"attention_mask": mask, "labels": ids, "loss_weights": weights, **shown}
        found = pair.ours(ids, num_items_in_batch=7.0, **given).loss
        torch.testing.assert_close(found, (losses * weights[:, 1:]).sum() / 7)
        last = pair.ours(input_ids=ids, attention_mask=mask, logits_to_keep=2, **shown).logits
        torch.testing.assert_close(last, logits[:, -2:])
        cached = pair.ours(input_ids=ids, attention_mask=mask, use_cache=True, **shown)
        assert cached.past_key_values.get_seq_length() == ids.shape[1]
        assert pair.ours(input_ids=ids, attention_mask=mask, use_cache=False, **shown).past_key_values is None  # fmt: skip


def test_attentions_are_given_when_they_are_asked_for(pair: Pair) -> None:
    model = load_model(pair.folder, attention="eager")
    ids = torch.tensor([pair.row(1, SHAPES[4], 2)])
    for part in (model, model.model):
        seen = part(input_ids=ids, **pair.shown(SHAPES[4]), output_attentions=True)
        assert len(seen.attentions) == model.config.get_text_config().num_hidden_layers
        plain = part(input_ids=ids, **pair.shown(SHAPES[4]))
        assert getattr(plain, "attentions", None) is None


def test_lora_on_text_and_vision_adapts_the_layers_of_both_and_no_others(pair: Pair) -> None:
    family = FAMILIES[pair.ours.config.model_type]
    section = LoraMethod(rank=2, target_modules=["text", "vision"])
    adapted = attach(load_model(pair.folder), section)
    named = {
        name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name
    }
    seeing = {name for name in named if ".visual." in name}
    assert len(seeing) == 5 * 2 + 4
    assert len(named - seeing) == ADAPTED.get(family.model_type, 6 * 2)
    assert family.head not in " ".join(named)
    with pytest.raises(ConfigError, match="freeze covers every layer"):
        attach(load_model(pair.folder), LoraMethod(target_modules=["vision"]), freeze=["vision"])


@pytest.mark.parametrize("kind", ["glm4v", "glm46v", "glm_ocr"])
def test_at_full_size_every_layer_of_both_parts_is_found_by_its_name(kind: str) -> None:
    family = FAMILIES[kind]
    config = family.config_class()  # transformers' own values are the published ones
    with torch.device("meta"):
        names = [name for name, _ in family.model_class(config).named_modules()]
    layers = config.get_text_config().num_hidden_layers

    def found(pattern: str | None) -> int:
        return sum(bool(re.fullmatch(str(pattern), name)) for name in names)

    assert found(family.lora_targets) == 6 * layers
    assert found(family.attention) == layers
    assert found(family.rotary) == 1
    assert found(family.vision_lora_targets) == 5 * config.vision_config.depth + 4


@pytest.mark.parametrize("family", FAMILIES_OF_GRIDS)
def test_lora_on_both_parts_learns_and_merges_into_both(family: str, tmp_path: Path) -> None:
    model = pictures.save_grid_model(tmp_path / "model", family)
    data = pictures.write_dialogues(tmp_path / "data", 6)
    lora = {"kind": "lora", "rank": 2, "dropout": 0.0, "target_modules": ["text", "vision"]}
    settings = runs.config(
        model, data, tmp_path / "run", training__max_steps=3, training__learning_rate=1e-2,
        training__learning_rates={"vision": 2e-2}, training__activation_checkpointing=True,
    ) | {"method": lora}  # fmt: skip
    done = runs.run_here(settings)
    report = merge(Path(done["checkpoint"]), tmp_path / "merged", check="full")
    assert report.largest_difference is not None
    before, after = (load_file(one / "model.safetensors") for one in (model, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert sum(".visual." in name for name in changed) == 5 * 2 + 4
    assert sum(".language_model." in name for name in changed) == ADAPTED.get(family, 6 * 2)
    opened, merged = open_model(Path(done["checkpoint"])).model, load_model(tmp_path / "merged")
    kinds = Pair(model, merged, None)
    ids, shown = torch.tensor([kinds.row(*TWO_TURNS)]), kinds.shown(*SHAPES)
    with torch.no_grad():
        assert closeness(opened(input_ids=ids, **shown).logits, merged(input_ids=ids, **shown).logits) < 1e-4  # fmt: skip


def test_features_kept_on_disk_train_as_the_encoder_does_which_then_rests(tmp_path: Path) -> None:
    model = pictures.save_grid_model(tmp_path / "model", "glm_ocr")
    data = pictures.write_dialogues(tmp_path / "data", 6)
    lora = {"kind": "lora", "rank": 2, "dropout": 0.0}
    looks = []
    from finetune.models.vision.grids import GlmOcrModel

    original = GlmOcrModel.get_image_features
    for name in ("seen", "kept", "again"):
        settings = runs.config(
            model, data, tmp_path / name, training__max_steps=3, data__validation=None,
            data__cache_image_features=name != "seen", data__cache_dir=str(tmp_path / "cache"),
            model__freeze=["vision"], evaluation__generate=False, **SMOOTH_STEPS,
        ) | {"method": lora}  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            count: list[int] = []
            patch.setattr(
                GlmOcrModel, "get_image_features",
                lambda self, *a, seen=count, **k: (seen.append(1), original(self, *a, **k))[1],
            )  # fmt: skip
            runs.run_here(settings)
            looks.append(len(count))
    assert looks[0] > 0
    assert looks[1:] == [3, 0]
    assert_trained_alike(tmp_path / "kept", tmp_path / "seen")
    assert runs.adapter_hash(tmp_path / "again", 3) == runs.adapter_hash(tmp_path / "kept", 3)


def test_glm46v_around_a_mixture_names_the_type_to_use() -> None:
    family = FAMILIES["glm46v"]
    config = family.config_class(text_config={"model_type": "glm4v_moe_text"})
    with pytest.raises(ModelError, match="'glm4v_moe_text' is not supported; use a checkpoint"):
        family.model_class(config)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_layer_that_predicts_ahead_stays_in_what_is_saved(kind: str, tmp_path: Path) -> None:
    model = pictures.save_grid_model(tmp_path / "model", "glm_ocr")
    ahead = {"model.language_model.layers.2.eh_proj.weight": torch.randn(32, 64)}
    file = model / "model.safetensors"
    save_file(load_file(file) | ahead, file, metadata={"format": "pt"})
    data = pictures.write_albums(tmp_path / "data", 4)
    settings = runs.config(model, data, tmp_path / "run", training__max_steps=1) | {"method": {"kind": kind}}  # fmt: skip
    checkpoint = Path(runs.run_here(settings)["checkpoint"])
    merge(checkpoint, tmp_path / "merged")
    places = [tmp_path / "merged", *([checkpoint] if kind == "full" else [])]
    for place in places:
        saved = {k: v for one in place.glob("*.safetensors") for k, v in load_file(one).items()}
        assert all(torch.equal(saved[name], tensor) for name, tensor in ahead.items())
        assert saved.keys() == load_file(file).keys()
