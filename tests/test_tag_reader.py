"""Replies between tags that are not as they should be are read as far as they say something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import newer
import pytest
from dialogues import dialogue

from finetune.data.chat.layouts.glm45 import INSIDE
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.template_check import own_text, with_parts
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage

CALL = "<tool_call>f<arg_key>a</arg_key><arg_value>x"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return newer.template_of(tmp_path_factory.mktemp("tags"), "GLM-4.5")


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (f"{CALL}</arg_value><tool_call>g</tool_call>", [("f", '{"a": "x"}'), ("g", "{}")]),
        (f"{CALL}<tool_call>g</tool_call>", [("f", '{"a": "x"}'), ("g", "{}")]),
        ("<tool_call>f<tool_call>g</tool_call>", [("f", "{}"), ("g", "{}")]),
        (
            f"{CALL}<arg_key>b</arg_key><arg_value>2</arg_value></tool_call>",
            [("f", '{"a": "x", "b": 2}')],
        ),
        (f"{CALL}</tool_call>", [("f", '{"a": "x"}')]),
        (CALL, [("f", "{")]),
        ("<tool_call>f", [("f", "{")]),
        ("<tool_call>  ", [("", "")]),
        ("<tool_call>f<arg_key>a<arg_value>1</arg_value></tool_call>", [("f", '{"a": "1"}')]),
        ("<tool_call>f<think>g</think></tool_call>", [("fg", "{}")]),
        ("so</think>ja<tool_call>f</tool_call>da", [("", "<think>\nso\n</think>\n\njada"), ("f", "{}")]),
        ("<think>a<think>b</think>c</think>d", [("", "<think>\nab\n</think>\n\ncd")]),
        ("<think>a<tool_call>f</tool_call>", [("f", "<think>\na\n</think>\n\n{}")]),
        ("a<arg_key>b</arg_key>c", [("", "abc")]),
        ("</tool_call> a ", [("", "a")]),
    ],
)  # fmt: skip
def test_a_reply_that_is_not_well_formed_is_read_as_far_as_it_says_something(
    template: ChatTemplate, reply: str, said: list[tuple[str, str]]
) -> None:
    found = template.messages(template.tokenizer.trusted(reply), newer.TOOLS)
    assert [(message.metadata, message.content) for message in found] == said


def test_half_a_character_in_front_of_a_tag_is_no_part_of_what_follows(
    template: ChatTemplate,
) -> None:
    half = template.tokenizer.plain.encode("龘").ids[0]
    begin, end = template.tokenizer.trusted("<think>"), template.tokenizer.trusted("</think>a")
    [message] = template.messages([*begin, half, *end], ())
    assert message.content == "<think>\n\N{REPLACEMENT CHARACTER}\n</think>\n\na"


def test_parts_go_to_the_message_that_shows_them_behind_a_message_of_tools_too() -> None:
    shows = Message("user", "ab", images=(ShownImage("p", 1),))
    dialogue = Conversation((shows, Message("assistant", "c")))
    plain = [{"role": m.role, "content": m.content} for m in dialogue.messages]
    parts = [{"type": "text", "text": "a"}, {"type": "image", "path": "p"}, {"type": "text", "text": "b"}]  # fmt: skip
    expected = [{"role": "user", "content": parts}, plain[1]]
    tools = {"role": "system", "content": "", "tools": []}
    assert with_parts(dialogue, plain) == expected
    assert with_parts(dialogue, [tools, *plain]) == [tools, *expected]


def test_a_reply_of_a_thought_alone_is_laid_out_and_read_back(template: ChatTemplate) -> None:
    talk = dialogue(("system", ""), ("user", "q"), ("reply", "<think>\na\n</think>\n\n"))
    ids = template.render([talk])[0].input_ids.tolist()
    text = "[gMASK]<sop><|user|>\nq<|assistant|>\n<think>a</think><|user|>"
    assert template.decode(ids) == text
    assert ids[:-1] == template.tokenizer.trusted(own_text(talk, template, template.jinja))
    [read] = template.messages(ids[-5:], ())
    assert read.content == talk.messages[2].content


def test_a_prompt_ends_as_its_reply_begins_and_inside_of_a_turn_in_nothing(
    tmp_path: Path,
) -> None:
    glm = newer.template_of(tmp_path, "GLM-4.7")
    talk = dialogue(
        ("user", "q"), ("reply", "<think>\na\n</think>\n\nb"), ("call", "{}", "f"), ("tool", "1"), ("reply", "c"),
    )  # fmt: skip
    off = replace(talk, messages=(talk.messages[0], *talk.messages[4:]), thinks=False)
    header = glm.tokenizer.control_ids["<|assistant|>"]
    for conversation, reply, ends in (
        (talk, 1, "<think>"), (talk, 2, INSIDE), (talk, 4, "</think>"), (talk, 5, INSIDE), (off, 1, "</think>"),
        (replace(talk, messages=talk.messages[:1]), 1, "<think>"),
        (replace(off, messages=off.messages[:1]), 1, "</think>"),
    ):  # fmt: skip
        assert glm.layout.opens(conversation, reply) == ends
        ids = [~op for op in glm.layout.opening(conversation, reply)]
        assert ids == ([] if ends == INSIDE else [header, *glm.tokenizer.trusted(ends)])
        assert glm.layout.asked(conversation, reply) is None
