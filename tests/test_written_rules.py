"""Calls, results and other structure written as text: each dialect, mark and end by itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from row_parts import REPLY, USER, dialogue, reply, user

from finetune.data.dialogue import doubts
from finetune.data.dialogue.calls_in_text import (
    CALL_IN_TEXT,
    RESULT_IN_TEXT,
    TOOLS_IN_TEXT,
    UNREADABLE_CALL,
    structure_in_text,
    with_calls_read,
    written_calls,
)
from finetune.data.dialogue.conversation import Message

ARGUMENTS = {"a": 1, "é": "x"}
A = json.dumps(ARGUMENTS, ensure_ascii=False)
J = f'{{"name": "f", "arguments": {A}}}'
G = '{"name": "g", "arguments": {}}'
F = [("f", A)]
TWO = [*F, ("g", "{}")]


def found(text: str, *tools: str) -> Any:
    read = written_calls(text, tools)
    return None if read is None else (read.text, [tuple(call) for call in read.calls])


MARKED = [
    *(f"<{tag}>{J}{end}" for tag in ("tool_call", "functioncall", "function_call") for end in (f"</{tag}>", "<|endoftext|>", "", f"</{tag}>\n")),
    f'<tool_call>\n{{"name": "f", "parameters": {A}}}\n</tool_call>', f"<functioncall> {{\"name\": \"f\", \"arguments\": '{A}'}} <|endoftext|>",
    "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>é</arg_key><arg_value>x</arg_value></tool_call>",
    f"<function=f>{A}</function>", "<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=é>x</parameter></function>",
    f'<invoke name="f">{A}</invoke>', '<invoke name="f"><parameter name="a">1</parameter><parameter name="é">"x"</parameter></invoke>',
    f"<tool_call><function=f>{A}</function></tool_call>", f"<function_calls><invoke name=\"f\">{A}</invoke></function_calls>",
    f"✿FUNCTION✿: f\n✿ARGS✿: {A}", f"✿FUNCTION✿：f ✿ARGS✿：{A} ✿RESULT✿", f"✿FUNCTION✿: f\n✿ARGS✿: {A}\n✿RETURN✿:",
    f"<｜tool▁call▁begin｜>f<｜tool▁sep｜>{A}<｜tool▁call▁end｜>", f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{A}\n```<｜tool▁call▁end｜>",
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{A}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    f"<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{A}<|tool_call_end|>", f"<|tool_call_begin|> f <|tool_call_argument_begin|> {A} <|tool_call_end|>",
    f"<|tool_calls_section_begin|><|tool_call_begin|>f:12<|tool_call_argument_begin|>{A}<|tool_call_end|><|tool_calls_section_end|>",
    f"[TOOL_CALLS]f{A}", f"[TOOL_CALLS] f[ARGS]{A}</s>", f"<|channel|>commentary to=functions.f <|constrain|>json<|message|>{A}<|call|>",
    f"<|start|>assistant<|channel|>commentary to=functions.f<|message|>{A}<|call|>",
    *(f"{mark} {J}{end}" for mark in ("[TOOL_CALLS]", "<|python_tag|>", "<|tool_call|>", "<|action_start|>", "<|plugin|>", "<|action_start|><|plugin|>")
      for end in ("", "<|/tool_call|>", "<|action_end|>", "<|endoftext|>", "<|eom_id|>", "</s>")),
    f"Action: f\nAction Input: {A}", f"Action:\tf \nAction Input: {A}\nObservation: ",
]  # fmt: skip


@pytest.mark.parametrize("text", MARKED)
def test_a_call_with_a_mark_is_one_whatever_tools_there_are(text: str) -> None:
    assert found(text, "f", "other") == ("", F)
    assert found(text) == ("", F)
    assert found(text, "other") == ("", F)


FENCED = [
    J, f"[{J}]", f" {J}\n", *(f"```{name}\n{J}\n```" for name in ("", "json", "tool_calls", "tool_call", "tool_code", "python")),
    f"f\n{A}", f"\n f \n{A}\n", 'f\n```python\ntool_call(a=1, é="x")\n```', "f\n```\ntool_call(a=1, é='x')\n```",
    'f(a=1, é="x")', '[f(a=1, é="x")]', '```python\nf(a=1, é="x")\n```', 'f ( a = 1, é = "x" )'.replace("f (", "f("),
]  # fmt: skip


@pytest.mark.parametrize("text", FENCED)
def test_a_call_without_a_mark_is_one_of_a_known_tool_only(text: str) -> None:
    assert found(text, "f", "other") == ("", F)
    assert found(text, "other") is None
    assert found(text) is None
    assert found(f"{text} so", "f") is None
    for written in (text, f"{text} ", f"{text}\n"):
        if not text.lstrip().startswith(("{", "[{")):  # which is read as a call in any case
            item = {"role": "assistant", "content": written}
            assert dialogue(USER, item, columns={"tools": [{"name": "f"}]}).doubts == (
                CALL_IN_TEXT,
            )
            assert dialogue(USER, item).doubts == ()


SEVERAL = [
    f"<tool_call>{J}<|endoftext|><tool_call>{G}<|endoftext|>",
    f"<tool_call>{J}</tool_call>\n<tool_call>{G}</tool_call>", f"<tool_call>[{J}, {G}]</tool_call>", f"<tool_call>{J}</tool_call></tool_calls><tool_call>{G}",
    f"<function=f>{A}</function>\n<function=g></function>", f'<function_calls><invoke name="f">{A}</invoke><invoke name="g"></invoke></function_calls>',
    f"✿FUNCTION✿: f\n✿ARGS✿: {A}\n✿FUNCTION✿: g\n✿ARGS✿: {{}}", f"[TOOL_CALLS]f{A}[TOOL_CALLS]g{{}}", f"[TOOL_CALLS][{J}, {G}]",
    f"<｜tool▁call▁begin｜>f<｜tool▁sep｜>{A}<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>g<｜tool▁sep｜>{{}}<｜tool▁call▁end｜>",
    f"[{J}, {G}]", 'f(a=1, é="x"), g()', '[f(a=1, é="x"), g()]', f"<tool_call><function=f>{A}</function><function=g>{{}}</function></tool_call>",
]  # fmt: skip


@pytest.mark.parametrize("text", SEVERAL)
def test_several_calls_are_read_in_their_order(text: str) -> None:
    assert found(text, "f", "g") == ("", TWO)
    is_marked = any(mark in text for mark in ("<", "✿", "[T"))
    assert found(text, "f") == (("", TWO) if is_marked else None)


BEHIND = [
    "", "\n", "</tool_calls>", "</function_calls>", "<|endoftext|>", "<|im_end|>", "<|eom_id|>", "<|eot_id|>", "</s>",
    "✿RESULT✿", "✿RETURN✿：", "</tool_call>", "<｜tool▁calls▁end｜>", "<|tool_calls_section_end|>", "<tool_calls> \n</s>",
]  # fmt: skip


@pytest.mark.parametrize("behind", BEHIND)
def test_marks_behind_a_call_say_nothing_and_words_do(behind: str) -> None:
    call = f"<tool_call>{J}</tool_call>"
    assert found(f"Hm. {call}{behind}") == ("Hm.", F)
    assert found(f"Hm. {behind}{call}") == ("Hm.", F)
    assert found(f"{call}{behind}so") is None
    assert found(f"{call}so{behind}{call}") is None
    assert found(f"{behind}Hm.{call}") == (f"{behind}Hm.".strip(), F)


UNREADABLE = [
    "<tool_call>f(", "</tool_call>", "<tool_calls>", "</tool_calls>", "<functioncall> f g", "<function_call> f g", "</function_calls>",
    '<invoke name="f">', "</invoke>", "<function=f>(1)</function>", "✿FUNCTION✿ f", "✿ARGS✿ f", "[TOOL_CALLS] f", "<|python_tag|>f",
    "<|action_start|>f", "<|plugin|>f", "<｜tool▁calls▁begin｜>", "<|tool_call_begin|>", "<|/tool_calls_section_end|>", "<|call|>",
    "Action Input: f", "Thought\nAction Input: f", "<tool_call >f", f"<tool_call>{J}</tool_call> so", f"Action: f\nAction Input: {A}\nso",
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', "<tool_call>[1]</tool_call>",
    *(f'<tool_call>{{"name": {name}, "arguments": {{}}}}</tool_call>' for name in ("3", "null", '""', "[1]", "{}")),
    "<tool_call>f g<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>", "<tool_call><arg_key>a</arg_key><arg_value>1</arg_value></tool_call>",
    "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value> so</tool_call>", "<function=f>{1}</function>", "✿FUNCTION✿: f\n✿ARGS✿: {1}",
    f"<function=f>{A}</function><function=g>so</function>", f"[TOOL_CALLS]f{A}[TOOL_CALLS]g{{1}}",
    f"✿FUNCTION✿: f\n✿ARGS✿: {A}\n✿FUNCTION✿: g\n✿ARGS✿: {{1}}",
]  # fmt: skip


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_mark_of_a_call_that_cannot_be_read_is_told(text: str) -> None:
    assert found(text, "f") is None
    assert structure_in_text(reply(text), ["f"]) == UNREADABLE_CALL
    assert dialogue(USER, {"role": "assistant", "content": text}).doubts == (UNREADABLE_CALL,)
    assert structure_in_text(user(text), ["f"]) == ""


@pytest.mark.parametrize(
    "text",
    ["toolcall", "[TOOLS]", "<tools>", "the Action Input: f", "<functions>", "f(1)", "f(a=1) or so", "f(a=b)", "f(a=1", "[f(a=1)",
     "f(**x)", "g(a=1)", "f(a=1) g(a=1)", "f\n{a}", "f g\n{}", "```\nf\n```", "[]", "{}", "f(a=open('x'))", "x = f(a=1)",
     "f(a={1, 2})", "f(a=b'x')", "f(a={[1]: 2})", "f(a=1e999)", "f(**{'a': 1})", "f(a=1j)", "f(a={(1, 2): 3})", "f(a=1, a=2)", "f(a=1 b=2)", "f(a='1)", "f(a=(1)"],
)  # fmt: skip
def test_other_texts_are_no_calls(text: str) -> None:
    assert found(text, "f") is None
    assert structure_in_text(reply(text), ["f"]) == ""


VALUES = [
    ("f(a=1.5, b=-2, c='x', d=[1, {'y': 2}], e=(1,))", {"a": 1.5, "b": -2, "c": "x", "d": [1, {"y": 2}], "e": [1]}),
    ("f(a=true, b=false, c=null, d=True, e=None)", {"a": True, "b": False, "c": None, "d": True, "e": None}),
    ("f(a=[true, {'x': null}])", {"a": [True, {"x": None}]}), ("f()", {}), ("f(a='(', b=\"]\", c='\\')')", {"a": "(", "b": "]", "c": "')"}),
    ("f(a={'b': (1, [2])})", {"a": {"b": [1, [2]]}}), ("f(a='f(b=1)')", {"a": "f(b=1)"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "values"), VALUES)
def test_values_of_a_call_in_python_are_its_arguments(text: str, values: dict[str, Any]) -> None:
    (call,) = written_calls(text, ["f"]).calls  # type: ignore[union-attr]
    assert json.loads(call.arguments) == values
    assert found(text.replace("f(", "My Tool("), "My Tool") is not None


def test_values_that_stand_one_by_one_are_json_or_text() -> None:
    keyed = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in (("a", "[1]"), ("b", "so {"), ("c", '"x"'), ("d", "")))  # fmt: skip
    (call,) = written_calls(f"<tool_call>f{keyed}</tool_call>", ()).calls  # type: ignore[union-attr]
    assert json.loads(call.arguments) == {"a": [1], "b": "so {", "c": "x", "d": ""}
    listed = "<parameter=a>\n\nso\n\n</parameter><parameter=b>null</parameter>"
    (call,) = written_calls(f"<function=f>{listed}</function>", ()).calls  # type: ignore[union-attr]
    assert json.loads(call.arguments) == {"a": "\nso\n", "b": None}


def test_names_may_be_as_long_as_openai_allows_and_longer_ones_are_text() -> None:
    for length, taken in ((128, True), (129, False)):
        name = "f" * length
        for text in (f"{name}\n{A}", f"{name}(a=1)", f"{name}\n```python\ntool_call(a=1)\n```"):
            assert (found(text, name) is not None) == taken
    for length, taken in ((256, True), (257, False)):
        keyed = f"<arg_key>{'k' * length}</arg_key><arg_value>1</arg_value>"
        assert (found(f"<tool_call>f{keyed}</tool_call>") is not None) == taken
        listed = f"<parameter={'k' * length}>1</parameter>"
        assert (found(f"<function=f>{listed}</function>") is not None) == taken


def test_a_thought_of_react_is_what_is_said_before_the_call() -> None:
    assert found(f"Thought: why \nAction: f\nAction Input: {A}") == ("why", F)
    assert found(f"So.\nAction: f\nAction Input: {A}") == ("So.", F)
    assert found(f"Action: f\nAction Input: {A}\nObservation: 3") is None


# --- in a dialogue -------------------------------------------------------------------------------

CALL = f"<tool_call>{J}</tool_call>"


def test_what_is_read_keeps_its_marks_and_what_it_says_besides_stays_in_front() -> None:
    marked = reply(f"Hm. {CALL}{CALL}", train=False, weight=0.5)
    read = with_calls_read([user(), marked], ())
    assert read == [user(), reply("Hm.", train=False, weight=0.5)] + [reply(A, metadata="f", train=False, weight=0.5)] * 2  # fmt: skip
    thought = reply(f"<think>a</think> Hm. {CALL}")
    assert [m.metadata for m in with_calls_read([user(), thought], (), thinks=True)] == [
        "",
        "",
        "f",
    ]
    item = {"role": "assistant", "content": f"<think>a</think>{CALL}"}
    for thinks, count in ((True, 2), (False, 3), (None, 3)):
        assert len(dialogue(USER, item, thinks=thinks, calls_in_text="read").messages) == count
    ends = reply(f"<think>a</think>{CALL}{CALL}")
    first, second = with_calls_read([user(), ends], (), thinks=True)[1:]
    assert (first.content, second.content) == (f"<think>a</think>\n\n{A}", A)
    already = reply(CALL, metadata="g")
    assert with_calls_read([user(), already], ()) == [user(), already]
    asked = user(CALL)
    assert with_calls_read([asked, reply()], ()) == [asked, reply()]


RESULTS = [
    *((f"<{tag}> 3 </{tag}>", ["3"]) for tag in ("tool_response", "tool_result", "tool_results", "function_result", "function_results")),
    ("<tool_response>3</tool_response>\n<tool_response>\n4</tool_response> ", ["3", "4"]), ("Observation: 3\n4", ["3\n4"]),
    (" \nObservation： 3", ["3"]), ("✿RESULT✿: 3", ["3"]), ("FUNCTION RESPONSE: 3", ["3"]), ("<tool_response></tool_response>", [""]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "results"), RESULTS)
def test_results_in_a_users_text_are_read_behind_calls(text: str, results: list[str]) -> None:
    assert structure_in_text(user(text), ()) == RESULT_IN_TEXT
    assert dialogue({"role": "user", "content": text}, REPLY).doubts == (RESULT_IN_TEXT,)
    if results == [""]:
        return
    read = with_calls_read([user(), reply(CALL), user(text), reply()], ())
    assert read[2:-1] == [Message("observation", result) for result in results]
    assert with_calls_read([user(), reply(), user(text)], ()) == [user(), reply(), user(text)]


@pytest.mark.parametrize(
    "text",
    ["Observation:", "Observation: ", "so Observation: 3", "<tool_response>3", "<tool_response>3</tool_response> so", "a <tool_result>3</tool_result>",
     "<tool_response>3</tool_result>", "<tool_response>3</tool_response><tool_response>4", "Result: 3"],
)  # fmt: skip
def test_other_texts_of_a_user_are_no_results(text: str) -> None:
    assert structure_in_text(user(text), ()) == ""
    assert with_calls_read([user(), reply(CALL), user(text)], ())[2] == user(text)


def test_tools_are_told_in_system_texts_alone() -> None:
    for text in ('<tools>{"name"', 'functions: [{"name": "f"}]'):
        assert structure_in_text(Message("system", text), ()) == TOOLS_IN_TEXT
        assert structure_in_text(Message("observation", text), ()) == ""
        assert structure_in_text(user(text), ()) == ""
    for text in ("<tools>", "{so}", "functions: [1]"):
        assert structure_in_text(Message("system", text), ()) == ""
    both = dialogue(
        {"role": "system", "content": '<tools>{"name": "f"}</tools> <|user|>'}, USER, REPLY
    )
    assert both.doubts == (TOOLS_IN_TEXT,)


# --- what is doubtful ----------------------------------------------------------------------------

NAMES = ("image", "img", "video", "audio", "picture", "vision")
PICTURED = [
    *(f"<{name}>" for name in NAMES), *(f"<|{name}s|>" for name in NAMES), "</image>", "<begin_of_image>", "<start_of_video>",
    "<end_of_audio>", "<image_1>", "<image-12>", "<image 3>", *(f"<image_{end}>" for end in ("start", "end", "pad", "token", "soft_token", "placeholder", "bos", "eos")),
    "<ImageHere>", '<img alt="x" src = "a">', "![x](a.png)", "[IMG]", "[image]", "[图片]", "<image>", "data:image/png",
]  # fmt: skip


@pytest.mark.parametrize("text", PICTURED)
def test_every_sign_of_an_image_in_a_question_is_counted(text: str) -> None:
    assert list(doubts.doubts_of_message(user(f"a {text} b"), thinks=None)) == [
        doubts.IMAGE_IN_TEXT
    ]
    assert dialogue({"role": "user", "content": f"a {text} b"}, REPLY).doubts == (doubts.IMAGE_IN_TEXT,)  # fmt: skip
    if text != "<image>":
        assert doubts.IMAGE_IN_TEXT not in doubts.doubts_of_message(Message("observation", text), thinks=None)  # fmt: skip
        assert doubts.IMAGE_IN_TEXT not in doubts.doubts_of_message(reply(text), thinks=None)
    for other in ("<imagery>", "<images of>", "![x]", "[x](a)", "[Image]s"[1:], "<div src=1>"):
        assert list(doubts.doubts_of_message(user(other), thinks=None)) == []


MARKERS = [
    "<|user|>", "<|a b/c.d:e-f|>", "<｜User｜>", "<start_of_turn>", "</end_of_turn>", "<bos>", "<eos>", "<sop>", "<eop>", "<eot>", "A</s>", "A</s> \n",
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[gMASK]", "<s>A", " <s>",
]  # fmt: skip


@pytest.mark.parametrize("text", MARKERS)
@pytest.mark.parametrize("role", ["user", "assistant", "system", "observation"])
def test_every_control_token_in_a_text_is_counted(text: str, role: Any) -> None:
    assert list(doubts.doubts_of_message(Message(role, text), thinks=None)) == [
        doubts.MARKER_IN_TEXT
    ]
    is_looked_at = doubts.may_be_doubtful([Message(role, text)], has_tools=False)
    assert is_looked_at or (role == "observation" and "<" not in text)
    for other in ("</s> so", "a <s> b", "<||>", f"<|{'x' * 41}|>", "<bosun>", "[inst]", "<SYS>"):
        assert list(doubts.doubts_of_message(Message(role, other), thinks=None)) == []


TAGS = ("thinking", "thought", "thoughts", "reasoning", "reflection", "scratchpad", "inner_monologue", "cot", "antthinking", "analysis", "seed:think", "THINKING")  # fmt: skip
THOUGHTS = [
    *((f"<{tag}>", f"</{tag}>") for tag in TAGS), ("<|begin_of_thought|>", "<|end_of_thought|>"), ("◁think▷", "◁/think▷"), ("[THINK]", "[/THINK]"),
]  # fmt: skip


@pytest.mark.parametrize(("begin", "end"), THOUGHTS)
def test_a_thought_in_any_tags_is_counted_and_dropped_where_it_opens(begin: str, end: str) -> None:
    for text in (f"{begin}a\nb{end} A", f"{begin}a", f"a{end}", f"so {begin}a{end}A"):
        assert list(doubts.doubts_of_message(reply(text), thinks=None)) == [doubts.OTHER_THOUGHT]
        assert dialogue(USER, {"role": "assistant", "content": text}).doubts == (doubts.OTHER_THOUGHT,)  # fmt: skip
    assert doubts.without_thought(f" \n{begin}a\nb{end}\n\nA {begin}c{end}") == f"A {begin}c{end}"
    for kept in (f"so {begin}a{end}A", f"{begin}a", " A", "A"):
        assert doubts.without_thought(kept) is kept
    assert doubts.without_thought(f"<think>x</think>\n{begin}a{end} A") == "A"
    assert doubts.without_thought("<think>a</think>b</think> A") == "A"
    assert doubts.without_thought("a</think>A ") == "A "


SPELLED = [
    *(f"Human: a\n{name}: b" for name in ("Assistant", "AI", "GPT", "Bot", "Response", "答", "助手", "ASSISTANT", "**Assistant**")),
    *(f"{name}：a\nAssistant：b" for name in ("Human", "User", "Instruction", "问", "用户", "USER", "## User")), "[Round 1]\n答：b", "x ### Human: a\n### Assistant: b",
]  # fmt: skip


@pytest.mark.parametrize("text", SPELLED)
def test_a_dialogue_that_a_question_spells_out_is_counted(text: str) -> None:
    assert doubts.DIALOGUE_IN_MESSAGE in doubts.doubts_of_message(user(text), thinks=None)
    assert dialogue({"role": "user", "content": text}, REPLY).doubts == (doubts.DIALOGUE_IN_MESSAGE,)  # fmt: skip
    assert list(doubts.doubts_of_message(reply(text), thinks=None)) == []
    for half in ("Human: a", "Assistant: b", "a Human: b Assistant: c", "Humans: a\nAssistants: b"):
        assert list(doubts.doubts_of_message(user(half), thinks=None)) == []


def test_parts_as_text_and_thoughts_where_there_are_none_are_counted() -> None:
    for kind in ("text", "image", "image_url"):
        for text in (f'[{{"type": "{kind}"}}]', f" [ {{'type' : '{kind}'}}]"):
            assert list(doubts.doubts_of_message(user(text), thinks=None)) == [doubts.PARTS_IN_TEXT]
            assert dialogue({"role": "user", "content": text}, REPLY).doubts == (doubts.PARTS_IN_TEXT,)  # fmt: skip
    both = user('[{"type": "text"}] <|user|>')
    assert list(doubts.doubts_of_message(both, thinks=None)) == [doubts.PARTS_IN_TEXT, doubts.MARKER_IN_TEXT]  # fmt: skip
    thought = reply("<think>a</think>A")
    for thinks, counted in ((False, [doubts.THOUGHT_IN_TEXT]), (True, []), (None, [])):
        assert list(doubts.doubts_of_message(thought, thinks=thinks)) == counted
