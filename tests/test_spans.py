"""What of a rendered dialogue is trained, and what goes when it is too long (law 6)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from dialogues import TOOLS, Z1_TEMPLATE, dialogue, dialogues
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.chat.template import ChatTemplate, Rendered, shorten, trained_spans
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation

# Single characters are single tokens of the tiny tokenizer, so that positions can be counted:
# 0 [gMASK]  1 <sop>  2 <|user|>  3 \n  4 q  5 <|assistant|>  6 \n  7 a  8 <|user|> …
TWO_TURNS = dialogue(("user", "q"), ("reply", "a"), ("user", "r"), ("reply", "b"))
CALLS = dialogue(
    ("user", "q"), ("call", "1", "f"), ("call", "2", "f"), ("tool", "3"), ("tool", "4"),
    ("reply", "a"),
)  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return ChatTemplate(load_chat_tokenizer(folder))


@pytest.fixture(scope="module")
def z1(template: ChatTemplate) -> ChatTemplate:
    return ChatTemplate(replace(template.tokenizer, chat_template=Z1_TEMPLATE))


def marked(conversation: Conversation, index: int, **changes: object) -> Conversation:
    """The dialogue with other fields in message `index`."""
    messages = list(conversation.messages)
    messages[index] = replace(messages[index], **changes)  # type: ignore[arg-type]
    return replace(conversation, messages=tuple(messages))


def one(template: ChatTemplate, conversation: Conversation) -> Rendered:
    return template.render([conversation])[0]


def test_every_reply_is_trained_with_its_stop(template: ChatTemplate) -> None:
    rendered = one(template, TWO_TURNS)
    assert trained_spans(rendered, TWO_TURNS, "every_reply") == [(6, 9, 1.0), (12, 15, 1.0)]
    assert [
        template.decode(rendered.input_ids[[s - 1, e - 1]]) for _, s, e in rendered.replies
    ] == [
        "<|assistant|><|user|>",
        "<|assistant|><|user|>",
    ]
    assert len(rendered.input_ids) == 15


def test_the_last_reply_alone_is_trained_when_asked(template: ChatTemplate) -> None:
    assert trained_spans(one(template, TWO_TURNS), TWO_TURNS, "last_reply") == [(12, 15, 1.0)]


def test_calls_of_one_turn_are_one_span_up_to_the_tool_result(template: ChatTemplate) -> None:
    rendered = one(template, CALLS)
    # 5 <|assistant|> 6 f 7 \n 8 1 9 <|assistant|> 10 f 11 \n 12 2 13 <|observation|> …
    assert [tuple(reply) for reply in rendered.replies] == [(1, 6, 10), (2, 10, 14), (5, 20, 23)]
    assert trained_spans(rendered, CALLS, "every_reply") == [(6, 14, 1.0), (20, 23, 1.0)]
    assert template.decode(rendered.input_ids[[9, 13]]) == "<|assistant|><|observation|>"


def test_a_message_decides_over_the_policy(template: ChatTemplate) -> None:
    untrained = marked(TWO_TURNS, 3, train=False)
    rendered = one(template, untrained)
    assert trained_spans(rendered, untrained, "every_reply") == [(6, 9, 1.0)]
    assert trained_spans(rendered, untrained, "last_reply") == []
    trained = marked(TWO_TURNS, 1, train=True)
    assert trained_spans(rendered, trained, "last_reply") == [(6, 9, 1.0), (12, 15, 1.0)]


def test_an_untrained_call_lends_only_its_header_as_a_stop(template: ChatTemplate) -> None:
    untrained = marked(CALLS, 2, train=False)
    spans = trained_spans(one(template, untrained), untrained, "every_reply")
    assert spans == [(6, 10, 1.0), (20, 23, 1.0)]


def test_weights_split_spans_and_weight_0_trains_nothing(template: ChatTemplate) -> None:
    heavy = marked(CALLS, 2, weight=2.0)
    spans = trained_spans(one(template, heavy), heavy, "every_reply")
    assert spans == [(6, 10, 1.0), (10, 14, 2.0), (20, 23, 1.0)]
    none = marked(heavy, 5, weight=0.0)
    assert trained_spans(one(template, none), none, "every_reply") == spans[:2]


def test_a_dialogue_that_fits_is_left_alone(template: ChatTemplate) -> None:
    rendered = one(template, TWO_TURNS)
    assert shorten(rendered, TWO_TURNS, 15) is rendered


def test_the_oldest_turn_goes_first_and_system_text_and_tools_stay(template: ChatTemplate) -> None:
    long = dialogue(
        ("system", "s"), ("user", "q"), ("call", "1", "f"), ("tool", "2"), ("reply", "a"),
        ("user", "r"), ("reply", "b"), tools=TOOLS,
    )  # fmt: skip
    kept = dialogue(("system", "s"), ("user", "r"), ("reply", "b"), tools=TOOLS)
    rendered, expected = one(template, long), one(template, kept)
    shorter = shorten(rendered, long, len(rendered.input_ids) - 1)
    assert shorter is not None
    np.testing.assert_array_equal(shorter.input_ids, expected.input_ids)
    assert [run.message for run in shorter.runs] == [None, None, 0, 5, 6, None]
    assert [r[1:] for r in shorter.replies] == [r[1:] for r in expected.replies]
    assert shorten(rendered, long, len(expected.input_ids)) is not None
    assert shorten(rendered, long, len(expected.input_ids) - 1) is None


def test_an_example_with_nothing_left_to_learn_is_not_made(template: ChatTemplate) -> None:
    only_first = marked(TWO_TURNS, 3, train=False)
    assert shorten(one(template, only_first), only_first, 14) is None
    first_by_policy = marked(TWO_TURNS, 1, train=True)
    assert shorten(one(template, first_by_policy), first_by_policy, 14, "last_reply") is not None


def test_of_system_text_alone_nothing_can_go(template: ChatTemplate) -> None:
    alone = dialogue(("system", "s" * 9), tools=TOOLS)
    assert shorten(one(template, alone), alone, 5) is None


def test_a_tool_result_never_loses_its_call(template: ChatTemplate) -> None:
    interrupted = dialogue(
        ("user", "q"), ("call", "1", "f"), ("user", "w"), ("tool", "2"), ("reply", "a"),
    )  # fmt: skip
    rendered = one(template, interrupted)
    assert shorten(rendered, interrupted, len(rendered.input_ids) - 1) is None


@settings(max_examples=80, deadline=None, database=None)
@given(conversation=dialogues(), share=st.floats(0, 1))
def test_shortening_equals_rendering_without_the_dropped_turns(
    template: ChatTemplate, z1: ChatTemplate, conversation: Conversation, share: float
) -> None:
    for each in (template, z1):
        rendered = one(each, conversation)
        limit = int(len(rendered.input_ids) * share)
        shorter = shorten(rendered, conversation, limit)
        if shorter is None:
            continue
        kept = [run.message for run in shorter.runs if run.message is not None]
        messages = tuple(conversation.messages[index] for index in kept)
        expected = one(each, replace(conversation, messages=messages))
        assert len(shorter.input_ids) <= limit
        np.testing.assert_array_equal(shorter.input_ids, expected.input_ids)
        assert trained_spans(shorter, conversation, "every_reply") == trained_spans(
            expected, replace(conversation, messages=messages), "every_reply"
        )
        roles = [message.role for message in messages]
        assert roles[roles.count("system")] == "user"


def test_rendered_ids_cannot_be_written_to(template: ChatTemplate) -> None:
    rendered = one(template, TWO_TURNS)
    for each in (rendered, shorten(rendered, TWO_TURNS, 14)):
        assert each is not None
        with pytest.raises(ValueError, match="read-only"):
            each.input_ids[0] = 0
