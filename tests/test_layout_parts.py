"""Layouts, what no law says: what a reply is read as, what a layout tells others, which templates are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import newer
import pytest
import tiny
from dialogues import GLM4_0414_TEMPLATE, TOOLS, Z1_TEMPLATE, dialogue
from examples import tiny_template
from hints import said

from finetune.data.chat.image import ImageSpec
from finetune.data.chat.jinja import JinjaTemplate
from finetune.data.chat.layouts import call_values, tag_grammar
from finetune.data.chat.layouts.tag_reader import Said, TagReader
from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage
from finetune.errors import DataError

THOUGHT = "<think>\n先想。\n</think>\n\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def glm4(root: Path) -> ChatTemplate:
    return tiny_template(root / "glm4")


@pytest.fixture(scope="module")
def z1(glm4: ChatTemplate) -> ChatTemplate:
    return ChatTemplate(replace(glm4.tokenizer, chat_template=Z1_TEMPLATE))


@pytest.fixture(params=newer.TAGGED)
def tagged(root: Path, request: pytest.FixtureRequest) -> ChatTemplate:
    return newer.template_of(root, request.param)


def ids_of(template: ChatTemplate, text: str) -> list[int]:
    """Ids of what a model writes, control tokens where they are spelled."""
    return template.tokenizer.trusted(text)


# --- what a layout tells others -------------------------------------------------------------------


def test_a_layout_says_what_the_model_writes_and_what_its_template_has(
    root: Path, glm4: ChatTemplate, z1: ChatTemplate
) -> None:
    def facts(template: ChatTemplate) -> tuple[Any, ...]:
        of = template.layout
        return of.lead, of.thinking, of.has_switch, of.takes_tools, of.rules

    # A changed `rules` means that everybody's examples are made again.
    assert facts(glm4) == ("\n", False, False, True, "")
    assert facts(z1) == ("", True, False, True, " turns")
    of_1v = newer.template_of(root, "GLM-4.1V")
    assert facts(of_1v) == ("", False, False, False, " opened spoken")
    assert set(of_1v.layout.spoken.values()) == {
        "<think>", "</think>", "<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>",
    }  # fmt: skip
    assert glm4.layout.spoken == z1.layout.spoken == {}
    leads = {
        "GLM-4.5": "\n<think></think>\n",
        "GLM-4.7": "</think>",
        "GLM-OCR": "<think></think>\n",
    }
    for name, lead in leads.items():
        switched = name != "GLM-4.7" or "prompt_off"
        found = facts(newer.template_of(root, name))
        assert found == (lead, True, bool(switched), True, " tags 1"), name


def test_a_dialogue_that_ends_in_a_call_waits_for_its_result_where_the_family_does(
    glm4: ChatTemplate, z1: ChatTemplate, tagged: ChatTemplate
) -> None:
    called = dialogue(("user", "q"), ("call", "{}", "f"))
    for template, role in ((glm4, "user"), (z1, "user"), (tagged, "observation")):
        last = template.render([called])[0].input_ids[-1]
        assert last == template.tokenizer.control_ids[f"<|{role}|>"]


def test_a_call_that_nobody_answers_ends_as_what_follows_it_begins(tagged: ChatTemplate) -> None:
    ignored = dialogue(
        ("user", "q"), ("call", THOUGHT + "{}", "f"), ("user", "r"), ("reply", "b")
    )  # fmt: skip
    first, second = tagged.examples([ignored], "every_reply")[0]
    user = tagged.tokenizer.control_ids["<|user|>"]
    assert [part.rendered.input_ids[-1] for part in (first, second)] == [user, user]
    waits = replace(ignored, messages=ignored.messages[:2])
    [only] = tagged.examples([waits], "every_reply")[0]
    assert only.rendered.input_ids[-1] == tagged.tokenizer.control_ids["<|observation|>"]


def test_an_empty_system_text_is_absent(tagged: ChatTemplate) -> None:
    rest = (("user", "q"), ("reply", "a"))
    found = [tagged.render([dialogue(*before, *rest)])[0] for before in ((("system", ""),), ())]
    assert found[0].input_ids.tolist() == found[1].input_ids.tolist()


def test_a_reply_of_no_weight_makes_no_example(tagged: ChatTemplate) -> None:
    asked, answer = Message("user", "q"), Message("assistant", THOUGHT + "a")
    nothing = Conversation((asked, replace(answer, weight=0.0)))
    masked = Conversation((asked, replace(answer, train=False)))
    later = Conversation((asked, replace(answer, weight=0.0), asked, answer))
    found = tagged.examples([nothing, masked, later, Conversation((asked,))], "every_reply")
    assert [len(of_one) for of_one in found] == [0, 0, 1, 1]
    [alone] = found[2]
    assert [m.train for m in alone.conversation.messages if m.role == "assistant"] == [False, True]


def test_text_behind_a_call_of_the_same_turn_is_refused_with_its_message(
    tagged: ChatTemplate,
) -> None:
    late = dialogue(("user", "q"), ("call", "{}", "f"), ("reply", "a"))
    text = said(tagged.render, [late])
    assert text.startswith("file.jsonl:1: message 3 (assistant): it stands behind a call")


# --- what a reply is read as -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "messages"),
    [
        ("glm4", "\na\nb", [("", "a\nb")]),
        ("glm4", "a", [("", "a")]),
        ("glm4", "f \n{}", [("f", "{}")]),
        ("glm4", "f\n{}<|assistant|>g\n1<|assistant|>", [("f", "{}"), ("g", "1")]),
        ("glm4", "\na<|observation|>b<|user|>", [("", "a")]),
        ("glm4", "", [("", "")]),
        ("z1", "\nwhy", [("", "why")]),
        ("z1", "\nwhy</think>\n\nA", [("", "<think>\nwhy</think>\n\nA")]),
        ("z1", "\n<think>\nwhy</think>\nA", [("", "<think>\nwhy</think>\nA")]),
        ("z1", "\n\n</think>\n\nf\n{}<|assistant|>g\n{}", [("f", "{}"), ("g", "{}")]),
        ("GLM-4.1V", "So\nmore", [("", "So\nmore")]),
        ("GLM-4.1V", "\nSo\nmore", [("", "So\nmore")]),
        ("GLM-4.1V", "<answer><answer>x<|user|>", [("", "<answer><answer>x")]),
        ("GLM-4.5", "a<|begin_of_box|>b<|end_of_box|> c<|user|>d", [("", "a<|begin_of_box|>b<|end_of_box|> c")]),
        ("GLM-4.5", "\n<think>a</think>\nb", [("", "<think>\na\n</think>\n\nb")]),
        ("GLM-4.7", "a</think>b", [("", "<think>\na\n</think>\n\nb")]),
    ],
)  # fmt: skip
def test_a_reply_is_read_as_its_family_writes_it(
    root: Path, glm4: ChatTemplate, z1: ChatTemplate, kind: str, text: str, messages: list[Any]
) -> None:
    template = {"glm4": glm4, "z1": z1}.get(kind) or newer.template_of(root, kind)
    ids = ids_of(template, text)
    found = template.messages(ids)
    assert [(m.metadata, m.content) for m in found] == messages
    first = template.parse(ids)
    assert (first.metadata, first.content) == messages[0]


def test_a_lone_call_is_parsed_without_its_thought(tagged: ChatTemplate) -> None:
    called = dialogue(("user", "q"), ("call", THOUGHT + '{"a": "x"}', "f"), tools=newer.TOOLS)
    ids = tagged.render([called])[0].input_ids.tolist()
    ids = ids[ids.index(tagged.tokenizer.control_ids["<|assistant|>"]) + 1 :]
    assert tagged.parse(ids, newer.TOOLS) == Message("assistant", '{"a": "x"}', "f")
    [whole] = tagged.messages(ids, newer.TOOLS)
    assert whole.content == THOUGHT + '{"a": "x"}'


def test_a_reader_says_each_thing_once_it_is_whole_and_nothing_behind_the_end(
    root: Path,
) -> None:
    template = newer.template_of(root, "GLM-4.5")
    reader = TagReader(template.tokenizer, newer.TOOLS)
    text = "\n<think> a \n b </think>\n c <tool_call>f\n<arg_key>a</arg_key>\n<arg_value>北</arg_value>"
    found = reader.feed(ids_of(template, text))
    said_of = {kind: "".join(s.text for s in found if s.kind == kind) for kind, _ in found}
    assert said_of == {"thought": "a \n b", "text": "c", "call": "f", "arguments": '{"a": "北"'}
    assert not reader.over
    assert reader.feed(ids_of(template, "\n</tool_call><|observation|>")) == [
        Said("arguments", "}")
    ]
    assert reader.over
    assert reader.feed(ids_of(template, "more<tool_call>g</tool_call>")) == []
    assert reader.finish() == []


# --- values between tags -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("true", {"type": "integer"}, "true"), ("true", {"type": "number"}, "true"), ("1", {"type": "boolean"}, "1"),
        ("null", {"type": "string"}, "null"), ("null", {"type": "null"}, None), ("[1]", {"type": "object"}, "[1]"),
        ("5", {"type": "object"}, "5"), ("5", {"oneOf": [{"type": "integer"}]}, 5), ("5", {"oneOf": [{"type": "string"}]}, "5"),
        ("5", {"enum": ["a", 1.5]}, 5), ("true", {"enum": ["a", 1]}, "true"), ("2.5", {"enum": [1]}, 2.5), ("5", {"allOf": []}, 5),
        ("2", {"type": "number", "enum": ["2"]}, 2), ("2", {"anyOf": "no list"}, 2), ("2", {"type": "unheard of"}, 2),
        ("{\"a\": 1", {}, "{\"a\": 1"), ("5", {"$ref": "#/$defs/a"}, "5"), ("5", {"$ref": 1, "type": "string"}, "5"),
    ],
)  # fmt: skip
def test_a_value_is_what_its_schema_takes_and_else_the_text(
    text: str, schema: Any, value: Any
) -> None:
    root = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"type": "string"}}}
    found = call_values.read_value(text, schema, root)
    assert (found, type(found)) == (value, type(value))


def test_schemas_of_a_call_are_those_of_the_tool_of_its_name() -> None:
    def tool(name: str, parameters: Any) -> Any:
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    tools = [
        {"type": "python"},
        tool("f", {"properties": {"a": 1}}),
        tool("g", "text"),
        tool("f", 2),
    ]
    assert call_values.parameters_of(tools, "f") == {"properties": {"a": 1}}
    assert call_values.parameters_of(tools, "g") == {}
    assert call_values.parameters_of(tools, "h") == {}
    assert call_values.schema_of({"properties": {"a": 1}}, "a") == 1
    assert call_values.schema_of({"properties": []}, "a") is None
    assert call_values.schema_of({}, "a") is None
    assert call_values.value_texts('{"b": "x", "a": {"n": "é"}}') == [
        ("b", "x"),
        ("a", '{"n": "é"}'),
    ]
    assert "not a JSON object" in said(call_values.value_texts, "[1]")


def test_a_grammar_hands_the_definitions_of_a_schema_on_with_it(root: Path) -> None:
    template = newer.template_of(root, "GLM-4.5")
    shared = {"$defs": {"x": {"type": "integer"}}, "definitions": {"y": {}}}
    parameters = shared | {"properties": {"a": {"$ref": "#/$defs/x"}}, "title": "no definition"}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    bare = {"type": "function", "function": {"name": "g"}}
    seen: list[Any] = []
    structure: Any = SimpleNamespace(schema=None, tools=[tool, bare], many_calls=False, strict=False, opened=None)  # fmt: skip
    layout: Any = template.layout
    text = tag_grammar.tag_grammar(structure, layout, lambda *given: seen.append(given) or "J")  # type: ignore[func-returns-value]
    assert seen == [({"$ref": "#/$defs/x"} | shared, False)]
    assert "(call_0 | call_1)" in text
    assert text.splitlines()[-1].startswith("call_1: ")


# --- templates that are none of ours -----------------------------------------------------------------

USER_TEXT = '{{- "<|" + m.role + "|>" + br + text_of(m.content) -}}'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (USER_TEXT, USER_TEXT.replace("text_of(m.content)", "text_of(m.content).strip()")),
        ("br + said.text.strip()", "br + said.text"),
        ("br + said.text.strip()", 'br + said.text.strip().replace("再见", "")'),
        ("else value | tojson(ensure_ascii=False)", "else value | tojson(ensure_ascii=True)"),
        ("value if value is string else value | tojson(ensure_ascii=False)", "value | tojson(ensure_ascii=False)"),
        ("value if value is string", 'value.replace("\\n", " ") if value is string'),
        ("tool | tojson(ensure_ascii=False)", "tool | tojson(ensure_ascii=True)"),
        ('br + "<tool_response>" + br + text_of(m.content)', 'br + "<tool_response>" + br + text_of(m.content).strip()'),
        ('br + "<tool_response>" + br + text_of(m.content)', 'br + "<tool_response>" + br + text_of(m.content) | e'),
        ('br + "<tool_call>" + call.name', 'br + (br if loop.index > 1 else "") + "<tool_call>" + call.name'),
        ("said.thought.strip()", 'said.thought.replace("两", "")'),
        ("kept and said.thought", "kept and said.thought and not m.tool_calls"),
        ('(PROMPT_OFF if off else PROMPT)', '(PROMPT_OFF if off or messages | length > 3 else PROMPT)'),
        ("off and SWITCH", "off and SWITCH and loop.first"),
    ],
)  # fmt: skip
def test_a_template_that_writes_something_else_is_refused(
    root: Path, before: str, after: str
) -> None:
    tokenizer = newer.template_of(root, "GLM-4.5").tokenizer
    texts = {"SWITCH": "true", "PROMPT_OFF": '"\\n<think></think>"', "PROMPT": '""'}
    for name, text in texts.items():
        before, after = before.replace(name, text), after.replace(name, text)
    source = tokenizer.chat_template.replace(before, after)
    assert source != tokenizer.chat_template
    with pytest.raises(DataError, match=r"(?s)its template: .*our layout: "):
        ChatTemplate(replace(tokenizer, chat_template=source))


CONTENT = "{{ item['content'] }}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (CONTENT, "{{ item['content'].replace('\n\n', '\n') }}"),
        (CONTENT, "{{ item['content'].replace('Thanks', 'Thank') }}"),
        (CONTENT, "{{ item['content'].replace('再见！', '') }}"),
        (CONTENT, "{{ item['content'].replace('查到', '') }}"),
        (CONTENT, "{{ item['content'].replace('{\"t\"', '{ \"t\"') }}"),
        (CONTENT, "{{ item['content'].replace('助手', '') }}"),
        (CONTENT, "{{ item['content'].replace('查到', '香到') }}"),  # of the same length
        ("{{ item['metadata'] }}", "{{ item['metadata'] if loop.index < 3 else '' }}"),
        ("{% if add_generation_prompt %}", "{% if add_generation_prompt %}{{ ' ' if messages | length > 3 else '' }}"),
    ],
)  # fmt: skip
def test_a_template_of_glm_4_that_writes_something_else_is_refused(
    glm4: ChatTemplate, before: str, after: str
) -> None:
    source = tiny.CHAT_TEMPLATE.replace(before, after)
    assert source != tiny.CHAT_TEMPLATE
    with pytest.raises(DataError, match=r"(?s)its template: .*our layout: .*GLM-4 family"):
        ChatTemplate(replace(glm4.tokenizer, chat_template=source))


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("{% if add_generation_prompt %}", "{% if add_generation_prompt %}{{ '\n' }}", "its generation prompt must start with"),
        ("<|{{ item['role'] }}|>", "{{ '<|' + item['role'] + '|>' + ('!' if item['role'] == 'user' else '') }}", "a user message '问' must end in"),
        (CONTENT, "{{ item['content'] | upper if item['role'] == 'observation' else item['content'].replace('甲', 'x') }}", "a system message"),
        ("<|system|>\n你是", "\n你是", "does not write tools as one <|system|> block"),
    ],
)  # fmt: skip
def test_a_template_of_another_form_is_refused_with_what_it_writes(
    glm4: ChatTemplate, before: str, after: str, reason: str
) -> None:
    source = tiny.CHAT_TEMPLATE.replace(before, after)
    assert source != tiny.CHAT_TEMPLATE
    text = said(ChatTemplate, replace(glm4.tokenizer, chat_template=source))
    assert reason in text
    assert "got" in text


def test_a_template_that_writes_no_replies_or_refuses_calls_is_told_from_its_family(
    glm4: ChatTemplate, root: Path
) -> None:
    tokenizer = newer.template_of(root, "GLM-4.5").tokenizer
    mute = tokenizer.chat_template.replace("br + said.text.strip()", '""')
    text = said(ChatTemplate, replace(tokenizer, chat_template=mute))
    assert "is not in GLM-4.5's layout: " in text
    assert "甲' must stand in '" in text
    picky = (
        "{% if messages[0].role == 'system' and not messages[0].tools %}{{ raise_exception('no') }}{% endif %}"
        + tiny.CHAT_TEMPLATE
    )
    system = dialogue(("system", "s"), ("user", "q"))
    unknown = ChatTemplate(replace(glm4.tokenizer, chat_template=picky))
    assert "does not know the role" in said(unknown.render, [system])
    strict = "{% for m in messages if m.tool_calls %}{{ raise_exception('no') }}{% endfor %}"
    again = ChatTemplate(replace(glm4.tokenizer, chat_template=tiny.CHAT_TEMPLATE + strict))
    assert again.layout.name == "GLM-4"


def test_a_template_gets_tools_special_tokens_and_options_and_says_what_it_failed_on() -> None:
    source = "{{ eos_token }}{{ thinks }}{{ tools[0] if tools }}{{ add_generation_prompt }}{{ tools is none }}"
    template = JinjaTemplate(source, {"eos_token": "<e>"})
    told: Any = template.render([], tools=["T"], add_generation_prompt=True, options={"thinks": 1})  # type: ignore[list-item]
    assert told == "<e>1TTrueFalse"
    assert template.render([]) == "<e>FalseTrue"
    text = said(JinjaTemplate("{{ raise_exception('no é') }}", {}).render, [{"role": "é"}])
    assert "chat template failed: no é; rendering" in text
    assert json.dumps([{"role": "é"}], ensure_ascii=False) in text


def test_tools_are_laid_out_where_the_template_takes_them(glm4: ChatTemplate) -> None:
    later = ChatTemplate(replace(glm4.tokenizer, chat_template=GLM4_0414_TEMPLATE))
    talks = [
        dialogue(("user", "q"), ("reply", "a"), tools=TOOLS),
        dialogue(("system", "s"), ("user", "q"), ("reply", "a"), tools=TOOLS),
        dialogue(("system", "s"), ("user", "q"), ("reply", "a")),
    ]
    for template, place in ((glm4, "message"), (later, "argument")):
        found = [template.layout.template_input(talk) for talk in talks]
        assert [one.tools is not None for one in found] == [place == "argument"] * 2 + [False]
        on_messages = ["tools" in m for one in found for m in one.messages]
        first = [True, False, False] if place == "message" else [False, False]
        assert on_messages == [*first, place == "message", False, False, False, False, False]


def test_an_image_needs_its_tokens(glm4: ChatTemplate) -> None:
    talk = Conversation((Message("user", "q", images=(ShownImage("x"),)),))
    ids = {t: i for t, i in glm4.tokenizer.control_ids.items() if t != "<|end_of_image|>"}
    spec = ImageSpec(28, 1, ids["<|begin_of_image|>"])
    blind = ChatTemplate(replace(glm4.tokenizer, image=spec, control_ids=ids))
    assert "tokenizer has no <|end_of_image|>" in said(blind.prompt, talk, 1)


def test_broken_unicode_is_named_wherever_it_stands(glm4: ChatTemplate) -> None:
    asked = Message("user", "q")
    name = Conversation((asked, Message("assistant", "{}", "f\ud800")), location="f:3")
    assert "f:3: message 2 (assistant) is not valid Unicode" in said(glm4.render, [name])
    text = Conversation((Message("user", "ab\ud800"),), location="f:4")
    whole = Conversation((asked,))
    tool = {"type": "function", "function": {"name": "f", "description": "\ud800"}}
    odd = replace(whole, tools=(tool,))
    assert "a tool definition is not valid Unicode" in said(glm4.render, [odd])
    assert "f:4: message 1 (user)" in said(glm4.prompts, [(whole, 1), (text, 1)])
