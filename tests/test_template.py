"""Laws 1 to 6: what the chat template lays out, what of it is trained, and what a prompt holds.

Expected ids come from golden/ (the published tokenizer and templates) or from a checkpoint's own
template rendered by jinja and encoded with control strings matched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from dialogues import CONTROL_STRINGS, TOOLS, Z1_TEMPLATE, dialogue, dialogues, plain_text
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.chat.image import ImageSpec
from finetune.data.chat.jinja import JinjaTemplate
from finetune.data.chat.template import ChatTemplate, Rendered, trained_spans
from finetune.data.chat.template_check import own_text
from finetune.data.chat.tokenizer import ChatTokenizer, load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage
from finetune.data.reading.sources import SourceSpec, read_conversations
from finetune.errors import DataError

IDS = tiny.CONTROL_IDS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """The tiny tokenizer with four more added tokens, two of them not special."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    value = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    for text in CONTROL_STRINGS[14:]:
        last = value["added_tokens"][-1]
        changes = {"id": last["id"] + 1, "content": text, "special": text.startswith("<|")}
        value["added_tokens"].append(last | changes)
    (folder / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    return load_chat_tokenizer(folder)


@pytest.fixture(scope="module")
def template(tokenizer: ChatTokenizer) -> ChatTemplate:
    return ChatTemplate(tokenizer)


@pytest.fixture(scope="module")
def z1(tokenizer: ChatTokenizer) -> ChatTemplate:
    return ChatTemplate(replace(tokenizer, chat_template=Z1_TEMPLATE))


def from_golden(row: dict[str, Any]) -> Conversation:
    tools = list(row.get("tools") or [])
    messages = []
    for m in row["messages"]:
        tools += m.get("tools") or []
        messages.append(
            Message(
                m["role"],
                m["content"],
                m.get("metadata", ""),
                images=(ShownImage(m["image"]),) if m.get("image") else (),
            )
        )
    return Conversation(tuple(messages), tuple(tools))


def golden(assets: Path, name: str) -> Iterator[dict[str, Any]]:
    with (assets / "golden" / name).open(encoding="utf-8") as rows:
        yield from map(json.loads, rows)


@pytest.fixture(scope="module")
def published(glm4_assets: Path) -> ChatTokenizer:
    return load_chat_tokenizer(glm4_assets / "assets" / "glm-4-9b-chat")


def spans(rendered: Rendered, conversation: Conversation, train_on: Any = "every_reply") -> Any:
    return [[s, e] for s, e, _ in trained_spans(rendered, conversation, train_on)]


# --- against the published tokenizer and templates ----------------------------------------------


def test_ids_and_trained_spans_equal_the_published_ones(
    published: ChatTokenizer, glm4_assets: Path
) -> None:
    template = ChatTemplate(published)
    rows = list(golden(glm4_assets, "chat_template.jsonl"))
    assert len(rows) == 136
    conversations = [from_golden(row) for row in rows]
    for row, conversation, rendered in zip(
        rows, conversations, template.render(conversations), strict=True
    ):
        assert rendered.input_ids.tolist() == row["input_ids"]
        assert spans(rendered, conversation) == row["trained_spans"]


def test_generation_prompts_equal_the_published_ones_with_an_image_too(
    published: ChatTokenizer, glm4_assets: Path
) -> None:
    template = ChatTemplate(replace(published, image=ImageSpec(1120, 1, 151339)))
    rows = json.loads((glm4_assets / "golden" / "published_token_ids.json").read_text("utf-8"))
    chats = [row for row in rows if row["kind"].startswith("chat")]
    assert [row["kind"] for row in chats].count("chat_image") == 1
    conversations = [from_golden(row) for row in chats]
    prompts = template.prompts([(c, len(c.messages)) for c in conversations])
    assert prompts == [row["ids"] for row in chats]


def test_the_z1_dialect_equals_its_template(published: ChatTokenizer, glm4_assets: Path) -> None:
    source = (glm4_assets / "assets" / "glm-z1-9b-0414" / "chat_template.jinja").read_text("utf-8")
    template = ChatTemplate(replace(published, chat_template=source))
    for row in golden(glm4_assets, "chat_template_z1.jsonl"):
        rendered = template.render([from_golden(row)])[0]
        assert rendered.input_ids[:-1].tolist() == row["input_ids"]
    assert template.decode(template.prompt(dialogue(("user", "Q")), 1)) == (
        "[gMASK]<sop><|user|>\nQ<|assistant|>\n<think>"
    )


@pytest.mark.parametrize(
    ("file", "rows"),
    [
        ("advertisegen/train.jsonl", 3000),
        ("advertisegen/dev.jsonl", 1070),
        ("toolcall/glaive_zh_sharegpt.json", 300),
    ],
)
def test_laws_hold_on_all_real_dialogues(
    published: ChatTokenizer, glm4_assets: Path, file: str, rows: int
) -> None:
    template = ChatTemplate(published)
    sources = [SourceSpec(str(glm4_assets / "data" / file))]
    conversations = list(read_conversations(sources))
    assert len(conversations) == rows
    check_laws(template, conversations)
    for conversation, rendered in zip(conversations, template.render(conversations), strict=True):
        shorter = template.shorten(rendered, conversation, 256)
        if shorter is not None:
            assert len(shorter.input_ids) <= 256
            assert spans(shorter, conversation)


# --- law 1 -----------------------------------------------------------------------------------


def own_ids(template: ChatTemplate, conversation: Conversation) -> list[int]:
    """What the checkpoint's own template and tokenizer make of a dialogue."""
    jinja = JinjaTemplate(template.tokenizer.chat_template, {})
    return template.tokenizer.trusted(own_text(conversation, template, jinja))


def test_jinja_renders_as_transformers_does() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    sources = (
        tiny.CHAT_TEMPLATE,
        Z1_TEMPLATE,
        "{% set n = namespace(x=dict(a=1)) %}{% for m in messages %}\n  {% set n.x = m %}"
        "{% generation %}\n{{ n.x | tojson }}\n{% endgeneration %}\n{% break %}{% endfor %}\n",
    )
    messages = [
        {"role": "system", "content": "", "tools": TOOLS},
        {"role": "user", "content": "<é>"},
    ]
    for source in sources:
        for prompt in (False, True):
            theirs, _ = render_jinja_template(
                [messages], tools=list(TOOLS), chat_template=source, add_generation_prompt=prompt
            )
            jinja = JinjaTemplate(source, {})
            ours = jinja.render(messages, tools=list(TOOLS), add_generation_prompt=prompt)
            assert [ours] == theirs


def test_a_template_of_another_layout_is_refused_with_both_texts(tokenizer: ChatTokenizer) -> None:
    separated = tiny.CHAT_TEMPLATE.replace(
        "{% if item['content'] %}", "{% if item['role'] == 'observation' %} {% endif %}"
        "{% if item['content'] %}"
    )  # fmt: skip
    with pytest.raises(DataError, match=r"(?s)its template: .*our layout: .*GLM-4 family"):
        ChatTemplate(replace(tokenizer, chat_template=separated))
    chatml = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(DataError, match="not in the GLM-4 layout"):
        ChatTemplate(replace(tokenizer, chat_template=chatml))
    with pytest.raises(DataError, match="not valid jinja: line 1"):
        ChatTemplate(replace(tokenizer, chat_template="{% for %}"))


def test_a_template_cannot_reach_out_of_its_sandbox(tokenizer: ChatTokenizer) -> None:
    for escape in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace(_a=1) %}fine",
        "{% set n = namespace({'_a': 1}) %}fine",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    ):
        with pytest.raises(DataError, match="chat template failed"):
            ChatTemplate(replace(tokenizer, chat_template=escape + tiny.CHAT_TEMPLATE))


def test_a_template_without_tools_serves_plain_dialogues_and_refuses_the_others(
    tokenizer: ChatTokenizer,
) -> None:
    plain = (
        "[gMASK]<sop>{% for m in messages %}{% if m.role in ['user', 'assistant'] %}"
        "<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template = ChatTemplate(replace(tokenizer, chat_template=plain))
    assert not template.takes_tools
    check_laws(template, [dialogue(("user", "Q"), ("reply", "A"))])
    for refused, reason in (
        (dialogue(("user", "Q"), ("reply", "A"), tools=TOOLS), "file.jsonl:1: .*has tools"),
        (dialogue(("user", "Q"), ("call", "{}", "f")), "no place for tool calls"),
        (dialogue(("system", "S"), ("user", "Q")), "message 1 .*does not know the role"),
    ):
        with pytest.raises(DataError, match=reason):
            template.render([refused])


def test_system_text_follows_the_tools_and_empty_system_text_is_absent(
    template: ChatTemplate, z1: ChatTemplate
) -> None:
    for each in (template, z1):
        full = dialogue(("system", "S"), ("user", "Q"), ("reply", "A"), tools=TOOLS)
        rendered = each.render([full])[0]
        assert rendered.input_ids[:-1].tolist() == own_ids(each, full)
        assert [run.message for run in rendered.runs] == [None, None, 0, 1, 2, None]
        empty = dialogue(("system", ""), ("user", "Q"), ("reply", "A"), tools=TOOLS)
        without = dialogue(("user", "Q"), ("reply", "A"), tools=TOOLS)
        assert_same(each.render([empty])[0].input_ids, each.render([without])[0].input_ids)


def test_built_in_tools_are_rendered_by_templates_that_know_them(tokenizer: ChatTokenizer) -> None:
    built_in = (
        Path(tiny.__file__).parents[1] / "finetune/data/chat/templates/glm4_chat.jinja"
    ).read_text("utf-8")
    template = ChatTemplate(replace(tokenizer, chat_template=built_in))
    tools = [{"type": kind} for kind in ("python", "simple_browser", "cogview")]
    known = dialogue(("user", "Q"), ("reply", "A"), tools=tools)
    assert template.render([known])[0].input_ids[:-1].tolist() == own_ids(template, known)
    with pytest.raises(DataError, match=r"file.jsonl:1: tool 2 \('drawing'\) is of a kind"):
        template.render([replace(known, tools=(tools[0], {"type": "drawing"}))])
    z1 = ChatTemplate(replace(tokenizer, chat_template=Z1_TEMPLATE))
    with pytest.raises(DataError, match=r"tool 1 \('python'\) is of a kind"):
        z1.render([known])


# --- law 4 -----------------------------------------------------------------------------------


def fields(typed: str) -> Iterator[tuple[str, Conversation]]:
    """One dialogue per text field, with `typed` in that field and plain text in all others."""

    def build(**at: str) -> Conversation:
        def text(name: str) -> str:
            return at.get(name, "x")

        function = {
            "name": text("name"),
            "description": text("description"),
            "parameters": {
                "type": "object",
                "properties": {text("parameter"): {"description": text("parameter_description")}},
                "required": [text("required")],
            },
        }
        return dialogue(
            ("system", text("system")),
            ("user", text("user")),
            ("call", text("arguments"), text("metadata")),
            ("tool", text("observation")),
            ("reply", text("reply")),
            tools=[{"type": "function", "function": function}],
        )

    for name in (
        "name", "description", "parameter", "parameter_description", "required", "system", "user",
        "arguments", "metadata", "observation", "reply",
    ):  # fmt: skip
        yield name, build(**{name: f"a {typed}b"})


@pytest.mark.parametrize("typed", CONTROL_STRINGS)
def test_nothing_typed_becomes_a_control_token(
    typed: str, template: ChatTemplate, z1: ChatTemplate
) -> None:
    for each in (template, z1):
        control = set(each.tokenizer.control_ids.values())
        _, plain = next(fields("x"))
        expected = [i for i in each.render([plain])[0].input_ids.tolist() if i in control]
        prompt = [i for i in each.prompt(plain, 4) if i in control]
        for field, conversation in fields(typed):
            ids = each.render([conversation])[0].input_ids.tolist()
            assert [i for i in ids if i in control] == expected, field
            assert [i for i in each.prompt(conversation, 4) if i in control] == prompt, field
            if each is template:
                assert f"a {typed}b" in each.decode(ids), field


# --- laws 1 to 5 on drawn dialogues ------------------------------------------------------------


def check_laws(template: ChatTemplate, conversations: Sequence[Conversation]) -> None:
    """Laws 2, 3 and 4 for a dialect that leaves text as it is."""
    asked = [
        (conversation, index)
        for conversation in conversations
        for index, message in enumerate(conversation.messages)
        if message.role == "assistant"
    ]
    prompts = iter(template.prompts(asked))
    control = set(template.tokenizer.control_ids.values())
    for conversation, rendered in zip(conversations, template.render(conversations), strict=True):
        ids = rendered.input_ids.tolist()
        replies = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        assert [reply.message for reply in rendered.replies] == replies
        for index, start, end in rendered.replies:
            assert ids[:start] == next(prompts)
            assert ids[end - 1] in control
            assert not control & set(ids[start : end - 1])
            said = conversation.messages[index]
            for supervised in (ids[start:end], ids[start : end - 1]):
                parsed = template.parse(supervised)
                assert (parsed.metadata, parsed.content) == (said.metadata, said.content)
        assert (rendered.runs[0].start, rendered.runs[-1].end) == (0, len(ids))
        assert all(a.end == b.start for a, b in zip(rendered.runs, rendered.runs[1:], strict=False))
        headers = [run.start for run in rendered.runs[1:]]
        assert [place for place, i in enumerate(ids) if i in control] == [0, 1, *headers]


@settings(max_examples=80, deadline=None, database=None)
@given(conversation=dialogues())
def test_prompt_is_a_prefix_supervised_tokens_are_the_reply_and_its_stop(
    template: ChatTemplate, conversation: Conversation
) -> None:
    check_laws(template, [conversation])


@settings(max_examples=80, deadline=None, database=None)
@given(conversation=dialogues(plain_text))
def test_rendered_ids_are_those_of_the_checkpoints_own_template(
    template: ChatTemplate, z1: ChatTemplate, conversation: Conversation
) -> None:
    for each in (template, z1):
        ids = each.render([conversation])[0].input_ids
        assert ids[:-1].tolist() == own_ids(each, conversation)
        assert ids[-1] == IDS["<|user|>"]


@settings(max_examples=40, deadline=None, database=None)
@given(conversation=dialogues(), other=dialogues())
def test_a_prompt_depends_on_nothing_from_its_reply_on(
    template: ChatTemplate, z1: ChatTemplate, conversation: Conversation, other: Conversation
) -> None:
    for each in (template, z1):
        for index, message in enumerate(conversation.messages):
            if message.role == "assistant":
                replaced = (*conversation.messages[:index], *other.messages[1:])
                changed = replace(conversation, messages=replaced)
                assert each.prompt(conversation, index) == each.prompt(changed, index)


@settings(max_examples=25, deadline=None, database=None)
@given(conversations=st.lists(dialogues(), max_size=4))
def test_a_batch_renders_as_one_by_one(
    template: ChatTemplate, conversations: list[Conversation]
) -> None:
    together = template.render(conversations)
    alone = [template.render([conversation])[0] for conversation in conversations]
    for a, b in zip(together, alone, strict=True):
        assert_same(a.input_ids, b.input_ids)
        assert (a.runs, a.replies) == (b.runs, b.replies)


def assert_same(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(a, b)
