"""A reply token by token: what is shown is what the whole reply is read as, in every layout and wherever it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import newer
import pytest
from dialogues import TOOLS, Z1_TEMPLATE
from examples import tiny_template

from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Message
from finetune.generation.messages import reply_messages
from finetune.generation.stream import Piece, ReplyStream, TextStream, reply_stream


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTemplate]:
    root = tmp_path_factory.mktemp("stream")
    glm4 = tiny_template(root / "glm4")
    z1 = ChatTemplate(replace(glm4.tokenizer, chat_template=Z1_TEMPLATE))
    return {"glm4": glm4, "z1": z1, "1v": newer.template_of(root, "GLM-4.1V"), "4.5": newer.template_of(root, "GLM-4.5")}  # fmt: skip


def ids_of(template: ChatTemplate, text: str) -> list[int]:
    """Ids of what a model writes, control tokens where they are spelled; of `½` the first byte alone."""
    ids: list[int] = []
    for place, part in enumerate(text.split("½")):
        ids += template.tokenizer.plain.encode("😀", add_special_tokens=False).ids[:1] if place else []  # fmt: skip
        ids += template.tokenizer.trusted(part)
    return ids


def read(stream: Any, ids: Sequence[int]) -> list[Piece]:
    return [piece for token in ids for piece in stream.take(token)] + stream.finish()


def joined(pieces: Sequence[Piece]) -> list[Message]:
    """The messages that pieces say."""
    found: list[Message] = []
    for piece in pieces:
        if piece.name or not found or (piece.call is None) is not (not found[-1].metadata):
            found.append(Message("assistant", piece.text, piece.name))
        else:
            found[-1] = replace(found[-1], content=found[-1].content + piece.text)
    return found or [Message("assistant", "")]


REPLIES = {
    "glm4": [
        "\nhello", "hello", "\n\nhello", "", "\n", "\nhalf ½", "\nhalf ½ and more", "f\n{}", 'f\n{"a": 1}<|assistant|>f\n{}', "f\n{}<|assistant|>\nand text",
        "f g\n{}", "f", " f \n{}", "\nhi<|user|>\nmore", "\nhi<|assistant|>\nmore", "f\n{½", "\nhi<|system|>more", "½\nx",
    ],
    "z1": [
        "so</think>\n\nhello", "\n</think>\n\nhello", "so</think>\n\nf\n{}", 'so</think>\n\nf\n{"a": 1}<|assistant|>f\n{}', "</think>hello",
    ],
    "1v": [
        "so</think><answer>5</answer>", "so ½</think><answer>½</answer>", "</think>", "<think></think>\n<answer><|begin_of_box|>5<|end_of_box|></answer>", "<answer><answer>x",
        "so</think><answer>5</answer><|user|>",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in REPLIES.items() for text in texts])  # fmt: skip
def test_what_is_shown_of_a_reply_is_what_is_read_of_it(
    name: str, text: str, templates: dict[str, ChatTemplate]
) -> None:
    template = templates[name]
    tools = () if name == "1v" else TOOLS
    ids = ids_of(template, text)
    stream = reply_stream(template, tools)
    pieces = read(stream, ids)
    whole = reply_messages(ids, template, tools)
    shown = joined(pieces)
    if name == "z1" and whole[0].metadata:  # a call is read without its thought, which was shown
        assert shown.pop(0).content == "<think>so</think>"
    assert shown == whole
    assert all(piece.text or piece.name for piece in pieces)
    assert not any("�" in piece.text for piece in pieces[:-1] if "½" not in text)
    assert ids[: len(stream.ids)] == stream.ids
    assert stream.over is (len(stream.ids) < len(ids))


def test_nothing_is_said_behind_the_end_of_a_reply(templates: dict[str, ChatTemplate]) -> None:
    stream = ReplyStream(templates["glm4"], ())
    ids = ids_of(templates["glm4"], "\nhi<|user|>")
    assert "".join(piece.text for piece in read(stream, ids)) == "hi"
    assert stream.over
    assert [stream.take(token) for token in ids] == [[]] * len(ids)
    assert stream.ids == ids[:-1]


def test_every_token_that_ends_a_turn_ends_a_reply(templates: dict[str, ChatTemplate]) -> None:
    for name, template in templates.items():
        for stop in template.stop_ids:
            stream = reply_stream(template, ())
            hi = template.tokenizer.trusted("hi")
            read(stream, [*hi, stop])
            assert (stream.over, stream.ids) == (True, hi), name


@pytest.mark.parametrize("thinks", [None, True, False])
def test_a_reply_behind_a_prompt_that_opens_a_thought_begins_inside_of_it(
    thinks: bool | None, tmp_path: Path
) -> None:
    template = newer.template_of(tmp_path, "GLM-4.7")
    opens = template.layout.form.prompt.endswith("<think>")  # type: ignore[attr-defined]
    pieces = read(reply_stream(template, (), thinks=thinks), template.tokenizer.trusted("so</think>x"))  # fmt: skip
    thought = "".join(piece.text for piece in pieces if piece.is_thought)
    assert opens
    assert (thought == "so") is (thinks is not False)


def test_calls_of_tags_are_numbered_and_are_text_without_tools(
    templates: dict[str, ChatTemplate],
) -> None:
    template = templates["4.5"]
    call = "<tool_call>f\n</tool_call>"
    ids = template.tokenizer.trusted(f"<think></think>\n{call}\n{call}")
    pieces = read(reply_stream(template, TOOLS), ids)
    assert [(piece.call, piece.name) for piece in pieces if piece.name] == [(0, "f"), (1, "f")]
    plain = read(reply_stream(template, ()), ids)
    assert not any(piece.name for piece in plain)
    assert "<tool_call>f" in "".join(piece.text for piece in plain)


@pytest.mark.parametrize("to_the_stop", [True, False])
def test_a_text_ends_at_its_stop_and_without_ids_at_any_control_token(
    to_the_stop: bool, templates: dict[str, ChatTemplate]
) -> None:
    template = templates["glm4"]
    ids = ids_of(template, "a½<|system|>b½")
    stream = TextStream(template, to_the_stop=to_the_stop)
    said = ""
    for token in ids:
        if not stream.over:
            said += "".join(piece.text for piece in stream.take(token))
    said += "".join(piece.text for piece in stream.finish())
    assert said == ("a�b�" if to_the_stop else "a�")
    assert (stream.over, stream.ids) == (not to_the_stop, ids if to_the_stop else ids[:2])
    for stop in template.stop_ids:
        stream = TextStream(template, to_the_stop=to_the_stop)
        assert stream.take(stop) == []
        assert (stream.over, stream.ids) == (True, [])
