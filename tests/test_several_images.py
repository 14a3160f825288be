"""Several images, in any user turn: from rows to prompts and batches, as the family's own processor has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pyarrow as pa
import pytest
import tiny
import torch
from pictures import NAMES, user
from prompt_lists import reply_prompts
from pyarrow import parquet

from finetune.data.chat.glm41v_image import GridSpec
from finetune.data.chat.image import ImagePrompt
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message, RowError, ShownImage
from finetune.data.dialogue.formats import RowRules, to_conversation
from finetune.data.dialogue.images import ImageRule
from finetune.data.examples.collate import Collator
from finetune.data.examples.dataset import LengthPolicy, PreparedDataset, load_examples
from finetune.data.preview.report import check, show
from finetune.data.reading.sources import SourceSpec, read_conversations
from finetune.errors import DataError
from finetune.generation.generate import generate
from finetune.generation.load import open_model
from finetune.generation.messages import message_json
from scripts.evidence import image_prompts

ANSWER = {"role": "assistant", "content": "A"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.save_grid_model(tmp_path_factory.mktemp("grid") / "model")


@pytest.fixture(scope="module")
def template(folder: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(folder))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.draw(tmp_path_factory.mktemp("drawn"))


def asked(row: dict[str, Any]) -> list[Message]:
    """The questions of a row, without word of where the places of images were read."""
    found = [m for m in to_conversation(row).messages if m.role == "user"]
    return [
        replace(m, images=tuple(image._replace(marked=False) for image in m.images)) for m in found
    ]


def image_part(name: str | None = None) -> dict[str, Any]:
    return {"type": "image", **({"image": name} if name else {})}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


LAYOUTS: dict[str, dict[str, Any]] = {
    "LLaMA-Factory": {
        "messages": [
            {"role": "user", "content": "<image>\nand <image>?"}, ANSWER,
            {"role": "user", "content": "or <image>"}, ANSWER,
        ],
        "images": [*NAMES],
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "<image>\nand <image>?"}, {"from": "gpt", "value": "A"},
            {"from": "human", "value": "or <image>"}, {"from": "gpt", "value": "A"},
        ],
        "images": [*NAMES],
    },
    "ms-swift": {
        "query": "or <image>", "response": "A", "history": [["<image>\nand <image>?", "A"]],
        "images": [{"bytes": None, "path": name} for name in NAMES],
    },
    "TRL": {
        "prompt": [
            {"role": "user", "content": [image_part(), text_part("\nand "), image_part(), text_part("?")]},
            ANSWER,
            {"role": "user", "content": [text_part("or "), image_part()]},
        ],
        "completion": [ANSWER],
        "images": [*NAMES],
    },
    "OpenAI": {
        "messages": [
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "a.png"}}, text_part("\nand "),
                {"type": "image_url", "image_url": {"url": "b.png"}}, text_part("?"),
            ]},
            ANSWER,
            {"role": "user", "content": [text_part("or "), image_part("c.png")]}, ANSWER,
        ],
    },
    "by message": {
        "messages": [
            {"role": "user", "content": "<image>\nand <image>?", "images": ["a.png", "b.png"]}, ANSWER,
            {"role": "user", "content": "or <image>", "image": "c.png"}, ANSWER,
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_images_at_their_places(name: str) -> None:
    assert asked(LAYOUTS[name]) == [user("a.png", "\nand ", "b.png", "?"), user("or ", "c.png")]


def test_images_without_a_place_stand_in_front_of_the_first_question() -> None:
    row = {"messages": [{"role": "user", "content": "Q"}, ANSWER], "images": [*NAMES]}
    assert asked(row) == [user(*NAMES, "Q")]


def test_bytes_of_several_images_are_read_from_parquet(drawn: Path, tmp_path: Path) -> None:
    images = [{"bytes": (drawn / name).read_bytes(), "path": None} for name in NAMES]
    row = LAYOUTS["LLaMA-Factory"] | {"images": images}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (found,) = read_conversations([SourceSpec(str(tmp_path / "rows.parquet"))])
    assert [Path(path).read_bytes() for path in found.images] == [i["bytes"] for i in images]
    assert [len(message.images) for message in found.messages] == [2, 0, 1, 0]


@pytest.mark.parametrize(
    ("content", "images", "reason"),
    [
        ("<image>Q", ["a.png", "b.png"], r"images: brings 2, and there are 1 places for images .* write one <image>"),
        ("<image>Q<image>", ["a.png"], r"images: brings 1, and there are 2 places for images"),
        ([image_part("a.png"), text_part("<image>")], None, r"message 1: <image> stands in the text, and the row has no"),
    ],
)  # fmt: skip
def test_a_place_without_an_image_is_refused(content: Any, images: Any, reason: str) -> None:
    row = {"messages": [{"role": "user", "content": content}, ANSWER], "images": images}
    with pytest.raises(RowError, match=reason):
        to_conversation(row)


def test_a_message_names_its_images_by_one_key() -> None:
    message = {"role": "user", "content": "Q", "image": "a.png", "images": ["b.png"]}
    with pytest.raises(RowError, match="message 1: names an 'image' and 'images'"):
        to_conversation({"messages": [message, ANSWER]})


def test_a_video_is_refused_and_its_frames_are_not() -> None:
    frames = [text_part("0.0 s"), image_part("a.png"), text_part("0.5 s"), image_part("b.png")]
    assert asked({"messages": [{"role": "user", "content": frames}, ANSWER]}) == [
        user("0.0 s", "a.png", "0.5 s", "b.png")
    ]
    video = {"type": "video", "video": "x.mp4"}
    with pytest.raises(
        RowError, match=r"message 1: content has a video.* show its frames as images"
    ):
        to_conversation({"messages": [{"role": "user", "content": [video]}, ANSWER]})


def test_merged_turns_keep_the_places_of_their_images() -> None:
    row = {"messages": [
        {"role": "user", "content": "one", "image": "a.png"},
        {"role": "user", "content": [text_part("two"), image_part("b.png")]}, ANSWER,
    ]}  # fmt: skip
    merged = to_conversation(row, rules=RowRules(turns="merge")).messages[0]
    assert merged == user("a.png", "one\ntwo", "b.png")


def test_what_predict_writes_is_read_back() -> None:
    for message in (
        user("a.png", "Q"),
        user("Q ", "a.png", " and", "b.png"),
        user("a.png", "b.png", "Q"),
    ):
        row = {"messages": [message_json(message), ANSWER]}
        assert asked(json.loads(json.dumps(row))) == [message]


def test_a_tool_shows_images_where_the_template_has_a_place() -> None:
    call = {"role": "assistant", "content": '{"x": 1}', "metadata": "look"}
    result = {"role": "tool", "content": [text_part("seen: "), image_part("a.png")]}
    row = {"messages": [{"role": "user", "content": "Q"}, call, result, ANSWER]}
    shown = to_conversation(row).messages[2]
    assert (shown.role, shown.images) == ("observation", (ShownImage("a.png", 6),))
    with pytest.raises(
        RowError,
        match=r"message 3: an image on 'observation', and the chat template of this GLM-4.1V",
    ):
        to_conversation(row, rules=RowRules(images=ImageRule("GLM-4.1V")))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user("a.png", "b.png", "Q")], "GLM-4V takes one image, which its layout shows before the first question, and here are 2"),
        ([user("Q"), Message("assistant", "A"), user("a.png", "Q")], "message 3: GLM-4V takes one image, in the first user message"),
    ],
)  # fmt: skip
def test_the_original_glm_4v_says_why_and_what_to_use(
    messages: Sequence[Message], reason: str
) -> None:
    with pytest.raises(RowError, match=reason) as refused:
        ImageRule("GLM-4V", most=1).check(messages)
    assert "GLM-4.1V" in str(refused.value)


def test_prompts_are_what_the_familys_processor_makes(folder: Path, tmp_path: Path) -> None:
    assert image_prompts.differences(folder, tmp_path / "drawn", 8, seed=1) == []


def test_a_template_without_a_place_for_images_refuses_them(tmp_path: Path, drawn: Path) -> None:
    pictures.save_grid_model(tmp_path / "m")
    for file in (tmp_path / "m").glob("chat_template*"):
        file.unlink()
    tiny.save_tokenizer(tmp_path / "text")
    (tmp_path / "m/tokenizer_config.json").write_text(
        (tmp_path / "text/tokenizer_config.json").read_text()
    )
    blind = ChatTemplate(load_chat_tokenizer(tmp_path / "m"))
    with pytest.raises(DataError, match="has a place for images in no messages"):
        blind.prompt(Conversation((user("a.png", folder=drawn),)), 1)


def test_a_longer_dialogues_prompt_begins_with_the_shorter_ones(
    template: ChatTemplate, drawn: Path
) -> None:
    dialogue = Conversation((
        user("a.png", "one", folder=drawn), Message("assistant", "A"),
        user("two ", "b.png", "c.png", folder=drawn),
    ))  # fmt: skip
    first, second = template.prompt(dialogue, 1), template.prompt(dialogue, 3)
    assert second[: len(first)] == first
    assert isinstance(second, ImagePrompt)
    assert isinstance(first, ImagePrompt)
    assert (len(first.paths), len(second.paths)) == (1, 3)


def rows(folder: Path, drawn: Path) -> Path:
    """Text, one image, five images in three turns."""
    a, b, c = (str(drawn / name) for name in NAMES)
    messages = [
        [{"role": "user", "content": "only text"}, ANSWER],
        [{"role": "user", "content": "<image>what is this"}, ANSWER],
        [
            {"role": "user", "content": "<image>or <image>"}, ANSWER,
            {"role": "user", "content": "text"}, ANSWER,
            {"role": "user", "content": "<image><image> and <image>"}, ANSWER,
        ],
    ]  # fmt: skip
    images = [[], [b], [a, b, c, a, b]]
    lines = [
        json.dumps({"messages": m, "images": [Path(i).name for i in shown]})
        for m, shown in zip(messages, images, strict=True)
    ]
    path = drawn / f"{folder.name}.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def data(template: ChatTemplate, drawn: Path, tmp_path: Path) -> PreparedDataset:
    return load_examples(
        [SourceSpec(str(rows(tmp_path, drawn)))], template, LengthPolicy(512), cache_root=tmp_path
    )


def test_batches_hold_all_images_in_row_order(
    data: PreparedDataset, template: ChatTemplate, drawn: Path
) -> None:
    spec: Any = template.image
    batch = Collator(tiny.PAD_ID, image=spec)([data[2], data[0], data[1]])
    names = ["a.png", "b.png", "c.png", "a.png", "b.png", "b.png"]
    wanted = spec.arrays([(str(drawn / name), "") for name in names])
    for name, array in wanted.items():
        assert (batch[name].numpy() == array).all()
    assert (batch["input_ids"] == pictures.BOI).sum(1).tolist() == [5, 0, 1]
    patches = template.tokenizer.control_ids["<|image|>"]
    assert int((batch["input_ids"] == patches).sum()) * 4 == len(wanted["pixel_values"])
    assert (batch["labels"][batch["input_ids"] == patches] == -100).all()


def test_packed_rows_have_the_models_own_positions_and_losses(
    data: PreparedDataset, template: ChatTemplate, folder: Path
) -> None:
    model = open_model(folder).model
    collate = Collator(tiny.PAD_ID, image=template.image)
    packed = collate([[data[1], data[2]], [data[0]]])
    begin = 0
    for example in (data[1], data[2]):
        alone = collate([example])
        ids = alone["input_ids"]
        theirs, _ = model.model.get_rope_index(
            ids, (ids == model.config.image_token_id).int(), alone["image_grid_thw"]
        )
        end = begin + ids.shape[1]
        assert torch.equal(packed["position_ids"][:, 0, begin:end], theirs[:, 0])
        begin = end
    rows_alone = collate([data[1], data[2], data[0]])
    losses = []
    for batch in (packed, rows_alone):
        batch = {name: value for name, value in batch.items() if name != "sample_ids"}
        with torch.no_grad():
            losses.append(float(model(**batch).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_turn_goes_with_its_images_where_later_turns_show_some_too(
    template: ChatTemplate, drawn: Path, tmp_path: Path
) -> None:
    path = rows(tmp_path, drawn)
    full = load_examples([SourceSpec(str(path))], template, LengthPolicy(512), cache_root=tmp_path)
    shorter = load_examples(
        [SourceSpec(str(path))],
        template,
        LengthPolicy(len(full[2].input_ids) - 1),
        cache_root=tmp_path,
    )
    assert [Path(image).name for image in shorter[2].images] == ["c.png", "a.png", "b.png"]
    assert (shorter[2].input_ids == pictures.BOI).sum() == 3
    dialogue = list(read_conversations([SourceSpec(str(path))]))[2]
    (prompt,) = reply_prompts(
        [dialogue], template, replies="last_reply", max_prompt=len(template.prompt(dialogue, 5)) - 1
    )
    assert [Path(image).name for image in prompt.images] == ["c.png", "a.png", "b.png"]


def test_replies_to_prompts_with_several_images_are_those_of_one_at_a_time(
    folder: Path, template: ChatTemplate, drawn: Path
) -> None:
    opened = open_model(folder)
    prompts = [
        template.prompt(Conversation((message,)), 1)
        for message in (
            user("Q"),
            user("a.png", "Q", folder=drawn),
            user(*NAMES, "x", folder=drawn),
        )
    ]

    def replies(size: int) -> list[Any]:
        found = generate(opened.model, template, prompts, max_new_tokens=5, batch_size=size)
        return [list(reply.ids) for reply in found]

    assert replies(3) == replies(1)


def test_a_report_counts_all_images_and_tells_dialogues_apart_by_them(
    drawn: Path, tmp_path: Path, folder: Path
) -> None:
    path = rows(tmp_path, drawn)
    other = json.loads(path.read_text().splitlines()[1]) | {"images": ["c.png"]}
    path.write_text(path.read_text() + "\n" + json.dumps(other))
    report = check(str(path), model=folder)
    assert (report.sources[0].images, report.sources[0].duplicates) == (7, 0)


def test_positions_of_a_small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GridSpec("", 9)
    monkeypatch.setattr(
        "finetune.data.chat.glm41v_image._processor", lambda _: type("P", (), {"merge_size": 2})
    )
    ids = np.array([1, 1, 1, 1, 9, *[2] * 6, 3, 3], np.int32)
    time, height, width = spec.positions(ids, np.array([[1, 4, 6]]))
    assert time.tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 8, 9]
    assert height.tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 6, 8, 9]
    assert width.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9]


def test_the_preview_shows_each_image_as_one_piece(
    drawn: Path, tmp_path: Path, folder: Path
) -> None:
    shown = show(str(rows(tmp_path, drawn)), model=folder, index=2)
    pieces = [token.text for token in shown.tokens]
    assert sum("<|begin_of_image|>" in piece for piece in pieces) == 5
    assert all(
        piece.endswith("<|end_of_image|>") for piece in pieces if "<|begin_of_image|>" in piece
    )
