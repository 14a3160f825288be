"""The layouts of GLM-4.1V, 4.5, 4.7 and GLM-OCR: laws 1 to 6 against templates of their form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import newer
import pytest
from dialogues import dialogue
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.chat.image import between
from finetune.data.chat.jinja import JinjaTemplate
from finetune.data.chat.layouts import call_values
from finetune.data.chat.template import ChatTemplate, shorten, trained_spans
from finetune.data.chat.template_check import own_text
from finetune.data.dialogue.conversation import Conversation, Message, RowError, ShownImage
from finetune.data.dialogue.formats import to_conversation
from finetune.data.dialogue.images import ImageRule
from finetune.errors import DataError

THOUGHT = "<think>\n先想。\n</think>\n\n答"
EXAMPLES = settings(max_examples=40, deadline=None, database=None)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("newer")


@pytest.fixture(params=newer.TAGGED)
def template(root: Path, request: pytest.FixtureRequest) -> ChatTemplate:
    return newer.template_of(root, request.param)


def own_ids(template: ChatTemplate, conversation: Conversation, **how: Any) -> list[int]:
    jinja = JinjaTemplate(template.tokenizer.chat_template, {})
    return template.tokenizer.trusted(own_text(conversation, template, jinja, **how))


def marked(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """The text of each example, « » around what carries loss."""
    found = []
    for part, rendered in template.examples([conversation], "every_reply")[0]:
        ids, text, at = rendered.input_ids.tolist(), "", 0
        for start, end, _ in trained_spans(rendered, part, "every_reply"):
            text += template.decode(ids[at:start]) + "«" + template.decode(ids[start:end]) + "»"
            at = end
        found.append(text + template.decode(ids[at:]))
    return found


# --- what an example is --------------------------------------------------------------------------

ASKED_TWICE = dialogue(
    ("user", "q"), ("reply", THOUGHT), ("user", "r"), ("reply", "Let me see."),
    ("call", '{"a": "5", "b": [1, null]}', "f"), ("call", "{}", "g"), ("tool", "1"), ("tool", "2"),
    ("reply", THOUGHT),
)  # fmt: skip


def test_a_question_is_an_example_where_the_template_drops_a_thought(root: Path) -> None:
    assert marked(newer.template_of(root, "GLM-4.5"), ASKED_TWICE) == [
        "[gMASK]<sop><|user|>\nq<|assistant|>«\n<think>先想。</think>\n答<|user|>»",
        "[gMASK]<sop><|user|>\nq<|assistant|>\n<think></think>\n答<|user|>\nr<|assistant|>"
        "«\n<think></think>\nLet me see.\n"
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>5</arg_value>\n"
        "<arg_key>b</arg_key>\n<arg_value>[1, null]</arg_value>\n</tool_call>\n"
        "<tool_call>g\n</tool_call><|observation|>»\n<tool_response>\n1\n</tool_response>\n"
        "<tool_response>\n2\n</tool_response><|assistant|>«\n<think>先想。</think>\n答<|user|>»",
    ]
    assert marked(newer.template_of(root, "GLM-4.7"), ASKED_TWICE) == [
        "[gMASK]<sop><|user|>q<|assistant|><think>«先想。</think>答<|user|>»",
        "[gMASK]<sop><|user|>q<|assistant|></think>答<|user|>r<|assistant|></think>"
        "«Let me see.<tool_call>f<arg_key>a</arg_key><arg_value>5</arg_value>"
        "<arg_key>b</arg_key><arg_value>[1, null]</arg_value></tool_call><tool_call>g</tool_call>"
        "<|observation|>»<tool_response>1</tool_response><tool_response>2</tool_response>"
        "<|assistant|><think>«先想。</think>答<|user|>»",
    ]


def test_a_laid_outwithout_thoughts_is_one_example(template: ChatTemplate) -> None:
    plain = dialogue(("user", "q"), ("reply", "a"), ("user", "r"), ("reply", "b"))
    assert len(template.examples([plain], "every_reply")[0]) == 1
    assert marked(template, plain)[0].count("«") == 2
    last = dialogue(("user", "q"), ("reply", "a"), ("user", "r"), ("reply", THOUGHT))
    assert len(template.examples([last], "every_reply")[0]) == 1
    [(part, _)] = template.examples([ASKED_TWICE], "last_reply")[0]
    assert [m.train for m in part.messages if m.role == "assistant"] == [False] * 4 + [True]
    calls = replace(ASKED_TWICE, messages=ASKED_TWICE.messages[:6])  # one reply of three messages
    [(part, _)] = template.examples([calls], "last_reply")[0]
    assert [m.train for m in part.messages if m.role == "assistant"] == [False] + [True] * 3


def test_thinking_switched_off_is_trained_behind_the_templates_prompt_for_it(root: Path) -> None:
    off = replace(dialogue(("user", "q"), ("reply", "a")), thinks=False)
    [text] = marked(newer.template_of(root, "GLM-4.5"), off)
    assert text == "[gMASK]<sop><|user|>\nq/nothink<|assistant|>\n<think></think>«\na<|user|>»"
    [text] = marked(newer.template_of(root, "GLM-OCR"), off)
    assert text == "[gMASK]<sop><|user|>\nq/nothink<|assistant|>\n<think></think>\n«a<|user|>»"
    typed = replace(off, messages=(Message("user", "q/nothink"), off.messages[1]))
    one = newer.template_of(root, "GLM-4.5")
    assert one.render([typed])[0].input_ids.tolist()[:-1] == own_ids(one, typed)
    thoughtful = replace(dialogue(("user", "q"), ("reply", THOUGHT)), thinks=False)
    with pytest.raises(
        DataError, match=r"file\.jsonl:1: message 2 .*has reasoning, but thinking is"
    ):
        one.examples([thoughtful], "every_reply")
    assert one.render([thoughtful])[0].input_ids.tolist()[:-1] == own_ids(one, thoughtful)


def test_a_row_switches_thinking_off_as_trl_has_it() -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    given: dict[str, Any] = {"enable_thinking": False, "clear_thinking": True}
    read = to_conversation(row | {"chat_template_kwargs": given}, "messages")
    assert (read.thinks, read.unread) == (False, ("chat_template_kwargs.clear_thinking",))
    assert to_conversation(row | {"chat_template_kwargs": None}, "messages").thinks is None
    for wrong, reason in (
        (1, "is a number, not an object"),
        ({"enable_thinking": "no"}, "is text, not"),
    ):
        with pytest.raises(RowError, match=reason):
            to_conversation(row | {"chat_template_kwargs": wrong}, "messages")


def test_glm_4_1v_thinks_in_tokens_of_its_own(root: Path) -> None:
    template = newer.template_of(root, "GLM-4.1V")
    content = "<think>Why?</think><answer>So</answer>"
    conversation = dialogue(("user", "is <think> typed?"), ("reply", content))
    [text] = marked(template, conversation)
    assert text.endswith(f"<|assistant|>\n«{content}<|user|>»")
    ids = template.render([conversation])[0].input_ids.tolist()
    tokens = template.tokenizer.control_ids
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert ids.count(tokens[tag]) == 1
    assert template.parse(ids[ids.index(tokens["<|assistant|>"]) + 2 :]).content == content
    for typed in (
        " a <think>",
        "</think>",
        "<|endoftext|>",
        "So <answer>",
        "</think> <answer>x</answer> y",
    ):
        ids = template.render([dialogue(("user", "q"), ("reply", typed))])[0].input_ids.tolist()
        assert not {tokens[t] for t in ("<think>", "<answer>", "<|endoftext|>")} & set(ids)
        whole = template.tokenizer.plain.encode(typed, add_special_tokens=False).ids
        assert ids[-len(whole) - 1 : -1] == whole


class OnePatch:
    """Images of one patch each, of which nothing is opened."""

    patch_token, rules, size, can_pack = "<|image|>", "one patch", 0, False
    rule = ImageRule("these checkpoints", roles=("user", "observation"))

    def __init__(self, begin_id: int) -> None:
        self.begin_id = begin_id

    def patches_of(self, image: str) -> int:
        return 1

    def laid(self, message: Message, body: str) -> list[str]:
        return between(message, body)


@pytest.mark.parametrize("name", ["GLM-4.1V", "GLM-OCR"])
def test_images_stand_in_the_text_where_the_template_shows_them(root: Path, name: str) -> None:
    tokenizer = newer.template_of(root, name).tokenizer
    begin = tokenizer.control_ids["<|begin_of_image|>"]
    template = ChatTemplate(replace(tokenizer, image=OnePatch(begin)))
    shown = Message("user", "see this or that", images=(ShownImage("a", 4), ShownImage("b", 9)))
    result = Message("observation", "here:", images=(ShownImage("c", 5),))
    image = {"type": "image"}
    parts = [{"type": "text", "text": "see "}, image, {"type": "text", "text": "this "}, image,
             {"type": "text", "text": "or that"}]  # fmt: skip
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    laid_out = [shown]
    if name == "GLM-OCR":
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "content": [{"type": "text", "text": "here:"}, image]})
        laid_out += [Message("assistant", "{}", "f"), result]
    jinja = JinjaTemplate(tokenizer.chat_template, {})
    theirs = tokenizer.trusted(jinja.render(messages, add_generation_prompt=True))
    conversation = Conversation(tuple(laid_out))
    assert list(template.prompt(conversation, len(laid_out))) == theirs


# --- laws ----------------------------------------------------------------------------------------


@EXAMPLES
@given(conversation=newer.dialogues_with_calls())
@pytest.mark.parametrize("name", newer.TAGGED)
def test_laws_1_to_5_hold_on_any_dialogue(
    root: Path, name: str, conversation: Conversation
) -> None:
    template = newer.template_of(root, name)
    rendered = template.render([conversation])[0]
    assert rendered.input_ids.tolist()[:-1] == own_ids(template, conversation)
    tokens, control = rendered.input_ids.tolist(), set(template.tokenizer.control_ids.values())
    for run in rendered.runs[1:]:  # nowhere do two texts meet, which could be one token
        assert {tokens[run.start - 1], tokens[run.start]} & control
    trained = 0
    for part, example in template.examples([conversation], "every_reply")[0]:
        ids, messages = example.input_ids.tolist(), part.messages
        for index, start, end in example.replies:
            if messages[index].train is False:
                continue
            trained += 1
            assert ids[:start] == template.prompt(part, index)
            first = messages[index - 1].role != "assistant"
            if first:  # the template's own generation prompt, for thinking or for not thinking
                asked = replace(part, messages=messages[:index])
                kinds = [own_ids(template, asked, add_generation_prompt=True)]
                if template.layout.form.prompt == "<think>":
                    off = replace(asked, thinks=False)
                    kinds.append(own_ids(template, off, add_generation_prompt=True))
                assert ids[:start] in kinds
            stop = template.tokenizer.control_ids
            is_last = index + 1 == len(messages) or messages[index + 1].role != "assistant"
            if is_last:
                role = "observation" if messages[index].metadata else "user"
                assert ids[end - 1] == stop[f"<|{role}|>"]
            read = template.messages(ids[start:end], newer.TOOLS)[0]
            if messages[index].metadata:
                assert read.metadata == messages[index].metadata
            else:
                assert read.content == messages[index].content
    assert trained == sum(m.role == "assistant" for m in conversation.messages)


@pytest.mark.parametrize(
    "role", ["system", "user", "reply", "thought", "key", "value", "result", "tool"]
)
def test_what_is_typed_never_becomes_a_tag(template: ChatTemplate, role: str) -> None:
    def typed(where: str) -> str:
        return "x " + " ".join(newer.TOKENS) if where == role else "x"

    def asked(where: str | None) -> Conversation:
        texts = {name: typed(name) if where else "x" for name in
                 ("system", "user", "reply", "thought", "key", "value", "result", "tool")}  # fmt: skip
        tool = {"type": "function", "function": {"name": "f", "description": texts["tool"]}}
        call = json.dumps({texts["key"]: texts["value"]})
        thought = texts["thought"].replace("</think>", "")
        reply = texts["reply"].replace("</think>", "")
        return dialogue(
            ("system", texts["system"]), ("user", texts["user"]),
            ("reply", f"<think>\n{thought}\n</think>\n\n{reply}"), ("call", call, "f"),
            ("tool", texts["result"]), ("reply", reply), tools=[tool],
        )  # fmt: skip

    control = set(template.tokenizer.control_ids.values())
    both = [template.render([asked(where)])[0].input_ids.tolist() for where in (role, None)]
    tags = [[i for i in ids if i in control] for ids in both]
    assert tags[0] == tags[1]
    assert len(both[0]) > len(both[1])


def test_dropping_the_oldest_turns_keeps_laws(template: ChatTemplate) -> None:
    conversation = dialogue(
        *[one for n in range(6) for one in (("user", f"q {n} " * 5), ("reply", "a"))]
    )
    rendered = template.render([conversation])[0]
    shorter = shorten(rendered, conversation, len(rendered.input_ids) // 2)
    assert shorter is not None
    for index, start, _ in shorter.replies:
        kept = [m for _, _, m in shorter.runs if m is not None]
        first = kept[0]
        part = replace(conversation, messages=conversation.messages[first:])
        assert shorter.input_ids.tolist()[:start] == template.prompt(part, index - first)


# --- calls ---------------------------------------------------------------------------------------


def kinds_of(value: Any) -> Any:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array",
             dict: "object", type(None): "null"}  # fmt: skip
    return {"type": names[type(value)]}


@EXAMPLES
@given(arguments=newer.arguments)
@pytest.mark.parametrize("name", newer.TAGGED)
def test_a_call_is_read_back_as_it_was_where_the_schema_says_what_is_text(
    root: Path, name: str, arguments: dict[str, Any]
) -> None:
    template = newer.template_of(root, name)
    schema = {"properties": {key: kinds_of(value) for key, value in arguments.items()}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    content = json.dumps(arguments, ensure_ascii=False)
    conversation = dialogue(("user", "q"), ("call", content, "f"), tools=[tool])
    ids = template.render([conversation])[0].input_ids.tolist()
    begin = ids.index(template.tokenizer.control_ids["<|assistant|>"]) + 1
    [call] = template.messages(ids[begin:], [tool])
    assert call == Message("assistant", content, "f")
    [bare] = template.messages(ids[begin:], [])
    read = json.loads(bare.content)
    assert {k: v for k, v in read.items() if not isinstance(arguments[k], str)} == {
        k: v for k, v in arguments.items() if not isinstance(v, str)
    }


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        ({"type": "string"}, "5", "5"), ({"type": "integer"}, "5", 5), (None, "5", 5),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'), ({"type": "object"}, '{"a": 1}', {"a": 1}),
        (None, '"quoted"', '"quoted"'), (None, "10115 Berlin", "10115 Berlin"),
        ({"type": ["string", "null"]}, "null", None), ({"type": ["string", "null"]}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5", 5),
        ({"enum": ["1", "2"]}, "1", "1"), ({"enum": [1, 2]}, "1", 1), ({"const": "1"}, "1", "1"),
        ({"$ref": "#/$defs/zip"}, "10115", "10115"), ({"type": "number"}, "2", 2),
        ({"type": "integer"}, "many", "many"), ({}, "1e999", "1e999"), ({"type": "boolean"}, "true", True),
    ],
)  # fmt: skip
def test_the_schema_decides_what_a_text_means(schema: Any, text: str, expected: Any) -> None:
    root = {"$defs": {"zip": {"type": "string"}}}
    assert call_values.read_value(text, schema, root) == expected


def test_the_spellings_of_a_call_give_the_same_tokens(template: ChatTemplate) -> None:
    arguments = {"a": "北京", "b": 2}
    text = json.dumps(arguments, ensure_ascii=False)
    call = {"name": "f", "arguments": text}
    spelled = [
        {"tool_calls": [{"id": "1", "type": "function", "function": call}], "content": None},
        {"function_call": call, "content": None},
        {"metadata": "f", "content": text},
        {"content": {"name": "f", "arguments": arguments}},
        {"content": json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=False)},
    ]
    found = set()
    for one in spelled:
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", **one},
                    {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}]  # fmt: skip
        row = {"messages": messages, "tools": list(newer.TOOLS)}
        conversation = to_conversation(row, "openai" if "tool_calls" in one or "function_call" in one else "messages", location="x")  # fmt: skip
        found.add(tuple(template.render([conversation])[0].input_ids.tolist()))
    assert len(found) == 1


def test_arguments_that_are_no_json_are_refused_with_their_message(template: ChatTemplate) -> None:
    with pytest.raises(DataError, match=r"file\.jsonl:1: message 2 \(assistant\): .*JSON"):
        template.render([dialogue(("user", "q"), ("call", "print(1)", "python"))])


# --- refusals ------------------------------------------------------------------------------------


def test_a_template_that_differs_is_refused_with_both_texts(root: Path) -> None:
    tokenizer = newer.template_of(root, "GLM-4.5").tokenizer
    for before, after in (
        ("kept and said.thought", "said.thought"),  # keeps the thoughts of the past
        ('last.role != "tool"', "true"),  # a header before every result
    ):
        source = tokenizer.chat_template.replace(before, after)
        assert source != tokenizer.chat_template
        with pytest.raises(DataError, match=r"(?s)its template: .*our layout: "):
            ChatTemplate(replace(tokenizer, chat_template=source))


def test_line_breaks_that_stand_elsewhere_are_read_off(root: Path) -> None:
    tokenizer = newer.template_of(root, "GLM-4.5").tokenizer
    source = tokenizer.chat_template.replace('"</arg_value>" + br', '"</arg_value>"')
    assert source != tokenizer.chat_template
    template = ChatTemplate(replace(tokenizer, chat_template=source))
    rendered = template.render([ASKED_TWICE])[0].input_ids.tolist()
    assert rendered[:-1] == own_ids(template, ASKED_TWICE)
    assert "</arg_value><arg_key>" in template.decode(rendered)


def test_tags_without_tokens_are_refused(root: Path) -> None:
    tokenizer = newer.template_of(root, "GLM-4.5").tokenizer
    known = {token: i for token, i in tokenizer.control_ids.items() if token != "<arg_key>"}
    with pytest.raises(DataError, match="writes <arg_key>, which its tokenizer has no token for"):
        ChatTemplate(replace(tokenizer, control_ids=known))


@given(ids=st.lists(st.integers(0, 405), max_size=14))
@settings(max_examples=80, deadline=None, database=None)
def test_whatever_a_model_writes_is_read(root: Path, ids: list[int]) -> None:
    for name in newer.TEMPLATES:
        template = newer.template_of(root, name)
        assert all(message.role == "assistant" for message in template.messages(ids, newer.TOOLS))
        assert template.parse(ids).role == "assistant"
