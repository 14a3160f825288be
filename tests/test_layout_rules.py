"""Layouts of rows, one by one: which columns mean which, what a row of each becomes and what it may not be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hints import said
from row_parts import CALL, REPLY, RESULT, THOUGHT, TOOL_CALL, USER, WEATHER, dialogue, reply, user

from finetune.data.dialogue import doubts
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.data.dialogue.foreign import (
    listed_tools,
    tools_of_system,
)
from finetune.data.dialogue.formats import FORMATS, RowRules, detect, to_conversation
from finetune.data.dialogue.images import ImageRule

READ = RowRules(calls_in_text="read")
PARTS = {"role": "user", "content": [{"type": "text", "text": "Q"}]}

# --- which layout --------------------------------------------------------------------------------

ROWS: list[tuple[dict[str, Any], str]] = [
    ({"messages": [USER, REPLY]}, "messages"), ({"messages": "[]"}, "messages"), ({"messages": None}, "messages"),
    ({"messages": [USER, TOOL_CALL]}, "openai"), ({"messages": [{"role": "tool", "content": "x"}]}, "openai"),
    ({"messages": [PARTS]}, "openai"), ({"messages": [USER, 3, TOOL_CALL]}, "openai"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages"),
    ({"conversations": [USER]}, "chatglm3"), ({"conversations": '[{"role": "user"}]'}, "chatglm3"),
    ({"conversations": [{"from": "human", "value": "Q"}]}, "sharegpt"), ({"conversations": []}, "sharegpt"),
    ({"conversations": "[]"}, "sharegpt"), ({"conversation": [{"human": "Q"}]}, "conversation"),
    ({"chat": "USER: Q"}, "glaive"), ({"chat": {"turn_1": {}}}, "moss"),
    ({"query": "Q", "answers": [], "tools": []}, "xlam"), ({"text": "<|im_start|>user"}, "chatml"),
    ({"text": "a story"}, "text"), ({"text": "a", "id": 3, "notes": ""}, "text"),
    ({"instruction": None}, "alpaca"), ({"instruction": "I", "query": "Q"}, "alpaca"), ({"query": "Q", "answers": []}, "pairs"),
    ({"text": "a", "prompt": "Q"}, "pairs"), ({"conversation": [], "prompt": "Q"}, "pairs"),
    ({"conversation": ["a"], "prompt": "Q"}, "pairs"), ({"chat": None, "input": "Q"}, "pairs"),
    ({"messages": None, "instruction": "I"}, "alpaca"), ({"conversations": None, "user": "Q"}, "pairs"),
    ({"messages": [USER], "prompt": "Q"}, "messages"), ({"messages": [USER], "conversations": [USER]}, "messages"),
    ({"query": "Q", "answers": [], "tools": None}, "xlam"), ({"query": 3, "answers": [], "tools": []}, "pairs"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "layout"), ROWS)
def test_the_layout_is_told_from_columns_and_kinds_of_values(
    row: dict[str, Any], layout: str
) -> None:
    assert detect([row]) == layout
    assert detect([{"x": 1}, row, {"instruction": "I"}]) == layout
    assert layout in FORMATS


def test_a_layout_that_is_not_known_names_the_columns_of_the_first_row() -> None:
    reason = said(detect, [{"a": 1, "b": 2}, {"c": 3}])
    assert reason.startswith("the layout is not known by its columns ('a', 'b'); expected")
    assert "columns (none)" in said(detect, [])
    for row in ({"text": "a", "mood": "x"}, {"text": 3}, {"text": None}):
        assert "is not known" in said(detect, [row])


def test_what_lists_are_called_is_openai_only_where_the_first_are_messages() -> None:
    called = {"messages": [USER, TOOL_CALL]}
    assert detect([{"messages": [USER]}, called]) == "openai"
    assert detect([{"conversations": [USER]}, called]) == "chatglm3"
    assert detect([called, {"messages": [USER]}]) == "openai"


OTHERS = {
    "conversation": {"conversation": "x"}, "glaive": {"chat": 3}, "moss": {"chat": "x"}, "xlam": {"query": "Q"},
    "chatml": {"text": "plain"},
}  # fmt: skip


@pytest.mark.parametrize("layout", OTHERS)
def test_a_row_that_is_not_of_the_layout_that_is_said_has_its_columns_named(layout: str) -> None:
    (column,) = OTHERS[layout]
    assert said(to_conversation, {**OTHERS[layout], "y": 1}, layout) == (
        f"the row is not of the layout {layout}; its columns are {column!r}, 'y'"
    )


READ_COLUMNS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, REPLY]}, "sharegpt": {"conversations": [USER, REPLY]},
    "conversation": {"conversation": [{"human": "Q", "assistant": "A"}]}, "glaive": {"chat": "USER: Q ASSISTANT: A"},
    "moss": {"chat": {"t": {"Human": "Q", "MOSS": "A"}}, "num_turns": 1},
    "chatml": {"text": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>"},
    "alpaca": {"instruction": "Q", "output": "A", "input": "", "history": [], "context": ""},
    "pairs": {"prompt": "Q", "response": "A", "history": [], "context": ""},
}  # fmt: skip


@pytest.mark.parametrize("layout", READ_COLUMNS)
def test_the_columns_of_a_layout_and_those_of_all_are_read_and_no_others(layout: str) -> None:
    row = READ_COLUMNS[layout]
    common = {"tools": [WEATHER], "images": [], "chat_template_kwargs": {"enable_thinking": True}}
    found = to_conversation({**row, **common, "system": "S"}, layout, location="f:1")
    assert (found.unread, found.location, found.thinks) == ((), "f:1", True)
    assert len(found.tools) == 1
    assert found.messages == (Message("system", "S"), user(), reply())
    for other in ("answers", "num_turns_x", "output_x"):
        assert to_conversation({**row, other: "x"}, layout).unread == (other,)
    for of_pairs in ("history", "context"):
        if of_pairs not in row:
            assert to_conversation({**row, of_pairs: "x"}, layout).unread == (of_pairs,)
    shown = to_conversation({**row, "image": "a.png"}, layout)
    assert shown.images == ("a.png",)
    rule = RowRules(images=ImageRule("x", most=0))
    assert "takes none" in said(to_conversation, {**row, "image": "a.png"}, layout, rules=rule)
    assert to_conversation(row, layout, rules=rule).messages


def test_a_document_is_a_text_and_nothing_else() -> None:
    found = to_conversation({"text": "a story", "id": 1, "mood": "x"}, "text", location="f:1")
    assert found == Conversation((), text="a story", location="f:1", unread=("mood",))
    for value, reason in ((3, "text: is a number, not text"), ("", "text: is empty"), (" \n", "text: is empty"),
                          ("a\0", "the text contains a NUL character"), (None, "text: is null, not text")):  # fmt: skip
        assert said(to_conversation, {"text": value}, "text") == reason


@pytest.mark.parametrize(
    "text",
    [
        "### Response: a", "x\n### Human a", "### Assistant", "### Instruction\n", "USER: a", "x\nASSISTANT: b", "Human: a",
        "Assistant：a", "问：a", "答: a", "[INST] a", "[/INST]", "<|user|>a", "<|assistant|>", "<|system|>", "<|im_start|>",
        "<|eot_id|>", "a<start_of_turn>",
    ],
)  # fmt: skip
def test_every_way_to_spell_a_dialogue_in_a_document_is_counted(text: str) -> None:
    from finetune.data.dialogue.foreign import DIALOGUE_IN_TEXT

    assert to_conversation({"text": text}, "text").doubts == (DIALOGUE_IN_TEXT,)
    for plain in ("a Human: b", "Humans: a", "### Responses", "<|other|>", "a USER: b"):
        assert to_conversation({"text": plain}, "text").doubts == ()


# --- forms of single data sets -------------------------------------------------------------------


def test_a_prompt_in_chatml_has_an_open_turn_at_its_end() -> None:
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n\nQ\nmore\n<|im_end|>\n<|im_start|>assistant\n"
    found = to_conversation({"text": text}, purpose="predict")
    assert found.messages == (Message("system", "S"), user("Q\nmore"))
    whole = to_conversation({"text": text + "A"})
    assert whole.messages[-1] == reply()
    outside = said(to_conversation, {"text": f"{'x' * 50}{text}A"})
    assert outside == f"text: {'x' * 40!r} stands outside of its ChatML turns"
    empty = said(to_conversation, {"text": text.replace("\nQ\nmore\n", "") + "A"})
    assert empty == "message 2: content is empty; GLM-4's template drops such a message"


def test_glaives_speakers_and_ends_are_read() -> None:
    chat = "USER: Q\n\nASSISTANT: one <|endoftext|>\nFUNCTION RESPONSE: {}\n ASSISTANT: two<|endoftext|>  "
    system = 'SYSTEM: Be kind. You have access to functions -\n{"name": "f"}\n\n{"name": "g"}'
    row = {"chat": chat, "system": system, "tools": [WEATHER]}
    items = {"role": "assistant", "content": '{"name": "f", "arguments": {}}'}
    called = to_conversation({**row, "chat": chat.replace("one", items["content"])})
    assert [(m.role, m.content, m.metadata) for m in called.messages] == [
        ("system", "Be kind.", ""), ("user", "Q", ""), ("assistant", "{}", "f"), ("observation", "{}", ""), ("assistant", "two", ""),
    ]  # fmt: skip
    assert [tool["function"]["name"] for tool in called.tools] == ["f", "g"]
    assert said(to_conversation, {"chat": "Hello USER: Q"}) == "chat: does not begin with USER:"
    talk = "USER: Q ASSISTANT: A"
    broken = to_conversation({"chat": talk, "system": 'SYSTEM: Use {"name": it'})
    assert (broken.messages[0].content, broken.tools) == ('Use {"name": it', ())
    behind = to_conversation({"chat": talk, "system": 'Call {"name": "f"} and be kind'})
    assert (behind.messages[0].role, len(behind.tools)) == ("user", 1)
    plain = to_conversation({"chat": talk, "system": "Call me."})
    assert plain.messages[0].content == "Call me."
    assert to_conversation({"chat": talk, "system": None}).messages == (user(), reply())
    assert said(to_conversation, {"chat": talk, "system": 3}) == "system: is a number, not text"


def test_mosss_turns_have_thoughts_and_marks_and_no_commands() -> None:
    def turn(**more: Any) -> dict[str, Any]:
        return {"Human": "<|Human|>: Q<eoh>\n", "MOSS": "<|MOSS|>: A<eom>\n", **more}

    thought = turn(**{"Inner Thoughts": "<|Inner Thoughts|>: why<eot>", "Commands": "<|Commands|>: None<eoc>\n"})  # fmt: skip
    row = {"chat": {"t1": turn(loss=False), "t2": thought}}
    found = to_conversation(row, rules=RowRules(thinks=True))
    assert [(m.content, m.train) for m in found.messages] == [
        ("Q", None), ("A", False), ("Q", None), ("<think>\nwhy\n</think>\n\nA", None),
    ]  # fmt: skip
    assert to_conversation({"chat": {"t": turn(**{"Tool Responses": "x", "Commands": ""})}}).unread == ()  # fmt: skip
    for wrong, reason in (
        ({"t1": turn(), "t2": turn(MOSS=None)}, "chat: t2 has no text MOSS"),
        ({"t1": "x"}, "chat: t1 has no text MOSS"), ({"t1": {"MOSS": "A"}}, "chat: t1 has no text Human"),
        ({"t1": turn(Human=3)}, "chat: t1 has no text Human"),
        ({"t1": turn(Commands="<|Commands|>: Search(x)<eoc>")}, "chat: t1 has commands of MOSS's own tools, which GLM-4 does not have"),
    ):  # fmt: skip
        assert said(to_conversation, {"chat": wrong}) == reason


def test_xlams_parameters_are_put_into_a_schema_unless_they_are_one() -> None:
    def tools(parameters: Any) -> Any:
        row = {"query": "Q", "answers": '[{"name": "f", "arguments": {}}]', "tools": json.dumps([{"name": "f", "parameters": parameters}])}  # fmt: skip
        return to_conversation(row).tools[0]["function"]["parameters"]

    bare = {"x": {"type": "int"}}
    whole = {"type": "object", "properties": bare}
    assert tools(bare) == whole
    for kept in (whole, {"properties": bare}, {"type": "object"}):
        assert tools(kept) == kept
    assert tools({"type": {"description": "kind"}}) == {"type": "object", "properties": {"type": {"description": "kind"}}}  # fmt: skip
    for answers in ([], "[]", {"name": "f"}, "{}", None):
        row = {"query": "Q", "answers": answers, "tools": []}
        assert said(to_conversation, row) == "answers: is not a list of calls"
    none = to_conversation({"query": "Q", "answers": [{"name": "f", "arguments": {}}], "tools": None})  # fmt: skip
    assert (none.tools, none.messages) == ((), (user(), reply("{}", metadata="f")))


def test_pairs_in_a_list_are_turns_and_what_else_they_say_is_of_the_reply() -> None:
    def read(*turns: Any, **rules: Any) -> list[Any]:
        found = to_conversation({"conversation": list(turns)}, rules=RowRules(**rules))
        return [(m.role[0], m.content, m.train, m.weight) for m in found.messages]

    one = {"human": "Q", "assistant": "A", "train": False, "weight": 2, "system": "S"}
    assert read(one, {"input": "R", "output": "B"}) == [
        ("s", "S", None, 1.0), ("u", "Q", None, 1.0), ("a", "A", False, 2.0), ("u", "R", None, 1.0), ("a", "B", None, 1.0),
    ]  # fmt: skip
    assert read({"assistant": "A"}, {"human": "Q", "assistant": "B"}, turns="merge")[0] == ("a", "A", False, 1.0)  # fmt: skip
    assert read({"from": "human", "value": "Q"}, {"role": "assistant", "content": "A"})[1][:2] == ("a", "A")  # fmt: skip
    assert read({"role": "user", "content": "Q"}, {"human": "", "assistant": "A"})[1][:2] == ("a", "A")  # fmt: skip
    both = {"human": "Q", "assistant": "A", "input": "x", "output": "y"}
    assert to_conversation({"conversation": [both]}).unread == ("input of messages", "output of messages")  # fmt: skip
    assert said(read, one, {"x": 1}) == "conversation: turn 2 has neither human/assistant nor input/output"  # fmt: skip
    assert "neither human/assistant" in said(read, {"human": "Q"})


# --- tools in a system text ----------------------------------------------------------------------

LIST = '[{"name": "f"}]'
DEFINED = [{"name": "f"}]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"<tools>{LIST}</tools>", ""), (f"Be kind. <tools>\n{LIST}\n</tools> Bye.", "Be kind. \n Bye."),
        ('<tools>{"name": "f"}\n\n</tools>', ""), (f"Be kind. You have tools: {LIST}", "Be kind."), (f"FUNCTIONS you may use:\n{LIST}", ""),
        (f"Be kind.\nfunctions: {LIST}\nThe end.", "Be kind.\n\n\nThe end."),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("role", "key"), [("role", "content"), ("from", "value")])
def test_tools_that_a_system_text_lists_go_out_of_it(
    text: str, kept: str, role: str, key: str
) -> None:
    items = [{role: "system", key: text, "x": 1}, {role: "user", key: "Q"}]
    told, tools = tools_of_system(items)
    assert tools == DEFINED
    assert told == ([{role: "system", key: kept, "x": 1}, items[1]] if kept else items[1:])


@pytest.mark.parametrize(
    "items",
    [
        [], ["x"], [{"role": "user", "content": f"tools: {LIST}"}], [{"role": "system", "content": None}],
        [{"role": "system", "content": "Be kind."}], [{"role": "system", "content": f"</tools> <tools> {LIST[:-1]}"}],
        [{"role": "system", "content": "<tools>no JSON</tools>"}], [{"role": "system", "content": "<tools></tools>"}],
        [{"role": "system", "content": "tools: [{'name': 1}]"}], [{"role": "system", "content": f"utensils: {LIST}"}],
    ],
)  # fmt: skip
def test_a_system_text_that_lists_no_tools_stays(items: list[Any]) -> None:
    assert tools_of_system(items) == (items, None)


def test_a_list_of_tools_ends_with_the_last_object() -> None:
    nested = '[{"name": "f", "x": [{}]}, {"name": "g"}]'
    assert listed_tools(f"tools: {nested} so").text == nested  # type: ignore[union-attr]
    text = f"Hi. My tools: {LIST} and [more] ] "
    found = listed_tools(text)
    assert found is not None
    assert (text[found.begin : found.begin + 5], found.text, text[found.end :]) == (" My t", LIST, " and [more] ] ")  # fmt: skip
    spaced = "functions:\n [ {}\n ]"
    assert listed_tools(spaced).text == "[ {}\n ]"  # type: ignore[union-attr]
    for none in ("tools: [1]", "tools [{}]", "tools: [{", f"tools{'x' * 201}: {LIST}", f"tools\n: {LIST}"):  # fmt: skip
        assert listed_tools(none) is None


@pytest.mark.parametrize(
    "talk",
    [
        "You have functions.", "Use a tool.", "These tools help.", "You may call.", "Give arguments.", "Each parameter counts.",
        "Return JSON.", "Follow the schema.", "Invoke it.", "As pydantic has it.", "Ask and use them.", "This API.", "Here:",
        "使用工具。", "这是函数。", "参数如下。", "请调用。", "一个接口。",
    ],
)  # fmt: skip
def test_sentences_that_speak_of_tools_go_with_them(talk: str) -> None:
    said_too = "Be kind! 请用中文。"
    told, tools = tools_of_system([{"role": "system", "content": f"{said_too}\n{talk}\n<tools>{LIST}</tools>"}])  # fmt: skip
    assert (told[0]["content"].split(), tools) == (said_too.split(), DEFINED)
    alone, _ = tools_of_system([{"role": "system", "content": f"...\n{talk}\n<tools>{LIST}</tools>"}])  # fmt: skip
    assert alone == []


@pytest.mark.parametrize(("role", "key"), [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("who", ["tool", "observation"])
def test_results_lose_their_tags_where_tools_are_read(who: str, role: str, key: str) -> None:
    system = {role: "system", key: f"<tools>{LIST}</tools>"}
    tagged = {role: who, key: " <tool_response>\n3\n</tool_response> ", "x": 1}
    kept = [
        {role: who, key: "3</tool_response>"}, {role: who, key: "<tool_response>3"}, {role: who, key: 3},
        {role: "user", key: "<tool_response>3</tool_response>"}, "x",
    ]  # fmt: skip
    told, _ = tools_of_system([system, tagged, *kept])
    assert told == [{role: who, key: "3", "x": 1}, *kept]


# --- reasoning, calls and turns under the rules --------------------------------------------------


def test_where_reasoning_of_its_own_key_goes() -> None:
    items = ({"role": "system", "content": ""}, USER, {**THOUGHT, "reasoning_content": " why\n"})
    kept = dialogue(*items)
    assert kept.messages[1].content == "<think>\nwhy\n</think>\n\nA"
    assert said(dialogue, *items, thinks=False).startswith("message 3: has reasoning in a key of")
    call = {**TOOL_CALL, "reasoning_content": "why"}
    lost = dialogue(USER, call, RESULT, REPLY)
    assert (lost.messages[1].content, lost.doubts) == ("{}", (doubts.CALL_THOUGHT,))
    thought = dialogue(USER, call, RESULT, REPLY, thinks=True)
    assert thought.messages[1].content == "<think>\nwhy\n</think>\n\n{}"
    dropped = dialogue(USER, call, RESULT, {**THOUGHT}, thinks=False, reasoning="drop")
    assert [m.content for m in dropped.messages] == ["Q", "{}", "R", "A"]
    tagged = {"role": "assistant", "content": "<think>a</think>\n\nA"}
    assert dialogue(USER, tagged, reasoning="drop").messages[1].content == "A"
    question = {"role": "user", "content": "<think>a</think>Q"}
    assert dialogue(question, REPLY, reasoning="drop").messages[0].content == question["content"]


def test_reasoning_is_required_of_trained_replies_only() -> None:
    thought = {"role": "assistant", "content": "<think>a</think>A"}
    assert dialogue(USER, thought, reasoning="require").messages
    assert dialogue(USER, CALL, RESULT, thought, reasoning="require").messages
    assert "message 4: the reply has no reasoning" in said(dialogue, USER, CALL, RESULT, REPLY, reasoning="require")  # fmt: skip
    open_tag = {"role": "assistant", "content": "<think>a"}
    assert "no reasoning" in said(dialogue, USER, open_tag, reasoning="require")
    keyed = dialogue(USER, THOUGHT, reasoning="require")
    assert "why" in keyed.messages[1].content


def test_calls_with_fewer_results_are_counted_beside_other_doubts() -> None:
    image = {"role": "user", "content": "<image> Q"}
    two = [CALL, CALL, RESULT, REPLY]
    assert dialogue(USER, *two).doubts == (doubts.FEWER_RESULTS,)
    assert dialogue(image, *two).doubts == (doubts.IMAGE_IN_TEXT, doubts.FEWER_RESULTS)
    assert dialogue(image, CALL, RESULT, REPLY).doubts == (doubts.IMAGE_IN_TEXT,)


def test_numbers_of_messages_hold_until_they_are_joined_or_divided() -> None:
    empty = {"role": "system", "content": ""}
    written = {"role": "assistant", "content": 'Hm. <tool_call>{"name": "f", "arguments": {}}</tool_call>'}  # fmt: skip
    bad = {"role": "user", "content": "\0"}
    assert said(dialogue, empty, USER, REPLY, bad, REPLY, turns="merge").startswith("message 4: ")
    assert said(dialogue, empty, USER, USER, REPLY, bad, REPLY, turns="merge").startswith("message 3: ")  # fmt: skip
    plain = [empty, USER, REPLY, bad, REPLY]
    assert said(dialogue, *plain, calls_in_text="read").startswith("message 4: ")
    assert said(dialogue, empty, USER, written, RESULT, REPLY, bad, REPLY, calls_in_text="read").startswith("message 6: ")  # fmt: skip


def test_a_list_under_the_key_of_its_layout_is_needed() -> None:
    assert said(to_conversation, {"x": 1, "y": 2}, "sharegpt") == (
        "the row has no 'conversations'; its columns are 'x', 'y'"
    )
    for fmt in ("messages", "openai"):
        assert said(to_conversation, {"messages": 3}, fmt) == "messages: is a number, not a list of messages"  # fmt: skip
    assert to_conversation({"conversations": [USER, REPLY]}, "chatglm3").messages == (user(), reply())  # fmt: skip
