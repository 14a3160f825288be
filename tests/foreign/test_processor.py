"""The published model's snippet: a dialogue with a picture, by processor or tokenizer, to a reply."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import tiny
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from finetune.data.chat.image import pixels
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage
from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.processor import (
    ChatGLM4VImageProcessor,
    ChatGLM4VProcessor,
    shows_image,
    with_image_token,
)

QUESTION = "what is this"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = pictures.save_model(tmp_path_factory.mktemp("glm4v") / "model", tiktoken=True)
    values = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(values).save(place.parent / "x.png")
    return place


@pytest.fixture
def image(folder: Path) -> Image.Image:
    with Image.open(folder.parent / "x.png") as opened:
        opened.load()
    return opened


SNIPPET = {"add_generation_prompt": True, "tokenize": True, "return_tensors": "pt", "return_dict": True}  # fmt: skip


@pytest.mark.parametrize("opened", [AutoProcessor, AutoTokenizer])
def test_the_published_snippet_gives_the_ids_and_pixels_of_training(
    folder: Path, image: Image.Image, opened: Any
) -> None:
    processor = opened.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        [{"role": "user", "image": image, "content": QUESTION}], **SNIPPET
    )
    template = ChatTemplate(load_chat_tokenizer(folder))
    path = str(folder.parent / "x.png")
    asked = Conversation(
        (
            Message("user", QUESTION, images=(ShownImage(path),)),
            Message("assistant", "it is a picture"),
        )
    )
    assert inputs["input_ids"].tolist() == [list(template.prompt(asked, 1))]
    assert np.array_equal(inputs["pixel_values"][0].numpy(), pixels(path, pictures.SIZE))
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    outputs = model.generate(**inputs.to("cpu"), **options)
    assert outputs.shape == (1, inputs["input_ids"].shape[1] + 4)
    with torch.no_grad():
        seen = model(**inputs).logits
        blank = model(**dict(inputs) | {"pixel_values": torch.zeros_like(inputs["pixel_values"])})
    assert (seen - blank.logits)[:, -1].abs().max() > 0.01


def test_every_way_to_name_a_picture_shows_the_same(folder: Path, image: Image.Image) -> None:
    processor = AutoProcessor.from_pretrained(
        folder, trust_remote_code=True
    )  # there is none to run
    assert type(processor) is ChatGLM4VProcessor
    path = folder.parent / "x.png"
    coded = base64.b64encode(path.read_bytes()).decode()
    text = {"type": "text", "text": QUESTION}
    shapes: list[Any] = [
        [{"type": "image", "image": image}, text],
        [text, {"type": "image", "image": np.asarray(image)}],
        [{"type": "image", "path": str(path)}, text],
        [{"type": "image", "base64": coded}, text],
        [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded}"}}, text],
        [{"type": "image_url", "image_url": f"data:image/png;base64,{coded}"}, text],
    ]
    expected = processor.apply_chat_template(
        [{"role": "user", "image": image, "content": QUESTION}], **SNIPPET
    )
    for content in shapes:
        made = processor.apply_chat_template([{"role": "user", "content": content}], **SNIPPET)
        assert made["input_ids"].equal(expected["input_ids"])
        assert made["pixel_values"].equal(expected["pixel_values"])


TOKEN = "<|begin_of_image|><|endoftext|><|end_of_image|>"


@pytest.mark.parametrize(
    ("message", "content", "shown"),
    [
        ({"content": "hi"}, "hi", []),
        ({"content": None}, None, []),
        ({}, None, []),
        ({"content": "hi", "image": None}, "hi", []),
        ({"content": "hi", "image": "a"}, f"{TOKEN}hi", ["a"]),
        ({"content": None, "image": "a"}, TOKEN, ["a"]),
        ({"content": [{"type": "text", "text": "x"}, {"text": "y"}, {"type": "z"}]}, "xy", []),
        ({"content": []}, "", []),
        ({"content": [{"type": "image", "image": "a"}, {"text": "x"}]}, f"{TOKEN}x", ["a"]),
        ({"content": [{"text": "x"}, {"type": "image", "url": "a"}]}, f"{TOKEN}x", ["a"]),
        ({"content": [{"type": "image", "path": "a"}]}, TOKEN, ["a"]),
        ({"content": [{"type": "image", "base64": "a"}]}, TOKEN, ["a"]),
        ({"content": [{"type": "image_url", "image_url": "a"}]}, TOKEN, ["a"]),
        ({"content": [{"type": "image_url", "image_url": {"url": "a"}}]}, TOKEN, ["a"]),
        ({"content": [{"type": "image", "image": None, "url": "a"}]}, TOKEN, ["a"]),
        ({"content": [{"type": "image", "path": "b", "url": "a"}]}, TOKEN, ["a"]),
        ({"content": [{"type": "image", "url": "b"}], "image": "a"}, TOKEN, ["a", "b"]),
        ({"content": [{"type": "image", "url": n} for n in "ab"]}, TOKEN, ["a", "b"]),
    ],
)
def test_a_message_of_any_form_becomes_text_and_its_pictures(
    message: dict[str, Any], content: Any, shown: list[str]
) -> None:
    given = {"role": "user", "name": "n", **message}
    said, found = with_image_token(given)
    assert found == shown
    assert said.get("content") == content
    assert said["role"] == "user"
    assert said["name"] == "n"
    assert said.keys() - given.keys() <= {"content"}
    assert not (shown and "image" in said)
    for conversation in (given, [given], [[{"content": "hi"}, given]]):
        assert shows_image(conversation) is bool(shown)


def test_a_part_without_its_picture_is_named_and_a_text_is_no_conversation() -> None:
    with pytest.raises(ValueError, match="holds no image, url, path or base64"):
        with_image_token({"role": "user", "content": [{"type": "image", "text": "x"}]})
    assert not shows_image("a text")


def test_one_picture_is_the_most_that_a_conversation_shows(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    one = {"type": "image", "path": str(folder.parent / "x.png")}
    for row in ([one, one], [one, one, one]):
        with pytest.raises(ValueError, match="takes one image in a conversation"):
            processor.apply_chat_template([{"role": "user", "content": row}], **SNIPPET)


def test_either_end_of_a_span_that_is_cut_off_is_noticed(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    begin, end = processor.tokenizer.convert_tokens_to_ids(
        ["<|begin_of_image|>", "<|end_of_image|>"]
    )
    processor._check_special_mm_tokens([TOKEN], {"input_ids": [[begin, end]]}, [])
    for ids in ([begin], [end], [end, end]):
        with pytest.raises(ValueError, match="cut off"):
            processor._check_special_mm_tokens([TOKEN], {"input_ids": [ids]}, [])


def test_a_batch_may_mix_pictures_and_text(folder: Path, image: Image.Image) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    rows = [
        [{"role": "user", "content": "hello"}],
        [{"role": "system", "content": "hi"}, {"role": "user", "image": image, "content": ""}],
    ]
    inputs = processor.apply_chat_template(rows, processor_kwargs={"padding": True}, **SNIPPET)
    assert inputs["input_ids"].shape[0] == 2
    assert inputs["pixel_values"].shape == (1, 3, pictures.SIZE, pictures.SIZE)
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    replies = model.generate(**inputs, **options)[:, -3:]
    for row, reply in zip(rows, replies, strict=True):
        alone = processor.apply_chat_template(row, **SNIPPET)
        assert model.generate(**alone, **options)[0, -3:].equal(reply)


def test_a_saved_processor_opens_again_and_tokens_that_are_cut_are_refused(
    folder: Path, image: Image.Image, tmp_path: Path
) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    asked = [{"role": "user", "image": image, "content": QUESTION}]
    for key, tensor in processor.apply_chat_template(asked, **SNIPPET).items():
        assert again.apply_chat_template(asked, **SNIPPET)[key].equal(tensor)
    short = {"truncation": True, "max_length": 6}
    with pytest.raises(ValueError, match="an image's tokens were cut off"):
        processor.apply_chat_template(asked, processor_kwargs=short, **SNIPPET)
    with pytest.raises(ValueError, match="one image in a conversation"):
        processor.apply_chat_template([*asked, *asked], **SNIPPET)


def test_a_picture_is_never_dropped_in_silence(
    folder: Path, image: Image.Image, tmp_path: Path
) -> None:
    text = tiny.save_model(tmp_path / "text", "chatglm", tiktoken=True)
    asked = [{"role": "user", "image": image, "content": QUESTION}]
    tokenizer = AutoProcessor.from_pretrained(text)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)  # as transformers does for text models
    with pytest.raises(ValueError, match="takes none; use AutoProcessor on the folder of GLM-4V"):
        tokenizer.apply_chat_template(asked)
    plain = [{"role": "user", "content": QUESTION}]
    assert tokenizer.apply_chat_template(plain)["input_ids"]


def test_the_pipeline_for_images_and_text_writes_a_reply(folder: Path, image: Image.Image) -> None:
    talk = pipeline("image-text-to-text", model=str(folder))
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    said = talk(
        text=[{"role": "user", "content": content}],
        generate_kwargs={"max_new_tokens": 3, "do_sample": False},
    )
    assert said[0]["generated_text"][-1]["role"] == "assistant"


def test_sizes_of_images_are_the_published_ones_where_nothing_is_said() -> None:
    assert ChatGLM4VImageProcessor().patches == 1600
    config = ChatGLMConfig(vision_config=pictures.VISION, boi_token_id=1, eoi_token_id=2)
    processor = ChatGLM4VImageProcessor(pictures.SIZE, pictures.VISION["patch_size"])
    assert processor.patches == config.image_patches == pictures.NUM_PATCHES


def test_a_processor_reads_the_commit_that_is_asked_for_and_no_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.models import processor

    asked: list[Any] = []

    def fetched(path: Any, revision: Any, files: Any = None) -> Path:
        asked.append((path, revision, bool(files)))
        return folder

    monkeypatch.setattr(processor, "local_folder", fetched)
    monkeypatch.setattr(processor, "AutoTokenizer", type("T", (), {"from_pretrained": staticmethod(lambda *a, **k: k)}))  # fmt: skip
    images, told = ChatGLM4VProcessor._get_arguments_from_pretrained("org/name", revision="a1b2")
    assert (images.image_size, images.patch_size) == (pictures.SIZE, 14)
    assert told["revision"] == "a1b2"
    saved = {"image_processor": {"image_size": 28, "patch_size": 7, "image_processor_type": "X"}}
    images, _ = ChatGLM4VProcessor._get_arguments_from_pretrained("org/name", saved)
    assert (images.image_size, images.patch_size) == (28, 7)
    monkeypatch.setattr(processor, "image_spec", lambda _: None)
    told = ChatGLM4VProcessor.from_pretrained("org/name", revision="c3", trust_remote_code=True, _from_auto=True)  # fmt: skip
    assert told == {"revision": "c3"}
    assert asked == [("org/name", "a1b2", True), ("org/name", "c3", True)]


def test_a_checkpoint_of_another_family_has_no_processor_here(tmp_path: Path) -> None:
    other = pictures.save_grid_model(tmp_path / "grid")
    assert ChatGLM4VImageProcessor.of_checkpoint(other) is None
