"""GLM-4V in the published layout against references made with the published code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import additions, assert_close, assert_same_gradients, rounding
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import finetune.models  # noqa: F401 - registers the classes
from finetune.errors import ModelError
from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from finetune.models.families import FAMILIES
from finetune.models.load import load_model

BOI, PATCH, EOI, NUM_PATCHES = 1010, 1000, 1011, 16
Golden = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(glm4_assets: Path) -> Path:
    return glm4_assets / "golden/glm4v/glm4v_tiny"


@pytest.fixture(scope="module")
def golden(glm4_assets: Path) -> Golden:
    return dict(np.load(glm4_assets / "golden/glm4v/glm4v_tiny.npz"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder)


def tensor(golden: Golden, name: str) -> torch.Tensor:
    return torch.from_numpy(golden[name])


def expanded(ids: torch.Tensor) -> torch.Tensor:
    """The three published tokens of an image as the model wants them: boi, 16 patches, eoi."""
    rows = []
    for row in ids.tolist():
        at = row.index(BOI)
        rows.append([*row[: at + 1], *[PATCH] * NUM_PATCHES, *row[at + 2 :]])
    return torch.tensor(rows)


def assert_published(model: Any, ours: torch.Tensor, golden: Golden, name: str) -> None:
    """`ours` is the published code's `name` up to the order of additions."""
    assert_close(ours, tensor(golden, name), additions(model.config, 39), name)


@torch.no_grad()
def test_logits_and_hidden_states_are_the_published_ones(model: Any, golden: Golden) -> None:
    ids = expanded(tensor(golden, "image_single.input_ids"))
    blocks: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: blocks.append(out))
        for block in model.transformer.encoder.layers
    ]
    first = model.transformer.encoder.layers[0].register_forward_pre_hook(
        lambda _m, args: blocks.append(args[0])
    )
    out = model(input_ids=ids, pixel_values=tensor(golden, "image_single.images"))
    for hook in [*hooks, first]:
        hook.remove()
    assert_published(model, out.logits, golden, "image_single.logits")
    assert len(blocks) == 4
    for number, hidden in enumerate(blocks):
        assert_published(model, hidden, golden, f"image_single.hidden_{number}")


@torch.no_grad()
def test_the_tower_sees_what_the_published_one_sees(model: Any, golden: Golden) -> None:
    vision, pixels = model.transformer.vision, tensor(golden, "image_single.images")
    patches = vision.patch_embedding(pixels)
    for name, seen in (
        ("patch_embed", patches),
        ("tower", vision.transformer(patches)),
        ("features", vision(pixels)),
    ):
        assert_published(model, seen, golden, f"image_single.vision_{name}")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_the_published_ones(
    folder: Path, golden: Golden, checkpointing: bool
) -> None:
    model = load_model(folder).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        assert model.transformer.vision.transformer.layers[0].gradient_checkpointing
    loss = model(
        input_ids=expanded(tensor(golden, "image_single.input_ids")),
        pixel_values=tensor(golden, "image_single.images"),
        labels=tensor(golden, "image_single.labels_expanded"),
    ).loss
    assert_published(model, loss, golden, "image_single.loss")
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    start, sums = "image_single.grad.", additions(model.config, 39)
    expected = {n.removeprefix(start): tensor(golden, n) for n in golden if n.startswith(start)}
    assert len(expected) == 9
    assert_same_gradients({name: gradients[name] for name in expected}, expected, sums)
    names, values = (golden[f"image_single.gradnorms.{part}"] for part in ("names", "values"))
    assert set(gradients) == set(names.tolist())
    for name, norm in zip(names.tolist(), values.tolist(), strict=True):
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=rounding(2 * sums)), name


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: Any, golden: Golden, side: str) -> None:
    case = f"image_{side}pad"
    ids, mask = expanded(tensor(golden, f"{case}.input_ids")), f"{case}.attention_mask_expanded"
    images = tensor(golden, "image_leftpad.images")
    out = model(input_ids=ids, pixel_values=images, attention_mask=tensor(golden, mask))
    real = tensor(golden, mask) == 1
    sums = additions(model.config, 39)
    assert_close(out.logits[real], tensor(golden, f"{case}.logits")[real], sums)
    for row in range(2):
        alone = ids[row][real[row]][None]
        logits = model(input_ids=alone, pixel_values=images[row : row + 1]).logits[0]
        assert_close(logits, out.logits[row][real[row]], sums)


@torch.no_grad()
def test_text_alone_is_the_published_text_model(model: Any, golden: Golden) -> None:
    logits = model(input_ids=tensor(golden, "text_single.input_ids")).logits
    assert_published(model, logits, golden, "text_single.logits")
    for case in ("text_leftpad", "text_rightpad"):
        mask = tensor(golden, f"{case}.attention_mask")
        logits = model(input_ids=tensor(golden, f"{case}.input_ids"), attention_mask=mask).logits
        real, expected = mask == 1, tensor(golden, f"{case}.logits")
        assert_close(logits[real], expected[real], additions(model.config, 20))


@pytest.mark.parametrize("case", ["gen_text", "gen_image"])
def test_greedy_tokens_are_the_published_ones(model: Any, golden: Golden, case: str) -> None:
    raw = tensor(golden, f"{case}.input_ids")
    ids, images = raw, {}
    if case == "gen_image":
        ids = expanded(raw)
        images = {"pixel_values": tensor(golden, f"{case}.images")}
    for use_cache in (True, False):
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **images, use_cache=use_cache,
            max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=PATCH,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        new = out.sequences[:, ids.shape[1] :]
        assert new.tolist() == golden[f"{case}.sequences"][:, raw.shape[1] :].tolist()
        scores = torch.stack(out.scores, dim=1)
        assert_published(model, scores, golden, f"{case}.scores")


def test_a_left_padded_batch_with_and_without_images_decodes_like_its_rows(
    model: Any, golden: Golden
) -> None:
    with_image, text = (
        expanded(tensor(golden, "gen_image.input_ids")),
        tensor(golden, "gen_text.input_ids"),
    )
    width = with_image.shape[1]
    pad = width - text.shape[1]
    ids = torch.cat([torch.cat([torch.full((1, pad), PATCH), text], 1), with_image])
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    new = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=tensor(golden, "gen_image.images"),
        max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=PATCH,
    )[:, width:]  # fmt: skip
    assert new[0].tolist() == golden["gen_text.sequences"][0, text.shape[1] :].tolist()
    assert new[1].tolist() == golden["gen_image.sequences"][0, 15:].tolist()


@torch.no_grad()
def test_a_decoding_loop_of_ones_own_needs_no_positions(model: Any, golden: Golden) -> None:
    ids = expanded(tensor(golden, "gen_image.input_ids"))
    out = model(input_ids=ids, pixel_values=tensor(golden, "gen_image.images"), use_cache=True)
    new = []
    for _ in range(8):
        token = out.logits[:, -1:].argmax(-1)
        new.append(int(token))
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    assert new == golden["gen_image.sequences"][0, 15:].tolist()


@torch.no_grad()
def test_bfloat16_moves_the_logits_less_from_the_published_ones_than_those_from_float32(
    folder: Path, golden: Golden, glm4_assets: Path
) -> None:
    # Kernels sum products of bfloat16 matrices in orders of their own. Two runs that rounded
    # independently would lie sqrt(2) times as far from each other as each lies from float32.
    file = glm4_assets / "golden/glm4v/glm4v_tiny_bf16_image_leftpad.npz"
    published = torch.from_numpy(np.load(file)["logits"])
    mask = tensor(golden, "image_leftpad.attention_mask_expanded")
    ours = load_model(folder, dtype="bfloat16")(
        input_ids=expanded(tensor(golden, "image_leftpad.input_ids")),
        pixel_values=tensor(golden, "image_leftpad.images"), attention_mask=mask,
    ).logits.float()  # fmt: skip
    rounded_away = published - tensor(golden, "image_leftpad.logits")
    apart, allowed = ((found[mask == 1] ** 2).mean() for found in (ours - published, rounded_away))
    assert apart < allowed


def test_both_auto_classes_open_the_folder(folder: Path) -> None:
    assert AutoConfig.from_pretrained(folder).vision_config.image_size == 112
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        opened = auto.from_pretrained(folder, trust_remote_code=False)
        assert type(opened) is ChatGLMForConditionalGeneration
        assert opened.transformer.vision is not None


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_repeated_positions_are_not_taken_for_packing(
    folder: Path, golden: Golden, attention: str
) -> None:
    model = load_model(folder, attention=attention)
    ids = expanded(tensor(golden, "image_single.input_ids"))
    images = {"pixel_values": tensor(golden, "image_single.images")}
    positions = tensor(golden, "image_single.position_ids_expanded")
    assert _is_packed_sequence(positions, 1)  # the trap: so transformers would take them
    derived = model(input_ids=ids, **images).logits
    given = model(input_ids=ids, **images, position_ids=positions).logits
    masked = model(input_ids=ids, **images, attention_mask=torch.ones_like(ids)).logits
    for logits in (derived, given, masked):
        assert_published(model, logits, golden, "image_single.logits")


@torch.no_grad()
def test_attention_functions_never_see_positions(folder: Path, golden: Golden) -> None:
    # Flash attention cuts a row into documents by the positions that it is given.
    seen: list[set[str]] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append({name for name, value in kwargs.items() if value is not None})
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    AttentionInterface.register("spy", spy)
    model = load_model(folder)
    model.config._attn_implementation = "spy"
    model(
        input_ids=expanded(tensor(golden, "image_single.input_ids")),
        pixel_values=tensor(golden, "image_single.images"),
        position_ids=tensor(golden, "image_single.position_ids_expanded"),
    )
    assert len(seen) == 3
    assert not any("position" in name or "cu_seq" in name for names in seen for name in names)


@torch.no_grad()
def test_documents_with_images_in_one_row_are_blind_to_each_other(
    model: Any, golden: Golden
) -> None:
    ids = expanded(tensor(golden, "image_leftpad.input_ids"))
    images, mask = (
        tensor(golden, "image_leftpad.images"),
        golden["image_leftpad.attention_mask_expanded"],
    )
    documents = [row[torch.from_numpy(m == 1)] for row, m in zip(ids, mask, strict=True)]
    positions = [
        tensor(golden, "image_leftpad.position_ids_expanded")[row][torch.from_numpy(mask[row] == 1)]
        for row in range(2)
    ]
    packed = model(
        input_ids=torch.cat(documents)[None], pixel_values=images,
        position_ids=torch.cat(positions)[None], use_cache=False,
    ).logits[0]  # fmt: skip
    alone = [
        model(input_ids=document[None], pixel_values=images[row : row + 1]).logits[0]
        for row, document in enumerate(documents)
    ]
    assert_close(packed, torch.cat(alone), additions(model.config, 39))


def test_a_text_batch_reaches_every_weight_of_a_trained_tower_and_changes_nothing(
    folder: Path, golden: Golden
) -> None:
    model = load_model(folder).train()
    text = {"input_ids": tensor(golden, "text_single.input_ids")}
    loss = model(**text, labels=text["input_ids"]).loss
    loss.backward()
    tower = dict(model.transformer.vision.named_parameters())
    assert all(weight.grad is not None and not weight.grad.any() for weight in tower.values())
    model.transformer.vision.requires_grad_(False)
    called: list[int] = []
    model.transformer.vision.register_forward_hook(lambda *_: called.append(1))
    assert model(**text, labels=text["input_ids"]).loss.item() == loss.item()
    assert not called  # a frozen tower costs a text batch nothing


def test_a_frozen_tower_runs_without_a_graph(folder: Path, golden: Golden) -> None:
    model = load_model(folder).train()
    model.transformer.vision.requires_grad_(False)
    features = []
    model.transformer.vision.register_forward_hook(lambda _m, _i, out: features.append(out))
    model(
        input_ids=expanded(tensor(golden, "image_single.input_ids")),
        pixel_values=tensor(golden, "image_single.images"),
        labels=tensor(golden, "image_single.labels_expanded"),
    ).loss.backward()
    assert not features[0].requires_grad
    assert model.transformer.encoder.layers[0].mlp.dense_4h_to_h.weight.grad is not None


def test_images_and_spans_must_agree(model: Any, golden: Golden) -> None:
    raw, images = tensor(golden, "image_single.input_ids"), tensor(golden, "image_single.images")
    with pytest.raises(ValueError, match="1 images for 0 image spans"):
        model(input_ids=raw, pixel_values=images)
    with pytest.raises(ValueError, match="1 image spans in input_ids but no pixel_values"):
        model(input_ids=expanded(raw))
    with pytest.raises(ValueError, match="2 images for 1 image spans"):
        model(input_ids=expanded(raw), pixel_values=torch.cat([images, images]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_positions": 64}, "64 positions do not fit an image of 112 pixels"),
        ({"hidden_act": "relu"}, "hidden_act` is 'relu'"),
        ({"patch_size": None}, "vision_config.patch_size` is missing"),
    ],
)
def test_a_vision_config_of_another_model_is_refused(
    folder: Path, change: dict[str, Any], reason: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= change
    with pytest.raises(ModelError, match=reason):
        ChatGLMConfig.from_dict(config)


def test_lora_hits_the_text_unless_the_tower_is_asked_for(model: Any) -> None:
    pattern = re.compile(FAMILIES["chatglm"].lora_targets)
    hit = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    assert len(hit) == 3 * 4
    assert not any("vision" in name for name in hit)
