"""Rows that show images: from the file to a batch, with nothing cut and nothing silently wrong."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import tiny
from PIL import Image
from prompt_lists import reply_prompts

from finetune.data.chat.image import ImagePrompt, ImageSpec
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message, RowError, ShownImage
from finetune.data.examples.collate import Collator
from finetune.data.examples.dataset import LengthPolicy, PreparedDataset, load_examples
from finetune.data.examples.packing import PackedDataset
from finetune.data.preview.show import show
from finetune.data.reading import images as reading_images
from finetune.data.reading.sources import ImagePolicy, Reading, SourceSpec, read_conversations
from finetune.errors import DataError

BOI, EOI, PAD = pictures.BOI, pictures.EOI, tiny.PAD_ID
SPAN = [BOI, *[PAD] * pictures.NUM_PATCHES, EOI]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glm4v")
    tiny.save_tokenizer(folder)
    config = {"model_type": "chatglm", "vision_config": pictures.VISION, "boi_token_id": BOI}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def template(model_folder: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(model_folder))


def conversation(turns: int, *, image: str | None = "x.png", words: int = 3) -> Conversation:
    messages = []
    for turn in range(turns):
        text = "hello " * words + str(turn)
        messages.append(
            Message("user", text, images=(ShownImage(image),) if image and turn == 0 else ())
        )
        messages.append(Message("assistant", f"answer {turn}"))
    return Conversation(tuple(messages), location="f:1")


def examples(path: Path, template: ChatTemplate, folder: Path, **policy: Any) -> PreparedDataset:
    rules = LengthPolicy(**{"max_length": 256} | policy)
    return load_examples([SourceSpec(str(path))], template, rules, cache_root=folder / "cache")


def test_chats_about_images_have_the_published_ids(glm4_assets: Path) -> None:
    golden = json.loads((glm4_assets / "golden/glm4v/tokenizer_golden.json").read_text("utf-8"))
    tokenizer = load_chat_tokenizer(glm4_assets / "assets" / "glm-4-9b-chat")
    asked = Message("user", "What is it?", images=(ShownImage("x.png"),))
    answered = Conversation((asked, Message("assistant", "A gradient.")))
    for patches in (1, 1600):
        spec = ImageSpec(1120, patches, 151339)
        template = ChatTemplate(replace(tokenizer, image=spec))
        for case, dialogue, reply in (
            (
                "image",
                Conversation((Message("user", "描述这张图片", images=(ShownImage("x.png"),)),)),
                1,
            ),
            ("image_answer", answered, 2),
        ):
            wanted = golden[f"{case}.gen=True"]
            at = wanted.index(151329)
            ids = template.prompt(dialogue, reply)
            assert ids == wanted[:at] + [151329] * patches + wanted[at + 1 :]
            assert template.decode(ids).count("<|endoftext|>") == 1


def test_an_image_takes_the_models_number_of_tokens_and_none_carries_loss(
    template: ChatTemplate,
) -> None:
    dialogue = conversation(2)
    rendered = template.render([dialogue])[0]
    ids = rendered.input_ids.tolist()
    assert ids.count(BOI) == 1
    start = ids.index(BOI)
    assert ids[start : start + len(SPAN)] == SPAN
    spans = template.trained_spans(rendered, dialogue, "every_reply")
    assert all(begin >= start + len(SPAN) for begin, _, _ in spans)


def test_a_prompt_that_shows_an_image_brings_its_pixels(
    template: ChatTemplate, tmp_path: Path
) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "x.png")
    shown = template.prompt(conversation(1, image=str(tmp_path / "x.png")), 1)
    assert isinstance(shown, ImagePrompt)
    assert shown.arrays()["pixel_values"].shape == (1, 3, pictures.SIZE, pictures.SIZE)
    assert not isinstance(template.prompt(conversation(1, image=None), 1), ImagePrompt)


def test_shortening_never_drops_the_turn_with_the_image(template: ChatTemplate) -> None:
    dialogue = conversation(4)
    rendered = template.render([dialogue])[0]
    whole = rendered.input_ids.tolist()
    for limit in range(len(whole) - 1, 20, -1):
        shorter = template.shorten(rendered, dialogue, limit)
        if shorter is None:
            break
        kept = [run.message for run in shorter.runs if run.message is not None]
        assert kept[:2] == [0, 1]
        assert kept[-2:] == [6, 7]
        assert len(shorter.input_ids) <= limit
        ids = shorter.input_ids.tolist()
        assert ids[ids.index(BOI) : ids.index(BOI) + len(SPAN)] == SPAN
        left = replace(dialogue, messages=tuple(dialogue.messages[place] for place in kept))
        [anew] = template.render([left])
        spans = [template.trained_spans(*of, "every_reply") for of in ((shorter, dialogue), (anew, left))]  # fmt: skip
        assert spans[0] == spans[1]
        assert len(spans[0]) == len(kept) // 2  # the first turn's reply, too
    smallest = template.render(
        [replace(dialogue, messages=dialogue.messages[:2] + dialogue.messages[6:])]
    )
    assert limit == len(smallest[0].input_ids) - 1  # dropped only when nothing else was left to go


def test_a_shortened_prompt_keeps_the_turn_with_the_image(template: ChatTemplate) -> None:
    dialogue = conversation(4)
    full = len(template.prompt(dialogue, 7))
    prompts = reply_prompts([dialogue], template, replies="last_reply", max_prompt=full - 1)
    assert prompts.counts.shortened == 1
    kept = (*dialogue.messages[:2], *dialogue.messages[4:7])
    assert list(prompts[0].prompt_ids) == template.prompt(replace(dialogue, messages=kept), 5)
    assert isinstance(prompts[0].prompt_ids, ImagePrompt)
    assert prompts[0].text.count("<|endoftext|>") == 1


def test_batches_hold_the_pixels_of_their_images_in_reading_order(
    template: ChatTemplate, tmp_path: Path
) -> None:
    path = pictures.write_dialogues(tmp_path, 6)
    data = examples(path, template, tmp_path)
    batch = Collator(PAD, image=template.image)([data[0], data[1], data[2]])
    assert batch["pixel_values"].shape == (2, 3, pictures.SIZE, pictures.SIZE)
    red, blue = (values[:, 28, 28].argmax().item() for values in batch["pixel_values"])
    assert (red, blue) == (0, 2)
    assert (batch["input_ids"] == BOI).sum(1).tolist() == [1, 0, 1]
    assert "attention_mask" not in batch
    assert "pixel_values" not in Collator(PAD, image=template.image)([data[1], data[3]])
    start = batch["input_ids"][0].tolist().index(BOI)
    assert (batch["labels"][0, start : start + len(SPAN)] == -100).all()


def test_in_a_packed_row_the_patches_of_each_image_share_a_position(
    template: ChatTemplate, tmp_path: Path
) -> None:
    data = examples(pictures.write_dialogues(tmp_path, 3), template, tmp_path)
    row = PackedDataset(data, [[0, 1, 2]])[0]
    batch = Collator(PAD, image=template.image, pad_to_multiple_of=64)([row])
    assert "attention_mask" not in batch
    assert batch["pixel_values"].shape[0] == 2
    positions = batch["position_ids"][0].tolist()
    start = 0
    for example in row:
        ids = example.input_ids.tolist()
        places = positions[start : start + len(ids)]
        if BOI in ids:
            at = ids.index(BOI)
            assert places[at : at + len(SPAN) + 1] == [at, *[at + 1] * 4, at + 2, at + 3]
        else:
            assert places == list(range(len(ids)))
        assert places[0] == 0
        assert 0 not in places[1:]
        start += len(ids)


def test_every_bad_image_is_named_with_its_line_before_anything_is_trained(
    template: ChatTemplate, tmp_path: Path
) -> None:
    path = pictures.write_dialogues(tmp_path, 12)
    (tmp_path / "images/red.png").write_bytes(b"nothing")
    (tmp_path / "images/blue.png").unlink()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["messages"][0]["image"] = "../outside.png"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as found:
        examples(path, template, tmp_path)
    message = str(found.value)
    for line, reason in (
        (1, "no image in one of the formats"),
        (3, "there is no such file"),
        (5, "'../outside.png' is outside"),
        (7, "no image in one of the formats"),
        (9, "there is no such file"),
    ):
        assert any(
            f"rows.jsonl:{line}: " in text and reason in text for text in message.split("\n")
        )
    assert "5 of 12 rows" in message


def test_images_lie_under_the_root_that_the_config_names(tmp_path: Path) -> None:
    rows = pictures.write_dialogues(tmp_path / "rows", 1)
    (tmp_path / "rows/images").rename(tmp_path / "images")

    def read(root: Path | None) -> str | None:
        images = ImagePolicy(root=str(root) if root else None, check=True)
        [found] = read_conversations([SourceSpec(str(rows))], Reading(images=images))
        return found.images[0]

    assert read(tmp_path) == str(tmp_path / "images/red.png")
    with pytest.raises(DataError, match="no such file"):
        read(None)
    row = json.loads(rows.read_text())
    row["messages"][0]["image"] = str(tmp_path / "images/red.png")
    rows.write_text(json.dumps(row))
    assert read(tmp_path) == str(tmp_path / "images/red.png")
    with pytest.raises(DataError, match=r"outside .*set data.image_root"):
        read(None)


def test_an_image_that_changes_is_looked_at_again_and_changes_the_data(
    template: ChatTemplate, tmp_path: Path
) -> None:
    path = pictures.write_dialogues(tmp_path, 4)
    first = examples(path, template, tmp_path).fingerprint
    assert examples(path, template, tmp_path).fingerprint == first
    red = tmp_path / "images/red.png"
    os.utime(red, ns=(1, 1))  # touched, not changed
    assert examples(path, template, tmp_path).fingerprint == first
    Image.new("RGB", (20, 10), "pink").save(red)
    assert examples(path, template, tmp_path).fingerprint != first
    red.write_bytes(b"")
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        examples(path, template, tmp_path)


def test_a_text_checkpoint_refuses_images_by_name(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path / "text")
    text = ChatTemplate(load_chat_tokenizer(tmp_path / "text"))
    with pytest.raises(
        DataError,
        match=r"rows\.jsonl:1: shows an image, but this checkpoint \(text, model_type None\) takes none",
    ):
        examples(pictures.write_dialogues(tmp_path, 2), text, tmp_path)


def test_data_show_has_an_image_in_one_piece(model_folder: Path, tmp_path: Path) -> None:
    shown = show(str(pictures.write_dialogues(tmp_path, 1)), model=model_folder)
    [image] = [token for token in shown.tokens if BOI in token.ids]
    assert image.ids == tuple(SPAN)
    assert image.text == "<|begin_of_image|><|endoftext|><|end_of_image|>"


def test_an_image_lost_during_the_run_is_named(template: ChatTemplate, tmp_path: Path) -> None:
    data = examples(pictures.write_dialogues(tmp_path, 1), template, tmp_path)
    (tmp_path / "images/red.png").unlink()
    with pytest.raises(DataError, match=r"rows.jsonl:1: image .*red.png: there is no such file"):
        Collator(PAD, image=template.image)([data[0]])


def test_an_image_replaced_with_equal_size_and_times_is_another_one(
    template: ChatTemplate, tmp_path: Path
) -> None:
    path = pictures.write_dialogues(tmp_path, 1)
    (tmp_path / "images/red.png").unlink()
    image = tmp_path / "images/red.bmp"
    path.write_text(path.read_text("utf-8").replace("red.png", "red.bmp"), "utf-8")
    Image.new("RGB", (20, 10), "red").save(image)
    data = examples(path, template, tmp_path)
    before = image.stat()
    Image.new("RGB", (20, 10), "blue").save(image)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(DataError, match=r"rows.jsonl:1: image .*red.bmp was replaced"):
        data[0]
    assert examples(path, template, tmp_path).fingerprint != data.fingerprint


def test_lengths_count_every_patch(template: ChatTemplate, tmp_path: Path) -> None:
    path = pictures.write_dialogues(tmp_path, 1)
    data = examples(path, template, tmp_path)
    assert data.counts.longest == len(data[0].input_ids) == int(data.lengths[0])
    with pytest.raises(DataError, match="1 dialogues are longer"):
        examples(path, template, tmp_path, max_length=int(data.lengths[0]) - 1, on_too_long="error")
    assert np.array_equal(
        data[0].input_ids[data[0].labels != -100], data[0].labels[data[0].labels != -100]
    )


def test_a_link_to_an_image_stays_under_the_root(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    for folder in (home / "inner", outside):
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(b"x")
    (home / "in.png").symlink_to("inner/x.png")
    (home / "out.png").symlink_to(outside / "x.png")
    (home / "folder").symlink_to(outside)
    (tmp_path / "alias").symlink_to(home)
    assert reading_images._under(home, "in.png") == str(home / "in.png")
    assert reading_images._under(tmp_path / "alias", "inner/x.png")  # the root itself may be a link
    for path in ("out.png", "folder/x.png"):
        with pytest.raises(RowError, match="a link that leads out of"):
            reading_images._under(home, path)
        assert reading_images._under(tmp_path, f"home/{path}")
