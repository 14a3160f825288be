"""GLM-4V shows an image wherever the ids hold its span: behind a cache, in embeddings, in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pictures
import pytest
import tiny
import torch
from closeness import additions, assert_close
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache

import finetune.models  # noqa: F401 - registers the classes

SPAN = [pictures.BOI, *[tiny.PAD_ID] * pictures.NUM_PATCHES, pictures.EOI]
START, REST = [372, 374, 5, 6], [11, 12, 13]
IDS = torch.tensor([[*START, *SPAN, *REST]])
PIXELS = torch.randn(1, 3, pictures.SIZE, pictures.SIZE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.save_model(tmp_path_factory.mktemp("glm4v") / "model")


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_same(model: Any, ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(ours, expected, additions(model.config, IDS.shape[1] + 8))


@torch.no_grad()
def test_a_prompt_behind_a_cache_shows_its_image_at_the_positions_of_the_whole(model: Any) -> None:
    whole = model(input_ids=IDS, pixel_values=PIXELS).logits
    for first in (1, len(START)):
        cache = DynamicCache(config=model.config)
        model(input_ids=IDS[:, :first], past_key_values=cache)
        rest = model(input_ids=IDS[:, first:], pixel_values=PIXELS, past_key_values=cache).logits
        assert_same(model, rest, whole[:, first:])


@torch.no_grad()
def test_what_follows_a_cached_image_counts_on_from_it_also_after_cropping(model: Any) -> None:
    whole = model(input_ids=IDS, pixel_values=PIXELS).logits
    seen = len(START) + len(SPAN)
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS[:, :seen], pixel_values=PIXELS, past_key_values=cache)
    assert_same(
        model, model(input_ids=IDS[:, seen:], past_key_values=cache).logits, whole[:, seen:]
    )
    cache.crop(len(START) - IDS.shape[1])  # to before the image, which is then shown again
    rest = model(input_ids=IDS[:, len(START) :], pixel_values=PIXELS, past_key_values=cache).logits
    assert_same(model, rest, whole[:, len(START) :])


@torch.no_grad()
def test_padded_rows_behind_a_cache_are_those_of_the_whole(model: Any) -> None:
    ids = torch.cat([IDS, IDS]).clone()
    ids[1, :2] = tiny.PAD_ID
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    pixels = torch.cat([PIXELS, -PIXELS])
    whole = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache)
    rest = model(
        input_ids=ids[:, 3:], attention_mask=mask, pixel_values=pixels, past_key_values=cache
    ).logits
    assert_same(model, rest, whole[:, 3:])


@pytest.mark.parametrize("first", [len(START), len(START) + len(SPAN), len(IDS[0]) - 1])
def test_generate_goes_on_from_a_cache_as_from_nothing(model: Any, first: int) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, pixel_values=PIXELS, **options)
    cache = DynamicCache(config=model.config)
    shown = {"pixel_values": PIXELS} if first > len(START) else {}
    with torch.no_grad():
        model(input_ids=IDS[:, :first], past_key_values=cache, **shown)
    # The whole dialogue with all its images, of which the cache has seen some.
    assert model.generate(IDS, pixel_values=PIXELS, past_key_values=cache, **options).equal(
        expected
    )


def test_a_dialogue_goes_on_with_its_new_tokens_alone(model: Any) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    first = model.generate(IDS, pixel_values=PIXELS, return_dict_in_generate=True, **options)
    more = torch.cat([first.sequences, torch.tensor([[7, 8]])], dim=1)
    expected = model.generate(more, pixel_values=PIXELS, **options)
    cache = first.past_key_values
    new = more[:, cache.get_seq_length() :]
    mask = torch.ones_like(more)
    reply = model.generate(new, attention_mask=mask, past_key_values=cache, **options)
    assert reply[:, new.shape[1] :].equal(expected[:, more.shape[1] :])


@torch.no_grad()
def test_embeddings_of_a_span_show_the_image(model: Any) -> None:
    embeds = model.get_input_embeddings()(IDS)
    expected = model(input_ids=IDS, pixel_values=PIXELS).logits
    assert model(inputs_embeds=embeds, pixel_values=PIXELS).logits.equal(expected)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    replies = model.generate(inputs_embeds=embeds, pixel_values=PIXELS, **options)
    assert replies.equal(model.generate(IDS, pixel_values=PIXELS, **options)[:, IDS.shape[1] :])


def test_placeholders_are_no_padding_to_generate(model: Any) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert model.generation_config.pad_token_id in SPAN
    mask = torch.ones_like(IDS)
    expected = model.generate(IDS, attention_mask=mask, pixel_values=PIXELS, **options)
    assert model.generate(IDS, pixel_values=PIXELS, **options).equal(expected)


def test_pixels_that_no_span_takes_are_an_error(model: Any) -> None:
    text = torch.tensor([[*START, *REST]])
    calls: list[Any] = [
        lambda **given: model(input_ids=text, **given),
        lambda **given: model(inputs_embeds=model.get_input_embeddings()(text), **given),
        lambda **given: model(input_ids=text[:, -1:], past_key_values=cached(), **given),
        lambda **given: model.generate(text, max_new_tokens=2, **given),
        lambda **given: model.generate(text, max_new_tokens=2, past_key_values=cached(), **given),
    ]

    def cached() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=text[:, :3], past_key_values=cache)
        return cache

    for call in calls:
        with pytest.raises(ValueError, match="1 images for 0 image spans"):
            call(pixel_values=PIXELS)
    half = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS[:, : len(START) + 3], past_key_values=half)
    with pytest.raises(ValueError, match="ends inside an image, behind 7 tokens"):
        model.generate(IDS, pixel_values=PIXELS, past_key_values=half, max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT counts anew
@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_of_peft_stand_in_front_of_an_image_that_is_seen(
    model: Any, kind: Any
) -> None:
    torch.manual_seed(0)
    tuned = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        for parameter in tuned.prompt_encoder.parameters():
            parameter.normal_()
        seen, other = (
            tuned(input_ids=IDS, attention_mask=mask, pixel_values=pixels).logits[:, -1]
            for pixels in (PIXELS, -PIXELS)
        )
    assert (seen - other).abs().max() > 0.1
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    replies = tuned.generate(input_ids=IDS, attention_mask=mask, pixel_values=PIXELS, **options)
    step, written = seen.argmax(-1), IDS
    for _ in range(3):  # each token from all that stand before it, without a cache
        written = torch.cat([written, step[:, None]], dim=1)
        mask = torch.ones_like(written)
        with torch.no_grad():
            logits = tuned(input_ids=written, attention_mask=mask, pixel_values=PIXELS).logits
        step = logits[:, -1].argmax(-1)
    assert replies.equal(written)
