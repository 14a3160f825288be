"""Messages, tools and calls as people spell them: each spelling by itself, and what it must not be taken for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hints import said
from row_parts import CALL, REPLY, RESULT, SYSTEM, TOOL_CALL, USER, WEATHER, dialogue, reply, user

from finetune.data.dialogue.conversation import (
    Conversation,
    Message,
    ShownImage,
    calls_in_words,
    validate,
)
from finetune.data.dialogue.images import image_of
from finetune.data.dialogue.tool_calls import (
    arguments_text,
    call_in_text,
    order_results,
    read_call,
    read_tools,
    tool_name,
)

NAMED = '{"name": "f", "arguments": {"a": 1}}'

# --- roles ---------------------------------------------------------------------------------------

SPEAKERS = {
    "system": ["system", "developer", "System"],
    "user": ["user", "human", "prompter", "USER"],
    "reply": ["assistant", "gpt", "chatgpt", "bing", "bard", "model", "Assistant"],
    "call": ["function_call", "tool_call"],
    "result": ["observation", "tool", "function", "function_response", "tool_response", "tool_result", "ipython"],
}  # fmt: skip


@pytest.mark.parametrize(("who", "role"), [(w, r) for w, names in SPEAKERS.items() for r in names])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_every_name_of_a_speaker_is_one_of_five(who: str, role: str, keys: tuple[str, str]) -> None:
    def one(role: str, text: str) -> dict[str, str]:
        return dict(zip(keys, (role, text), strict=True))

    begin, end = [one("user", "Q")], [one("assistant", "A")]
    if who == "system":
        found = dialogue(one(role, "x"), *begin, *end).messages[0]
        assert found == Message("system", "x")
    elif who == "user":
        assert dialogue(one(role, "x"), *end).messages[0] == Message("user", "x")
    elif who == "reply":
        assert dialogue(*begin, one(role, "x")).messages[1] == Message("assistant", "x")
    elif who == "call":
        result = one("observation", "o")
        found = dialogue(*begin, one(role, NAMED), result, *end).messages[1]
        assert found == Message("assistant", '{"a": 1}', "f")
        assert "is not JSON" in said(dialogue, *begin, one(role, "f(1)"), result, *end)
    else:
        call = one("function_call", NAMED)
        found = dialogue(*begin, call, one(role, "x"), *end).messages[2]
        assert found == Message("observation", "x")


@pytest.mark.parametrize("text", [NAMED, f"[{NAMED}]"])
@pytest.mark.parametrize("result", ["tool", "observation", "function"])
def test_a_call_as_json_is_one_before_every_kind_of_result(text: str, result: str) -> None:
    written, answer = {"role": "assistant", "content": text}, {"role": result, "content": "o"}
    found = dialogue(USER, written, answer, REPLY).messages
    assert (found[1].metadata, found[1].content) == ("f", '{"a": 1}')
    # With nothing behind it, or a question, it is one where its tool is known.
    tool = {"tools": [{"name": "f"}]}
    assert dialogue(USER, written, columns=tool).messages[1].metadata == "f"
    assert dialogue(USER, written, USER, REPLY).messages[1].metadata == ""
    two = {"role": "assistant", "content": f'[{NAMED}, {{"name": "g", "arguments": {{}}}}]'}
    assert dialogue(USER, two, columns=tool).messages[1].metadata == ""
    assert len(dialogue(USER, two, answer, REPLY, columns=tool).messages) == 5


# --- what goes with a message --------------------------------------------------------------------


def test_marks_hold_for_all_that_a_message_says_and_for_no_other() -> None:
    both = {**TOOL_CALL, "content": "Let me see.", "train": False, "weight": 0.5}
    both["tool_calls"] = both["tool_calls"] * 2
    result = {"role": "tool", "content": "1"}
    found = dialogue(USER, both, result, {"role": "assistant", "content": '{"a": 1}'}).messages
    assert [(m.train, m.weight) for m in found] == [
        (None, 1.0), (False, 0.5), (False, 0.5), (False, 0.5), (None, 1.0), (None, 1.0),
    ]  # fmt: skip
    later = {"role": "system", "content": [{"type": "text", "text": "S"}]}
    assert dialogue({**SYSTEM, "train": False}, later, USER, REPLY).messages[1].train is None
    parts = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
    assert dialogue({**USER, "train": False}, REPLY, parts, REPLY).messages[2].train is None


def test_only_text_beside_calls_is_a_reply() -> None:
    for text in (None, "", " \n"):
        found = dialogue(USER, {**TOOL_CALL, "content": text}, {**RESULT, "tool_call_id": "1"}, REPLY)  # fmt: skip
        assert len(found.messages) == 4
    named = {"role": "assistant", "content": {"name": "f", "arguments": {}}}
    assert len(dialogue(USER, named, RESULT, REPLY).messages) == 4
    parts = {**TOOL_CALL, "content": [{"type": "text", "text": "Hm."}]}
    assert dialogue(USER, parts, RESULT, REPLY).messages[1] == reply("Hm.")
    one = {"role": "assistant", "content": "Hm.", "function_call": {"name": "f", "arguments": "{}"}}
    assert [m.content for m in dialogue(USER, one, RESULT, REPLY).messages[1:3]] == ["Hm.", "{}"]


def test_ids_of_calls_stand_beside_the_function_and_order_the_results() -> None:
    calls = [{"id": i, "type": "function", "function": {"name": f"f{i}", "arguments": {}}} for i in "ab"]  # fmt: skip
    more = [{"id": i, "type": "function", "function": {"name": f"f{i}", "arguments": {}}} for i in "cd"]  # fmt: skip

    def result(name: str) -> dict[str, str]:
        return {"role": "tool", "tool_call_id": name, "content": f"of {name}"}

    first, second = ({"role": "assistant", "tool_calls": some} for some in (calls, more))
    talk = [USER, first, result("b"), result("a"), second, result("d"), result("c"), REPLY]
    found = [m.content for m in dialogue(*talk).messages if m.role == "observation"]
    assert found == ["of a", "of b", "of c", "of d"]
    wrong = [USER, first, result("a"), result("b"), second, result("c"), result("a"), REPLY]
    assert "message 7 answers call 'a', but the calls before it are 'c', 'd'" in said(dialogue, *wrong)  # fmt: skip
    unknown = [{**result("b"), "tool_call_id": 3}, result("a")]
    kept = dialogue(USER, first, *unknown, REPLY).messages
    assert [m.content for m in kept[3:5]] == ["of b", "of a"]  # as they stood


def test_results_without_calls_before_them_stay() -> None:
    messages = [user(), Message("observation", "x"), reply()]
    assert order_results(messages, {1: "a"}, [1, 2, 3]) == messages
    ends = [reply("{}", metadata="f"), reply("{}", metadata="f"), Message("observation", "b"), Message("observation", "a")]  # fmt: skip
    ordered = order_results(ends, {0: "1", 1: "2", 2: "2", 3: "1"}, [1, 2, 3, 4])
    assert [m.content for m in ordered[2:]] == ["a", "b"]


TOLD: list[tuple[dict[str, Any], list[Message]]] = [
    ({"name": "f", "parameters": {"a": 1}, "observation": "o"}, [reply('{"a": 1}', metadata="f"), Message("observation", "o")]),
    ({"name": "f", "parameters": {}, "content": "o"}, [reply("{}", metadata="f"), Message("observation", "o")]),
    ({"name": "f", "parameters": '{"a":1}', "observation": None}, [reply('{"a": 1}', metadata="f")]),
    ({"name": "f", "parameters": {}, "observation": {"t": 3}}, [reply("{}", metadata="f"), Message("observation", '{"t": 3}')]),
]  # fmt: skip


@pytest.mark.parametrize(("item", "expected"), TOLD)
def test_a_result_that_says_its_call_is_both(item: dict[str, Any], expected: list[Message]) -> None:
    behind = [] if len(expected) == 2 else [RESULT]
    found = dialogue(USER, {"role": "tool", **item}, *behind, REPLY).messages
    assert list(found[1 : 1 + len(expected)]) == expected


def test_what_a_result_says_twice_must_agree() -> None:
    same = {"role": "tool", "content": "x", "observation": "x"}
    assert dialogue(USER, CALL, same, REPLY).messages[2].content == "x"
    assert dialogue(USER, CALL, {"role": "tool", "observation": "y"}, REPLY).messages[2].content == "y"  # fmt: skip
    other = {**same, "observation": "y"}
    assert "say different things" in said(dialogue, USER, CALL, other, REPLY)
    with_name = {"role": "observation", "metadata": "f", "content": "x"}
    assert dialogue(USER, CALL, with_name, REPLY).messages[2] == Message("observation", "x", "f")
    for name in (None, "", 3):
        item = {"role": "tool", "name": name, "parameters": {}, "content": "x"}
        assert "has parameters but no name" in said(dialogue, USER, item, REPLY)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "object", "x": 1}], '[{"type": "object", "x": 1}]'),
        (["a"], '["a"]'), ([], "[]"), ({"type": "text"}, '{"type": "text"}'), ("", None), (1.5, "1.5"), (False, "false"),
    ],
)  # fmt: skip
def test_a_result_is_text_parts_or_data(content: Any, text: str | None) -> None:
    items = (USER, CALL, {"role": "tool", "content": content}, REPLY)
    if text is None:
        assert "content is empty" in said(dialogue, *items)
    else:
        assert dialogue(*items).messages[2].content == text


@pytest.mark.parametrize("kind", ["image", "image_url"])
@pytest.mark.parametrize("key", ["image", "image_url", "bytes", "path", "url"])
def test_a_part_names_its_image_under_any_key(kind: str, key: str) -> None:
    part = {"type": kind, key: "a.png", "id": 1}
    found = dialogue({"role": "user", "content": [{"type": "text", "text": "Q"}, part]}, REPLY)
    assert found.messages[0].images == (ShownImage("a.png", 1),)
    result = {"role": "tool", "content": [part]}
    shown = dialogue(USER, CALL, result, REPLY)
    assert (shown.messages[2].content, shown.images) == ("", ("a.png",))
    assert "shows an image; only users and tools can" in said(dialogue, USER, {"role": "assistant", "content": [part]})  # fmt: skip
    assert "shows an image" in said(dialogue, {"role": "system", "content": [part]}, USER, REPLY)


@pytest.mark.parametrize("key", ["image", "images"])
@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_users_and_tools_show_images_of_a_key_of_theirs(key: str, role: str) -> None:
    items = [SYSTEM, USER, REPLY]
    items = [{**m, key: "a.png"} if m["role"] == role else m for m in items]
    assert f"an image on {role!r}; only users" in said(dialogue, *items)
    nothing = [{**m, key: {"bytes": None, "path": None}} for m in (SYSTEM, USER, REPLY)]
    assert dialogue(*nothing).images == ()
    shown = dialogue(USER, CALL, {**RESULT, key: ["a.png"]}, REPLY)
    assert shown.messages[2].images == (ShownImage("a.png"),)
    column = {"images": ["b.png"]}
    assert "images: the first user message names" in said(dialogue, {**USER, key: "a.png"}, REPLY, columns=column)  # fmt: skip


def test_images_of_a_column_stand_in_front_of_the_first_question() -> None:
    found = dialogue(SYSTEM, USER, REPLY, USER, REPLY, columns={"image": "a.png"})
    assert [m.images for m in found.messages[:2]] == [(), (ShownImage("a.png"),)]
    assert found.messages[3].images == ()
    alone = {"messages": [CALL], "images": ["a"]}
    assert "there is no user message" in said(dialogue, *alone["messages"], columns={"images": ["a"]})  # fmt: skip
    parts = {"role": "user", "content": [{"type": "image"}]}
    assert "message 3: has a part of type 'image'" in said(dialogue, USER, REPLY, parts, REPLY)


def test_images_of_a_message_stand_at_its_placeholders_or_in_front() -> None:
    own = {"role": "user", "content": "a<image>b<image>", "images": ["x.png", "y.png"]}
    found = dialogue(USER, REPLY, own, REPLY).messages[2]
    assert (found.content, found.images) == ("ab", (ShownImage("x.png", 1, True), ShownImage("y.png", 2, True)))  # fmt: skip
    part = {"type": "image", "path": "z.png"}
    words = [{"type": "text", "text": text} for text in ("a", "bc", "d")]
    mixed = {"role": "user", "content": [*words[:2], part, words[2], part]}
    assert [image.at for image in dialogue(mixed, REPLY).messages[0].images] == [3, 4]
    both = {**own, "content": [{"type": "text", "text": "a"}, part]}
    assert said(dialogue, USER, REPLY, both, REPLY).startswith(
        "message 3: names images beside those"
    )
    two = {"role": "user", "content": "Q", "image": "x.png", "images": ["y.png"]}
    assert said(dialogue, USER, REPLY, two, REPLY).startswith("message 3: names an 'image' and 'images'")  # fmt: skip
    lost = [{**own, "content": "Q"}, REPLY, {**USER, "content": "a<image>"}, REPLY]
    assert said(dialogue, *lost).startswith("message 3: <image> stands in the text, and the row has no")  # fmt: skip
    answer = {"role": "assistant", "content": "an <image>"}
    assert said(dialogue, {**own, "content": "Q"}, answer).startswith(
        "message 2: <image> stands in"
    )
    assert dialogue({**USER, "content": "a<image>"}, answer).images == ()


def test_a_system_message_may_be_its_tools_alone() -> None:
    alone = {"role": "system", "tools": [WEATHER]}
    found = dialogue(alone, USER, REPLY)
    assert (len(found.messages), len(found.tools)) == (2, 1)
    assert "message 1: content is null" in said(dialogue, {"role": "system"}, USER, REPLY)
    slip = {"role": "assistant", "contents": "A"}
    assert "did you mean 'content'?" in said(dialogue, USER, slip)
    after = dialogue(alone, {**SYSTEM, "id": 1}, USER, REPLY)
    assert len(after.tools) == 1
    called = {"role": "function_call", "content": [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]}  # fmt: skip
    assert [m.metadata for m in dialogue(USER, called, RESULT, REPLY).messages] == ["", "f", "g", "", ""]  # fmt: skip


def test_an_image_is_its_bytes_else_its_path_else_its_address() -> None:
    assert image_of({"bytes": b"abc", "path": "p", "url": "u"}, "x") == "data:image;base64,YWJj"
    assert image_of({"bytes": None, "path": "p", "url": "u"}, "x") == "p"
    assert image_of({"path": "", "url": "u"}, "x") == "u"
    assert image_of("C/d.png", "x") == "C/d.png"
    some = {"images": {"bytes": None, "path": "a.png"}}
    assert dialogue(USER, REPLY, columns=some).images == ("a.png",)
    for wrong in ("a\0", "", None, 3, {}, ["a"]):
        assert "x is neither a path nor" in said(image_of, wrong, "x")


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "video", "video": "x"}, "has a video"), ({"type": "video_url"}, "has a video"),
        ("a", "a list of other things"), ({"text": "a"}, "a list of other things"), ({"type": 3}, "a list of other things"),
        ({"type": "tool_use"}, "a part of type 'tool_use'"), ({"type": "text", "text": 3}, "a part of type 'text'"),
    ],
)  # fmt: skip
def test_a_part_that_cannot_be_taken_has_its_reason(part: Any, reason: str) -> None:
    text = said(dialogue, USER, REPLY, {"role": "user", "content": [part]}, REPLY)
    assert text.startswith("message 3: content ")
    assert reason in text


# --- tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["python", "simple_browser", "cogview"])
def test_tools_that_glm_4_knows_need_no_definition_and_take_plain_text(name: str) -> None:
    (tool,) = read_tools([{"type": name}])
    assert (tool, tool_name(tool)) == ({"type": name}, name)
    assert arguments_text(name, "a = 1", 1) == "a = 1"
    assert arguments_text(name, {"a": 1}, 1) == '{"a": 1}'
    assert "not JSON" in said(arguments_text, f"my_{name}", "a = 1", 1)


def test_all_that_a_definition_says_is_kept_but_for_nulls() -> None:
    wrapped = {"type": "function", "function": WEATHER, "strict": True}
    assert read_tools([wrapped]) == (wrapped,)
    nulls = {"type": "function", "function": {**WEATHER, "strict": None}, "x": 1}
    assert read_tools(nulls) == ({"type": "function", "function": WEATHER, "x": 1},)
    plain = {"type": "function", "function": WEATHER}
    assert read_tools({"function": WEATHER, "type": None}) == (plain,)
    assert read_tools((json.dumps(WEATHER),)) == (plain,)
    flat = {"type": "function", "name": "f", "parameters": None, "anyOf": [{"a": None}, [None, 1]]}
    assert read_tools([flat])[0]["function"] == {"name": "f", "anyOf": [{}, [None, 1]]}
    two = read_tools([{"type": "python"}, {"name": "g"}, {"name": "f"}])
    assert [tool_name(tool) for tool in two] == ["python", "g", "f"]
    assert "definition 2 has no usable name" in said(read_tools, [{"name": "f"}, {}])
    assert "definition 2 is null" in said(read_tools, [{"name": "f"}, None])
    assert "'g' is defined twice" in said(read_tools, [{"name": "f"}, {"name": "g"}, {"name": "g"}])
    assert read_tools({"type": "python", "function": {"name": "f"}} | {"type": "function"})


def test_a_nulls_place_is_looked_up_in_the_tool_that_is_called() -> None:
    def tool(name: str, *properties: str) -> dict[str, Any]:
        return {"name": name, "parameters": {"type": "object", "properties": {key: {} for key in properties}}}  # fmt: skip

    tools = read_tools([{"type": "python"}, {"name": "h"}, tool("f", "x"), tool("g", "y")])
    call = {"name": "g", "arguments": {"x": None, "y": None, "z": 1}}
    assert read_call(call, 1, tools).arguments == '{"y": null, "z": 1}'
    assert read_call({**call, "name": "h"}, 1, tools).arguments == '{"x": null, "y": null, "z": 1}'


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"é": [1, 2]}, '{"é": [1, 2]}'), ('{"a":1}', '{"a": 1}'), ("", "{}"), (" ", "{}"), (None, "{}"), ({}, "{}")],
)  # fmt: skip
def test_arguments_have_one_spelling(arguments: Any, text: str) -> None:
    assert arguments_text("f", arguments, 1) == text
    assert read_call({"name": "f", "parameters": arguments}, 1).arguments == text
    assert read_call({"function": {"name": "f", "arguments": arguments}}, 1).arguments == text


def test_arguments_that_are_no_object_have_their_place() -> None:
    for wrong, what in (
        ("[1]", "a list"),
        (3, "a number"),
        (True, "true or false"),
    ):
        assert said(arguments_text, "f", wrong, 4).startswith(f"message 4: the arguments of 'f': are {what},")  # fmt: skip
    assert "message 4: the call is a list" in said(read_call, ["f"], 4)
    for name in ("", 3, None):
        assert "message 4: the call has no function name" in said(read_call, {"name": name}, 4)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (NAMED, 1), (f"[{NAMED}, {NAMED}]\n", 2), ("[]", 0), (f"{NAMED} so", 0), (f" {NAMED}", 0), ('{"name": "f"}', 0),
        ('{"name": "f", "arguments": {}, "id": 1}', 0), (f"[{NAMED}, 1]", 0), ('{"name": "f", "arguments": }', 0),
        (f'[{NAMED}, {{"name": "f"}}]', 0), ('[{"name": [1], "arguments": {}}]', 0), ('{"name": 3, "arguments": {}}', 0),
    ],
)  # fmt: skip
def test_a_text_is_a_call_only_when_it_says_nothing_else(text: str, count: int) -> None:
    assert len(call_in_text(text) or ()) == count


# --- valid dialogues -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tools", "found"),
    [('Call {"a": 1} \n', True, [1]), ('Call {"a": 1}', False, []), ("Call }", True, []), ('{"a": 1} so', True, [])],
)  # fmt: skip
def test_a_reply_that_writes_its_call_in_words_may_be_answered_by_a_tool(
    text: str, tools: bool, found: list[int]
) -> None:
    talk = (user(), reply(text), Message("observation", "o"), reply())
    conversation = Conversation(talk, ({"type": "python"},) if tools else ())
    assert calls_in_words(conversation) == found
    if found:
        assert validate(conversation) is conversation
    else:
        assert "message 3 is 'observation'" in said(validate, conversation)


def test_an_empty_system_message_is_valid_and_reasons_count_from_one() -> None:
    assert validate(Conversation((Message("system", ""), user(), reply())))
    broken = Conversation((user(), reply(), user("\0"), reply("x", weight=-1.0)))
    assert said(validate, broken).startswith("message 4: weight is -1.0")
    assert said(validate, broken, "train", [5, 6, 7, 8]).startswith("message 8: weight")
    nul = Conversation((user(), reply(), user("\0"), reply()))
    assert said(validate, nul, "train", [5, 6, 7, 8]).startswith("message 7: the text contains a NUL")  # fmt: skip
    name = Conversation((user(), reply("{}", metadata="f\0"), Message("observation", "o"), reply()))
    assert said(validate, name) == "message 2: the text contains a NUL character"
