"""Rows to dialogues, rule by rule: what is joined, ordered, marked, shown and doubted."""

from __future__ import annotations

from typing import Any

import pytest
from hints import said
from row_parts import CALL, REPLY, RESULT, TOOL_CALL, USER, WEATHER, dialogue, reply, user

from finetune.data.dialogue.conversation import (
    Conversation,
    Message,
    RowError,
    ShownImage,
    validate,
)
from finetune.data.dialogue.doubts import THOUGHT_IN_TEXT
from finetune.data.dialogue.images import ImageRule, with_placeholders
from finetune.data.dialogue.keys import check_columns, marks_of
from finetune.data.dialogue.turns import merged

# --- who may stand where -------------------------------------------------------------------------

S, U, R, C, O = "system", "user", "reply", "call", "observation"  # noqa: E741
PARTS = {S: Message("system", "s"), U: user(), R: reply(), C: reply("{}", metadata="f"), O: Message("observation", "o")}  # fmt: skip
STRICT = {
    ("start", S), ("start", U), (S, S), (S, U), (U, R), (U, C), (R, U), (R, C), (C, C), (C, O),
    (O, O), (O, R), (O, C),
}  # fmt: skip
LENIENT = STRICT | {("start", R), (S, R), (U, S), (R, S), (O, S), (S, C)}


@pytest.mark.parametrize(("lenient", "pairs"), [(False, STRICT), (True, LENIENT)])
def test_each_kind_of_message_may_stand_behind_these_only(
    lenient: bool, pairs: set[tuple[str, str]]
) -> None:
    begin: dict[str, list[str]] = {"start": [], S: [S], U: [U], R: [U, R], C: [U, C], O: [U, C, O]}
    end: dict[str, list[str]] = {S: [U, R], U: [R], R: [], C: [O, R], O: [R]}
    for before, first in begin.items():
        for now, last in end.items():
            messages = tuple(PARTS[kind] for kind in (*first, now, *last))
            try:
                validate(Conversation(messages), lenient=lenient)
                is_taken = True
            except RowError:
                is_taken = False
            assert is_taken == ((before, now) in pairs), (before, now)


@pytest.mark.parametrize(
    ("messages", "purpose", "taken"),
    [
        ([user(), reply()], "train", True),
        ([user()], "train", False),
        ([user()], "predict", True),
        ([user(), PARTS[C], PARTS[O]], "predict", True),
        ([user(), PARTS[C], PARTS[O]], "train", False),
        ([PARTS[S]], "predict", False),
        ([user(), reply(train=False)], "train", False),
        ([user(), reply(weight=0.0)], "train", False),
        ([user(), reply(weight=0.0)], "predict", True),
        ([user(), reply(weight=0.1)], "train", True),
        ([user(), reply(weight=float("inf"))], "train", False),
        ([user(), reply(weight=float("nan"))], "predict", False),
        ([user(), reply(weight=-1.0)], "predict", False),
        ([user(train=False), reply()], "train", True),
        ([user(train=True), reply()], "train", False),
        ([user("", images=(ShownImage("a"),)), reply()], "train", True),
        ([user(""), reply()], "train", False),
        ([user("a\0"), reply()], "train", False),
        ([user(), reply("\ud800")], "train", False),
        ([user(), reply("{}", metadata="a\nb"), PARTS[O], reply()], "train", False),
        ([user(), reply("{}", metadata=" f"), PARTS[O], reply()], "train", False),
        ([user(metadata="f"), reply()], "train", False),
        ([user(), reply(images=(ShownImage("a"),))], "train", False),
    ],
)
def test_a_dialogue_is_valid_for_its_purpose(
    messages: list[Message], purpose: Any, taken: bool
) -> None:
    if taken:
        validate(Conversation(tuple(messages)), purpose)
    else:
        with pytest.raises(RowError):
            validate(Conversation(tuple(messages)), purpose)


# --- data.turns: merge ---------------------------------------------------------------------------


def test_neighbours_of_one_side_are_joined_and_calls_and_results_are_not() -> None:
    call, result = PARTS[C], PARTS[O]
    assert merged([user("a"), user("b"), reply("c"), reply("d")]) == [user("a\nb"), reply("c\nd")]
    for apart in ([call, reply()], [reply(), call], [call, call], [result, result]):
        assert merged([user(), *apart]) == [user(), *apart]
    assert merged([PARTS[S], PARTS[S], user()]) == [Message("system", "s\ns"), user()]
    # What opens a dialogue answers nothing.
    assert merged([PARTS[S], reply(), user(), reply()])[1].train is False
    assert merged([user(), reply()])[1].train is None


@pytest.mark.parametrize(
    ("before", "behind", "train"),
    [(None, None, None), (True, None, True), (None, True, True), (False, True, False),
     (True, False, False), (False, None, False), (None, False, False), (True, True, True)],
)  # fmt: skip
def test_a_joined_reply_carries_loss_if_both_parts_do(before: Any, behind: Any, train: Any) -> None:
    found = merged([user(), reply(train=before, weight=2.0), reply(train=behind, weight=0.5)])
    assert (found[1].train, found[1].weight) == (train, 0.5)


def test_images_of_joined_messages_stand_where_they_stood() -> None:
    first = user("ab", images=(ShownImage("x", 1),))
    second = user("cd", images=(ShownImage("y", 0), ShownImage("z", 2)))
    (joined,) = merged([first, second])
    assert with_placeholders(joined) == "a<image>b\n<image>cd<image>"


# --- keys ----------------------------------------------------------------------------------------

MARKS = [
    ({"train": True}, (True, 1.0)), ({"loss": 0}, (False, 1.0)), ({"masked": True}, (False, 1.0)),
    ({"masked": False}, (True, 1.0)), ({"weight": 0.5}, (None, 0.5)), ({"loss_scale": 2}, (None, 2.0)),
    ({"train": True, "masked": False}, (True, 1.0)), ({"weight": 1, "loss_weight": 1.0}, (None, 1.0)),
    ({"train_detail": [{"train": True}, {"train": True}]}, (True, 1.0)),
    ({"train": True, "weight": 0.5}, (True, 0.5)),
]  # fmt: skip
REFUSED = [
    {"train": "true"}, {"train": 2}, {"weight": True}, {"weight": "1"}, {"weight": 2_000_000},
    {"weight": 1, "loss_weight": 2}, {"train": True, "masked": True}, {"mask": 1}, {"mask": False},
    {"train_detail": [{"train": True}, {"train": False}]}, {"train_detail": [{}]}, {"train_detail": []},
    {"thought": "a", "cot": "b"}, {"thinking": 3}, {"content": "A", "value": "B"}, {"role": "a", "from": "b"},
    {"is_chosen": False}, {"is_chosen": "False"}, {"is_chosen": 0}, {"weihgt": 2}, {"compute_loss": 0},
    {"no_loss": True}, {"no_loss": 1}, {"ignore": True}, {"is_target": False}, {"refusal": "no"},
    {"audio": "x"}, {"loss_config": {"loss": False}},
]  # fmt: skip
TAKEN = [
    {"compute_loss": True}, {"compute_loss": 1}, {"is_chosen": True}, {"role": "a", "from": "a"},
    {"mask": None}, {"trained_on": "a text"}, {"id": 3}, {"audio": None},
]  # fmt: skip


@pytest.mark.parametrize(("keys", "marks"), MARKS)
def test_keys_of_a_message_say_what_is_learned(keys: dict[str, Any], marks: Any) -> None:
    assert marks_of({"role": "assistant", "content": "A"} | keys, "assistant")[:2] == marks


@pytest.mark.parametrize("keys", REFUSED, ids=str)
def test_a_key_that_says_what_is_not_understood_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(RowError, match=next(iter(keys))):
        marks_of({"role": "assistant"} | keys, "assistant")


@pytest.mark.parametrize("keys", TAKEN, ids=str)
def test_a_key_that_changes_nothing_is_taken(keys: dict[str, Any]) -> None:
    assert marks_of({"role": "a"} | keys, "assistant")[:2] == (None, 1.0)


COLUMNS: list[tuple[dict[str, Any], Any]] = [
    ({"id": 1}, ()), ({"notes": "x"}, ("notes",)), ({"notes": ""}, ()), ({"notes": None}, ()),
    ({"source": "x" * 100}, ()), ({"source": "x" * 101}, ("source",)), ({"label": True}, ("label",)),
    ({"label": False}, "label: is false"), ({"label": "false"}, "label: is false"),
    ({"message": "x"}, "did you mean 'messages'"), ({"message": "x", "messages": "y"}, ("message",)),
    ({"rejected": "x"}, "rejected: preference"), ({"loss_weights": [1, 0]}, "loss_weights"),
    ({"split": "train"}, ()), ({"skip": True}, "skip"), ({"skip": False}, "skip"), ({"score": 3}, ()),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), COLUMNS, ids=lambda v: str(v)[:40])
def test_a_column_is_read_named_or_refused(row: dict[str, Any], expected: Any) -> None:
    read = frozenset({"messages"})
    if isinstance(expected, str):
        assert expected in said(check_columns, row, read)
    else:
        assert check_columns(row, read) == expected


# --- messages and images -------------------------------------------------------------------------


def test_roles_are_read_in_any_case_and_a_thought_stands_before_the_first_of_a_turn() -> None:
    found = dialogue({"role": "User", "content": "Q"}, {"role": "GPT", "content": "A"})
    assert [m.role for m in found.messages] == ["user", "assistant"]
    both = {**TOOL_CALL, "content": "Let me see.", "reasoning_content": "why"}
    result = {"role": "tool", "content": "1", "tool_call_id": "1"}
    talk = dialogue(USER, both, result, REPLY, thinks=True)
    assert [m.content.count("why") for m in talk.messages] == [0, 1, 0, 0, 0]
    assert talk.messages[1].content == "<think>\nwhy\n</think>\n\nLet me see."


def test_a_call_in_a_replys_text_is_one_when_a_result_follows_or_its_tool_is_known() -> None:
    text = {"role": "assistant", "content": '{"name": "get_weather", "arguments": {}}'}
    assert dialogue(USER, text, RESULT, REPLY).messages[1].metadata == "get_weather"
    known = dialogue(USER, REPLY, USER, text, columns={"tools": [WEATHER]})
    assert known.messages[3].metadata == "get_weather"
    assert dialogue(USER, text).messages[1].metadata == ""


def test_marks_of_a_tool_result_are_not_those_of_a_reply() -> None:
    with_marks = {**RESULT, "weight": 3}
    assert dialogue(USER, CALL, with_marks, REPLY).messages[2].weight == 1.0


def test_tools_of_a_system_message_and_of_the_row_are_one_list() -> None:
    of_system = {"role": "system", "content": "S", "tools": [WEATHER]}
    columns = {"tools": [{**WEATHER, "name": "other"}]}
    assert "keep one list" in said(dialogue, of_system, USER, REPLY, columns=columns)
    assert len(dialogue(of_system, USER, REPLY, columns={"tools": [WEATHER]}).tools) == 1


IMAGES = [
    # content of the user's message, columns -> (text, [(path, at, marked)])
    ("Q", {"images": ["a"]}, "Q", [("a", 0, False)]),
    ("<image>Q", {"images": ["a"]}, "Q", [("a", 0, True)]),
    ("x<image>y<image>", {"images": ["a", "b"]}, "xy", [("a", 1, True), ("b", 2, True)]),
    ([{"type": "text", "text": "xy"}, {"type": "image"}], {"images": ["a"]}, "xy", [("a", 2, True)]),
    ([{"type": "image", "path": "a"}, {"type": "text", "text": "x"}], {}, "x", [("a", 0, False)]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "columns", "text", "shown"), IMAGES)
def test_images_of_a_row_stand_where_their_places_are(
    content: Any, columns: dict[str, Any], text: str, shown: Any
) -> None:
    found = dialogue({"role": "user", "content": content}, REPLY, columns=columns)
    first = found.messages[0]
    assert (first.content, [tuple(image) for image in first.images]) == (text, shown)


def test_a_placeholder_beside_an_image_of_a_part_leaves_that_where_it_stands() -> None:
    parts = [{"type": "text", "text": "a<image>b"}, {"type": "image", "path": "mine"}]
    found = dialogue({"role": "user", "content": parts}, REPLY, columns={"images": ["other"]})
    assert with_placeholders(found.messages[0]) == "a<image>b<image>"
    assert found.images == ("other", "mine")


@pytest.mark.parametrize(
    ("content", "columns", "reason"),
    [
        ("Q", {"images": ["a"], "image": "b"}, "both bring one"),
        ("<image>Q", {"images": ["a", "b"]}, "brings 2, and there are 1 places"),
        ("<image><image>Q", {"images": ["a"]}, "brings 1, and there are 2 places"),
        ([{"type": "image"}], {}, "neither it nor a column 'images'"),
        ("Q", {"images": ["data:image/png,xx"]}, "is a data URL, but not"),
        ("Q", {"images": ["data:image/png;base64"]}, "is a data URL, but not"),
        ("Q", {"images": ["https://x/a.png"]}, "is a URL"),
    ],
)
def test_images_that_have_no_place_are_refused(content: Any, columns: Any, reason: str) -> None:
    assert reason in said(dialogue, {"role": "user", "content": content}, REPLY, columns=columns)
    own = {"role": "user", "content": "<image>Q", "images": ["a", "b"]}
    assert "brings 2, and there are 1" in said(dialogue, own, REPLY)
    fewer = {"role": "user", "content": "<image><image>Q", "images": ["a"]}
    assert "brings 1, and there are 2" in said(dialogue, fewer, REPLY)


IMAGE = (ShownImage("a"),)
RULED = [
    (0, ("user",), [user()], ""), (0, ("user",), [user(images=IMAGE)], "takes none"),
    (1, ("user",), [user(images=IMAGE)], ""), (1, ("user",), [user(images=IMAGE * 2)], "here are 2"),
    (1, ("user",), [user(), reply(), user(images=IMAGE)], "in the first user message"),
    (1, ("user",), [user("", images=IMAGE)], "write the question"),
    (None, ("user",), [user("", images=IMAGE * 3)], ""),
    (None, ("user",), [user(), PARTS[C], Message("observation", "o", images=IMAGE)], "message 3"),
    (None, ("user", "observation"), [Message("observation", "o", images=IMAGE)], ""),
    (None, ("observation",), [user(images=IMAGE)], "message 1"),
]  # fmt: skip


@pytest.mark.parametrize(("most", "roles", "messages", "reason"), RULED)
def test_a_checkpoint_is_shown_images_by_its_rule(
    most: Any, roles: Any, messages: list[Message], reason: str
) -> None:
    rule = ImageRule("this one", most, roles)
    if reason:
        assert reason in said(rule.check, messages)
    else:
        rule.check(messages)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_what_a_content_part_says_besides_is_named_whoever_says_it(role: str) -> None:
    part = {"type": "text", "text": "x", "width": 3}
    talk = [{"role": "system", "content": "S"}, USER, CALL, {"role": "tool", "content": "R"}, REPLY]
    items = [{**m, "content": [part]} if m["role"] == role and m is not CALL else m for m in talk]
    assert dialogue(*talk).unread == ()
    assert dialogue(*items).unread == ("width of a content part of messages",)


def test_a_thought_of_a_reply_is_doubtful_where_the_checkpoint_does_not_think() -> None:
    thought = {"role": "assistant", "content": "<think>a</think>A"}
    assert dialogue(USER, thought, thinks=False).doubts == (THOUGHT_IN_TEXT,)
    assert dialogue(USER, thought, thinks=True).doubts == ()
