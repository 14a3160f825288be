"""Reply ids back to messages, and replies that hold what templates drop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from dialogues import GLM4_0414_TEMPLATE, Z1_TEMPLATE, dialogue
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.errors import DataError

REASONED = "<think>\n先想。\n</think>\n\n答"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return ChatTemplate(load_chat_tokenizer(folder))


@pytest.fixture(scope="module")
def z1(template: ChatTemplate) -> ChatTemplate:
    return ChatTemplate(replace(template.tokenizer, chat_template=Z1_TEMPLATE))


def ids_of(template: ChatTemplate, text: str) -> list[int]:
    return list(template.tokenizer.backend.encode(text, add_special_tokens=False).ids)


def shown(template: ChatTemplate, conversation: Conversation) -> str:
    return template.decode(template.render([conversation])[0].input_ids)


@pytest.mark.parametrize(
    ("generated", "metadata", "content"),
    [
        ("\n你好", "", "你好"),
        ("\n你好<|user|>", "", "你好"),
        ("\n\n a\n<|endoftext|>", "", "\n a\n"),
        ('get_weather\n{"city": "北京"}<|observation|>', "get_weather", '{"city": "北京"}'),
        ("python\nprint(1)\nprint(2)", "python", "print(1)\nprint(2)"),
        ("f\n{}<|assistant|>g\n{}", "f", "{}"),  # a call ends where the next one begins
        ("no line break at all", "", "no line break at all"),
        (" \nspaces before it", "", "spaces before it"),
        ("<|user|>", "", ""),
        ("", "", ""),
    ],
)
def test_reply_ids_become_the_message(
    template: ChatTemplate, generated: str, metadata: str, content: str
) -> None:
    expected = Message("assistant", content, metadata)
    assert template.parse(ids_of(template, generated)) == expected
    assert template.parse(np.array(ids_of(template, generated), dtype=np.int64)) == expected


@settings(max_examples=100, deadline=None, database=None)
@given(ids=st.lists(st.integers(0, tiny.VOCAB_SIZE - 1), max_size=12))
def test_whatever_a_model_writes_is_parsed(
    template: ChatTemplate, z1: ChatTemplate, ids: list[int]
) -> None:
    for each in (template, z1):
        assert each.parse(ids).role == "assistant"
        each.decode(ids)


def test_half_a_character_is_shown_as_a_replacement(template: ChatTemplate) -> None:
    half = ids_of(template, "\n😀")[:-1]
    assert template.parse(half).content == "\ufffd"


def test_a_checkpoint_that_does_not_think_keeps_such_text_or_drops_it_as_its_template_does(
    template: ChatTemplate,
) -> None:
    conversation = dialogue(("user", "q"), ("reply", REASONED))
    assert shown(template, conversation).endswith(f"<|assistant|>\n{REASONED}<|user|>")
    glm4_0414 = ChatTemplate(replace(template.tokenizer, chat_template=GLM4_0414_TEMPLATE))
    assert shown(glm4_0414, conversation).endswith("<|assistant|>\n答<|user|>")
    assert glm4_0414.decode(glm4_0414.prompt(conversation, 1)).endswith("q<|assistant|>")


def test_a_prompt_that_ends_in_a_line_break_is_a_prefix_of_every_plain_reply(
    template: ChatTemplate,
) -> None:
    source = template.tokenizer.chat_template.replace(
        "<|assistant|>{% endif %}", "<|assistant|>\n{% endif %}"
    )
    opened = ChatTemplate(replace(template.tokenizer, chat_template=source))
    conversation = dialogue(("user", "q"), ("reply", "a"), ("user", "r"), ("reply", "\nb"))
    ids = opened.render([conversation])[0].input_ids.tolist()
    for reply in (1, 3):
        prompt = opened.prompt(conversation, reply)
        assert ids[: len(prompt)] == prompt
    assert opened.parse(ids[len(opened.prompt(conversation, 1)) :]).content == "a"


def test_text_that_is_no_unicode_is_named(template: ChatTemplate) -> None:
    fine, broken = dialogue(("user", "q")), dialogue(("user", "q"), ("reply", "a\ud83d"))
    with pytest.raises(DataError, match=r"file\.jsonl:1: message 2 \(assistant\) is not valid"):
        template.render([fine, replace(broken, location="file.jsonl:1")])


def test_an_empty_message_or_a_name_of_two_lines_is_refused(template: ChatTemplate) -> None:
    with pytest.raises(DataError, match=r"file\.jsonl:1: message 2 \(assistant\): it has no text"):
        template.render([dialogue(("user", "q"), ("reply", ""))])
    with pytest.raises(DataError, match="its name has a line break"):
        template.render([dialogue(("user", "q"), ("call", "{}", "f\ng"))])


def test_the_fingerprint_follows_the_template(template: ChatTemplate, z1: ChatTemplate) -> None:
    assert template.fingerprint == ChatTemplate(template.tokenizer).fingerprint
    changed = replace(template.tokenizer, fingerprint="other")
    assert ChatTemplate(changed).fingerprint != template.fingerprint
