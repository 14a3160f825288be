"""Templates, layouts and images, rule by rule, on what no model is needed for."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from examples import dialogue, tiny_template
from hints import said
from PIL import Image

from finetune.data.chat import jinja, sandbox, thinking
from finetune.data.chat.characters import Characters
from finetune.data.chat.image import (
    MAX_PIXELS,
    ImageError,
    ImageSpec,
    between,
    check_image,
    image_spec,
    rgb_of,
)
from finetune.data.chat.jinja import ChatLayout, JinjaTemplate, tools_text
from finetune.data.chat.layouts import tag_grammar
from finetune.data.chat.layouts.call_values import read_value, types_of
from finetune.data.chat.layouts.layout import Texts
from finetune.data.chat.sandbox import RefusedError, Sandbox
from finetune.data.chat.spans import keeps_first_turn
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.template_check import parts_of
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage
from finetune.data.preview.show import merged, shown


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return tiny_template(tmp_path_factory.mktemp("tokenizer"))


def user(text: str, *at: int, marked: bool = False) -> Message:
    return Message("user", text, images=tuple(ShownImage(f"{n}", n, marked) for n in at))


# --- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "behind", "text"),
    [("", "Q", "Q"), ("", "\nQ", "Q"), ("Q\n", "", "Q"), ("Q", "", "Q"), ("Q", "\nmore", "Q\nmore"),
     ("Q\n", "\nmore", "Q\nmore"), (" \n", "\nQ", "Q"), ("", "\n\nQ", "\nQ")],
)  # fmt: skip
def test_a_placeholders_line_break_is_no_part_of_the_question(
    before: str, behind: str, text: str
) -> None:
    message = user(before + behind, len(before), marked=True)
    assert ImageSpec(28, 1, 7).laid(message, message.content) == ["", text]


def test_images_keep_their_places_where_a_template_strips_the_text() -> None:
    message = user("  甲乙 ", 0, 3, 5)
    assert between(message, message.content) == ["", "  甲", "乙 ", ""]
    assert between(message, "甲乙") == ["", "甲", "乙", ""]
    assert parts_of(user("甲乙", 0, 1, 2)) == [
        {"type": "image", "path": "0"}, {"type": "text", "text": "甲"}, {"type": "image", "path": "1"},
        {"type": "text", "text": "乙"}, {"type": "image", "path": "2"},
    ]  # fmt: skip


def test_the_first_turn_stays_where_it_alone_shows_images() -> None:
    seen, plain, answer = user("Q", 0), user("Q"), Message("assistant", "A")
    assert keeps_first_turn([seen, answer, plain, answer])
    assert keeps_first_turn([seen])
    assert not keeps_first_turn([plain, answer, seen])
    assert not keeps_first_turn([seen, answer, seen, answer])
    assert not keeps_first_turn([plain, answer, plain])


def test_pixels_are_counted_before_an_image_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    check_image(tmp_path / "a.png", max_pixels=24)
    with pytest.raises(ImageError, match="6 x 4 pixels, more than 23"):
        check_image(tmp_path / "a.png", max_pixels=23)
    assert MAX_PIXELS == (1024 * 1024 * 1024 // 4 // 3)
    with pytest.raises(ImageError, match="there is no such file"):
        check_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="it is not a file"):
        check_image(tmp_path)


def test_greys_of_sixteen_bits_are_rounded_and_transparency_is_white() -> None:
    grey = Image.fromarray(np.array([[0, 128, 129, 65535]], np.uint16))
    assert np.asarray(rgb_of(grey))[0, :, 0].tolist() == [0, 0, 1, 255]
    for mode in ("RGBA", "LA", "PA"):
        clear = Image.new("RGBA", (1, 1), (0, 0, 0, 0)).convert("RGBA" if mode == "PA" else mode)
        clear = clear.convert("PA") if mode == "PA" else clear
        assert rgb_of(clear).getpixel((0, 0)) == (255, 255, 255), mode
    keyed = Image.new("P", (1, 1), 0)
    keyed.info["transparency"] = 0
    assert rgb_of(keyed).getpixel((0, 0)) == (255, 255, 255)


def test_patches_of_an_image_follow_from_the_config() -> None:
    vision = {"image_size": 1120, "patch_size": 14}
    spec = image_spec({"vision_config": vision, "boi_token_id": 7})
    assert spec == ImageSpec(1120, 1600, 7)
    assert spec.tokens == 1602
    assert image_spec({}) is None


# --- thoughts ------------------------------------------------------------------------------------


def test_a_call_behind_a_thought_is_one_where_its_arguments_are_an_object() -> None:
    assert thinking.as_message("a</think>\n\nf\n{}") == Message("assistant", "{}", "f")
    for text in ("a</think>\n\nf\nwords", "a</think>\n\nf g\n{}", "a</think>f", "f\n{}"):
        assert thinking.as_message(text).metadata == ""
    assert thinking.as_message("<think>\n</think>\n\nA").content == "A"


def test_a_thought_in_front_of_a_call_ends_at_its_first_tag() -> None:
    call = Message("assistant", '<think>a</think>\n{"x": "</think>"}', "f")
    assert thinking.split_message(call) == ("a", '\n{"x": "</think>"}')
    plain = Message("assistant", '{"x": "</think>"}', "f")
    assert thinking.split_message(plain) == ("", plain.content)
    # What arguments say of tags is no thought, and all of it is trained.
    assert thinking.behind_prompt(plain, "f", "") == f"\n\n</think>\n\nf\n{plain.content}"
    assert thinking.behind_prompt(call, "f", "") == 'a</think>\n\nf\n{"x": "</think>"}'


def test_turns_with_loss_carry_it_alone_and_are_counted() -> None:
    talk = dialogue(2)
    first, second = thinking.turns_with_loss(talk, "every_reply")
    assert [m.train for m in first.messages if m.role == "assistant"] == [True]
    assert [m.train for m in second.messages if m.role == "assistant"] == [False, True]
    (last,) = thinking.turns_with_loss(talk, "last_reply")
    assert len(last.messages) == 4
    assert thinking.turns_with_loss(dialogue(1, weight=0.0), "every_reply") == []
    assert thinking.thoughts(second) == [False]
    untold = replace(talk, messages=(*talk.messages[:2], Message("user", "Q"), Message("assistant", "<think>a</think>b")))  # fmt: skip
    assert thinking.thoughts(untold) == [False, True]
    calls = (Message("user", "Q"), Message("assistant", "<think>a</think>{}", "f"), Message("assistant", "{}", "f"))  # fmt: skip
    assert thinking.thoughts(Conversation(calls)) == [True]


# --- templates and their sandbox -----------------------------------------------------------------


def test_texts_that_follow_each_other_are_encoded_as_one() -> None:
    texts = Texts()
    assert texts.ops("a", "b", ~7, "", "c", "ab") == (0, ~7, 1)
    assert list(texts.numbers) == ["ab", "cab"]
    assert texts.ops("ab", ~7, "") == (0, ~7)


def test_what_is_left_of_a_character_is_told_once(template: ChatTemplate) -> None:
    plain = template.tokenizer.plain
    ids = plain.encode("a😀", add_special_tokens=False).ids
    characters = Characters(plain)
    told = [characters.step(token) for token in ids[:-1]]
    rest = characters.rest()
    assert "".join(told) + rest == plain.decode(ids[:-1], skip_special_tokens=False)
    assert characters.rest() == ""


def test_a_token_that_begins_with_another_is_cut_out_whole(template: ChatTemplate) -> None:
    tokenizer = replace(template.tokenizer, control_ids={"<a>": 1, "<a><b>": 2, "x": 3})
    assert tokenizer.split("1<a><b>2<a>3x") == ["1", "<a><b>", "2", "<a>", "3", "x"]


def test_ids_of_a_prompt_show_the_images_before_the_reply_only(template: ChatTemplate) -> None:
    class Takes:
        rules, patch_token, size = "r", "<|endoftext|>", 28
        laid = staticmethod(between)

        def patches_of(self, image: str) -> int:
            return 1

        @property
        def rule(self) -> Any:
            from finetune.data.dialogue.images import ImageRule

            return ImageRule("it", roles=("user",))

    seeing = ChatTemplate(replace(template.tokenizer, image=Takes()))  # type: ignore[arg-type]
    seeing.__dict__["image_rule"] = Takes().rule
    talk = Conversation((user("Q", 0), Message("assistant", "A"), user("RS", 1), Message("assistant", "B")))  # fmt: skip
    first, second = seeing.prompts([(talk, 1), (talk, 3)])
    assert first.paths == ("0",)  # type: ignore[attr-defined]
    assert second.paths == ("0", "1")  # type: ignore[attr-defined]


def test_a_text_that_is_no_unicode_is_named_by_dialogue_and_message(
    template: ChatTemplate,
) -> None:
    good = Message("user", "Q")
    bad = Conversation((good, Message("assistant", "\ud800")), location="f:7")
    assert "f:7: message 2 (assistant) is not valid Unicode" in said(template.render, [bad])
    empty = Conversation((good, Message("assistant", "")), location="f:8")
    assert said(template.render, [empty]).startswith("f:8: message 2 (assistant): it has no text")


def test_a_template_is_rendered_as_transformers_renders_it() -> None:
    template = JinjaTemplate("{%- if documents is none %}\n  {% if tools %}T{% endif %}\n{{ messages | tojson }}{% endif %}", {})  # fmt: skip
    assert template.render([{"role": "user", "content": "é<"}]) == '[{"role": "user", "content": "é<"}]'  # fmt: skip


def test_a_forked_process_has_a_sandbox_of_its_own() -> None:
    one = Sandbox("{{ a }}")
    assert one.render({"a": "x"}) == "x"
    first = one._process
    listen, speak = os.pipe()
    if (child := os.fork()) == 0:
        try:
            same = one.render({"a": "y"}) == "y" and one._process is not first
            os.write(speak, b"own" if same else b"shared")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(listen, 10) == b"own"
    assert one.render({"a": "z"}) == "z"
    assert one._process is first
    assert first is not None
    sandbox._end(first, os.getppid())  # as a process does that has it of its parent
    assert one.render({"a": "z"}) == "z"


def test_a_template_that_hangs_or_dies_is_said_and_the_next_one_rendered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Sandbox("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}x")
    assert one.render({"n": 1}) == "x"
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    hanging: Any = one._process
    with pytest.raises(RefusedError, match=r"takes longer than 0\.2 s"):
        one.render({"n": 99_999})
    assert hanging.returncode is not None
    monkeypatch.setattr(sandbox, "SECONDS", 10.0)
    assert one.render({"n": 1}) == "x"
    one._process.kill()  # type: ignore[union-attr]
    one._process.wait()  # type: ignore[union-attr]
    with pytest.raises(RefusedError, match="ended without an answer"):
        one.render({"n": 1})
    assert one.render({"n": 1}) == "x"


def test_an_answer_of_a_template_is_at_most_two_million_characters() -> None:
    most = sandbox.LONGEST // 8
    one = Sandbox("{{ 'é' * n }}")
    assert len(one.render({"n": most})) == most
    with pytest.raises(RefusedError, match="it writes 2,097,153 characters"):
        one.render({"n": most + 1})


def test_a_tool_that_a_template_leaves_out_is_refused_by_its_number() -> None:
    source = "<p>{% if tools %}<|system|>{% for t in tools if t.function %}{{ t.function.name }};{% endfor %}{% endif %}<|user|>\n问"  # fmt: skip
    layout = ChatLayout("<p>", "", "argument", {}, frozenset())
    template = JinjaTemplate(source, {})
    f = {"type": "function", "function": {"name": "f"}}
    python = {"type": "python"}
    assert tools_text(template, layout, [f]) == "f;"
    for tools, number in (([f, python], 2), ([python], 1), ([f, {"type": "function", "function": {"name": ""}}], 2)):  # fmt: skip
        assert f"tool {number} (" in said(tools_text, template, layout, tools)
    # A built-in tool's name may stand in the text without the tool.
    named = {"type": "function", "function": {"name": "python"}}
    only_f = "{% for t in tools if t.function.name == 'f' %}f;{% endfor %}"
    speaks = JinjaTemplate("<p>{% if tools %}<|system|>python? " + only_f + "{% endif %}<|user|>\n问", {})  # fmt: skip
    assert tools_text(speaks, layout, [f]) == "python? f;"
    assert "tool 2 ('python')" in said(tools_text, speaks, layout, [f, named])


# --- calls between tags --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [("20", None, 20), ("20", {"type": "string"}, "20"), ("20.0", {"type": "integer"}, 20.0),
     ("20.5", {"type": "integer"}, "20.5"), ("20", {"type": "number"}, 20), ('"a"', {}, '"a"'),
     ("true", {"type": "boolean"}, True), ("null", {"type": ["null", "string"]}, None), ("[1]", {"type": "array"}, [1]),
     ("{}", {"type": "array"}, "{}"), ("20", {"enum": ["20"]}, "20"), ("20", {"const": 20}, 20),
     ("20", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, 20), ("20", {"anyOf": [{"type": "string"}, {}]}, 20),
     ("20", {"allOf": [{}, {"type": "string"}, {"type": "integer"}]}, "20")],
)  # fmt: skip
def test_a_text_between_tags_is_what_its_schema_takes(text: str, schema: Any, value: Any) -> None:
    found = read_value(text, schema, {})
    assert (found, type(found)) == (value, type(value))


def test_a_schema_may_refer_to_itself() -> None:
    root = {"$defs": {"a": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}}
    assert types_of({"$ref": "#/$defs/a"}, root) == {"integer"}
    assert types_of({"$ref": "#/$defs/loop"}, root) == frozenset()
    assert types_of({"$ref": "#/$defs/gone"}, root) == frozenset()


FORM = SimpleNamespace(
    prompt="", prompt_off="off", no_thought="<think></think>", before_reply="\n",
    thought=("<think>", "</think>"), call=("\n<tool_call>", "\n", "</tool_call>"),
    argument=("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
)  # fmt: skip


def grammar(*tools: Any, **options: Any) -> str:
    import re

    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")  # fmt: skip
    pattern = f"({'|'.join(map(re.escape, tags))})"
    tokenizer = SimpleNamespace(control_ids=dict.fromkeys(tags, 1), split=lambda text: [p for p in re.split(pattern, text) if p])  # fmt: skip
    structure = SimpleNamespace(**{"schema": None, "tools": tools, "many_calls": False, "strict": False, "opened": None} | options)  # fmt: skip
    layout: Any = SimpleNamespace(form=FORM, tokenizer=tokenizer)
    return tag_grammar.tag_grammar(structure, layout, lambda schema, strict: f"J{int(strict)}")  # type: ignore[arg-type]


def tool(properties: Any, required: Any = (), **more: Any) -> Any:
    parameters = {"properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **more}}


def test_a_grammar_holds_what_a_tool_asks_for() -> None:
    lines = grammar(tool({"a": {"type": "integer"}, "b": {}}, ["a"])).splitlines()
    assert lines[0] == "start: head ((call_0))"
    assert lines[1] == "head: <think> /(.|\\n)*/ </think>"
    assert lines[2] == 'call_0_0: <arg_key> "a" </arg_key> "\\n" <arg_value> J0 </arg_value> "\\n"'
    assert "<arg_value> /(.|\\n)*/ </arg_value>" in lines[3]
    assert lines[4] == 'call_0: "\\n" <tool_call> "f" "\\n" call_0_0 call_0_1? </tool_call>'
    assert grammar(tool({}), many_calls=True).splitlines()[0] == "start: head ((call_0)+)"
    assert '("x" | "1")' in grammar(tool({"a": {"enum": ["x", 1]}}))
    assert '("x")' in grammar(tool({"a": {"const": "x"}}))
    assert "J1" in grammar(tool({"a": {"type": "integer"}}, strict=True))
    assert "J0" in grammar(tool({"a": {"type": "integer"}}, strict="yes"))
    assert "J1" in grammar(tool({"a": {"type": "integer"}}), strict=True)


def test_what_a_grammar_cannot_hold_is_refused_when_it_is_strict() -> None:
    short = tool({"a": {"type": "string", "maxLength": 3}})
    grammar(short)
    assert "'maxLength' of 'a' cannot be held" in said(grammar, short, strict=True)
    assert "cannot be held" in said(grammar, tool({"a": {"minLength": 1}}, strict=True))
    assert "called with plain text" in said(grammar, {"type": "python"})


def test_a_prompt_inside_of_a_turn_or_without_a_thought_leaves_out_what_is_there() -> None:
    inside = grammar(tool({}), opened=tag_grammar.INSIDE).splitlines()
    assert inside[0] == "start: ((call_0))"
    assert inside[1].startswith('call_0: "\\n"? <tool_call>')
    off = grammar(tool({}), schema={}, opened="off").splitlines()
    assert off[0] == "start: (text | (call_0))"
    assert off[1] == 'text: <think> </think> "\\n" J0'
    assert grammar(tool({}), schema={}).splitlines()[2] == 'text: "\\n" J0'


# --- what is shown -------------------------------------------------------------------------------


def test_spans_that_touch_are_shown_as_one() -> None:
    assert merged(iter([(1, 3), (3, 5), (6, 7)])) == [[1, 5], [6, 7]]


def test_a_dialogue_is_shown_as_it_is_trained(template: ChatTemplate) -> None:
    talk = replace(dialogue(2), location="f:3")
    found = shown(talk, template, "messages")
    assert (found.location, found.format, found.num_examples) == ("f:3", "messages", 1)
    assert found.plain().count("«") == found.plain().count("»") == 2
    assert found.plain().endswith("<|user|>»")
    assert found.num_supervised == sum(len(t.ids) for t in found.tokens if t.supervised)
    assert found.num_tokens == sum(len(t.ids) for t in found.tokens)
    assert found.stop == "<|user|>"
    assert found.prompt.endswith("<|assistant|>")
    assert "answer 1" not in found.prompt
    assert {t.text for t in found.tokens if t.control} >= {"<|user|>", "<|assistant|>"}
    calls = Conversation((Message("user", "Q"), Message("assistant", "{}", "f"), Message("observation", "1"), Message("assistant", "A", train=False)))  # fmt: skip
    assert shown(calls, template, "messages").stop == "<|user|>"


def test_what_is_visible_stands_behind_the_last_thought() -> None:
    assert jinja._visible("a</think> b </think>\n c ") == "c"
    assert jinja._visible(" c ") == "c"
