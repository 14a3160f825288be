"""A thinking checkpoint: what is trained begins as what is asked, with a thought, without, for calls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from dialogues import TOOLS, Z1_TEMPLATE, dialogue, dialogues, plain_text
from hypothesis import given, settings
from prompt_lists import reply_prompts

from finetune.data.chat import thinking
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.data.examples.dataset import LengthPolicy, load_examples
from finetune.data.preview.report import check, show, tokens
from finetune.data.reading.sources import SourceSpec, read_conversations
from finetune.generation.stream import ReplyStream, _Thought

REASONED = "<think>\n先想。\n</think>\n\n答"
PROMPT = "[gMASK]<sop><|user|>\nq<|assistant|>\n<think>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("z1")
    tiny.save_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "glm4"}')
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {tiny.EOS_IDS}}}')
    (folder / "chat_template.jinja").write_text(Z1_TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def z1(folder: Path) -> ChatTemplate:
    template = ChatTemplate(load_chat_tokenizer(folder))
    assert template.layout.thinking
    return template


def examples(template: ChatTemplate, conversation: Conversation, train_on="every_reply"):
    """The text of each example, « » around what carries loss."""
    found = []
    for part, rendered in template.examples([conversation], train_on)[0]:
        ids, text, at = rendered.input_ids.tolist(), "", 0
        for start, end, _ in template.trained_spans(rendered, part, train_on):
            text += template.decode(ids[at:start]) + "«" + template.decode(ids[start:end]) + "»"
            at = end
        found.append(text + template.decode(ids[at:]))
    return found


def test_a_reply_is_trained_behind_the_prompt_with_its_thought_or_an_empty_one(
    z1: ChatTemplate,
) -> None:
    thoughtful = dialogue(("user", "q"), ("reply", REASONED))
    assert examples(z1, thoughtful) == [PROMPT + "«\n先想。\n</think>\n\n答<|user|>»"]
    untagged = dialogue(("user", "q"), ("reply", REASONED.removeprefix("<think>")))
    assert examples(z1, untagged) == examples(z1, thoughtful)
    plain = dialogue(("user", "q"), ("reply", " 答 "))
    assert examples(z1, plain) == [PROMPT + "«\n\n</think>\n\n答<|user|>»"]
    spaced = dialogue(("user", "q"), ("reply", REASONED + " \n"))
    assert examples(z1, spaced) == examples(z1, thoughtful)
    empty = dialogue(("user", "q"), ("reply", "<think></think>答"))
    assert examples(z1, empty) == examples(z1, plain)


def test_every_turn_is_an_example_of_its_own_and_the_past_has_no_thoughts(z1: ChatTemplate) -> None:
    conversation = dialogue(("user", "q"), ("reply", REASONED), ("user", "r"), ("reply", "b"))
    assert examples(z1, conversation) == [
        PROMPT + "«\n先想。\n</think>\n\n答<|user|>»",
        "[gMASK]<sop><|user|>\nq<|assistant|>\n答<|user|>\nr<|assistant|>\n<think>"
        "«\n\n</think>\n\nb<|user|>»",
    ]
    assert examples(z1, conversation, "last_reply") == examples(z1, conversation)[1:]
    masked = replace(conversation.messages[3], train=False)
    without = replace(conversation, messages=(*conversation.messages[:3], masked))
    assert examples(z1, without) == examples(z1, conversation)[:1]
    assert examples(z1, without, "last_reply") == []


def test_a_document_is_one_example_and_a_users_metadata_is_not_written(z1: ChatTemplate) -> None:
    document = Conversation((), text="once")
    assert examples(z1, document) == ["[gMASK]<sop>«once<|endoftext|>»"]
    named = Conversation((Message("user", "q", "somebody"), Message("assistant", REASONED)))
    assert examples(z1, named) == [PROMPT + "«\n先想。\n</think>\n\n答<|user|>»"]


def test_calls_are_trained_behind_the_thought_and_further_ones_as_the_model_goes_on(
    z1: ChatTemplate,
) -> None:
    conversation = dialogue(
        ("user", "q"), ("call", '<think>so</think>{"a": 1}', "f"), ("call", "{}", "f"),
        ("tool", "1"), ("tool", "2"), ("reply", "b"),
    )  # fmt: skip
    past = '[gMASK]<sop><|user|>\nq<|assistant|>f\n{"a": 1}<|assistant|>f\n{}'
    assert examples(z1, conversation) == [
        PROMPT + '«so</think>\n\nf\n{"a": 1}<|assistant|>f\n{}<|observation|>»',
        past + "<|observation|>\n1<|observation|>\n2<|assistant|>\n<think>"
        "«\n\n</think>\n\nb<|user|>»",
    ]


@settings(max_examples=60, deadline=None, database=None)
@given(conversation=dialogues(plain_text))
def test_the_prompt_of_every_reply_with_loss_is_a_prefix_of_its_example(
    z1: ChatTemplate, conversation: Conversation
) -> None:
    asked = 0
    for part, rendered in z1.examples([conversation], "every_reply")[0]:
        ids = rendered.input_ids.tolist()
        for index, start, end in rendered.replies:
            if not part.messages[index].train:
                continue
            asked += 1
            assert ids[:start] == z1.prompt(conversation, index)
            said, message = z1.parse(ids[start:end]), conversation.messages[index]
            if message.metadata:
                assert said.metadata == message.metadata or not message.content.startswith("{")
            else:  # a text that spells a call has the tokens of one
                name = said.metadata and f"{said.metadata}\n"
                assert name + said.content == message.content.strip()
    assert asked == sum(m.role == "assistant" for m in conversation.messages)


def test_what_follows_the_prompt_is_parsed_back(z1: ChatTemplate) -> None:
    for content, metadata in ((REASONED, ""), ("答", ""), ('{"a": 1}', "f")):
        conversation = Conversation((Message("user", "q"), Message("assistant", content, metadata)))
        _, rendered = z1.examples([conversation], "every_reply")[0][0]
        generated = rendered.input_ids.tolist()[len(z1.prompt(conversation, 1)) :]
        assert z1.parse(generated) == conversation.messages[1]
        pieces = []
        stream = ReplyStream(z1, TOOLS)
        for token in generated:
            pieces += stream.take(token)
        pieces += stream.finish()
        assert "".join(piece.text for piece in pieces) == content
        assert [piece.name for piece in pieces if piece.name] == ([metadata] if metadata else [])
    assert z1.visible(Message("assistant", REASONED)) == "答"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\nWhy?</think>\n\nf\n{}", ("<think>\nWhy?</think>", ["f"])),
        ("\nWhy?</think>\n\nf is it", ("<think>\nWhy?</think>\n\nf is it", [])),
        ("\n\n</think>\n\nf", ("f", [])),
        ("\n\n", ("<think>\n\n", [])),
        ("\n a </thin", ("<think>\n a </thin", [])),
    ],
)
def test_a_thought_is_shown_as_it_comes_and_a_call_behind_it_found(
    z1: ChatTemplate, text: str, expected: tuple[str, list[str]]
) -> None:
    stream, pieces = ReplyStream(z1, TOOLS), []
    for token in z1.tokenizer.plain.encode(text, add_special_tokens=False).ids:
        pieces += stream.take(token)
    pieces += stream.finish()
    said = "".join(piece.text for piece in pieces if piece.call is None)
    assert (said, [piece.name for piece in pieces if piece.name]) == expected


def test_the_reference_of_a_call_is_its_arguments(z1: ChatTemplate) -> None:
    conversation = dialogue(("user", "q"), ("call", '<think>so</think>\n\n{"a": 1}', "f"))
    assert reply_prompts([conversation], z1)[0].reference.content == '{"a": 1}'


ROWS = (
    {
        "messages": [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": "9."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "<think>\nTwo.\n</think>\n4"},
            {"role": "user", "content": "3+3?"},
            {"role": "assistant", "content": "6", "reasoning_content": "Three."},
        ]
    },
)


def test_rows_with_and_without_reasoning_are_all_asked_as_they_were_trained(
    folder: Path, z1: ChatTemplate, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    source = [SourceSpec(str(file))]
    data = load_examples(source, z1, LengthPolicy(200), cache_root=tmp_path / "cache")
    assert len(data) == 3
    assert (data.counts.rows, data.counts.kept) == (2, 3)
    assert data.counts.notes() == [
        "1 of 3 turns with loss have no reasoning and are trained behind an empty thought; "
        "data.reasoning: require refuses replies without"
    ]
    trained = [data[n] for n in range(3)]
    asked = reply_prompts(list(read_conversations(source)), z1)
    for example, prompt in zip(trained, asked, strict=True):
        first = int((example.labels != -100).argmax())
        assert example.input_ids[:first].tolist() == list(prompt.prompt_ids)
    printed = list(tokens(str(file), folder))
    assert [row["input_ids"] for row in printed] == [e.input_ids.tolist() for e in trained]
    shown = show(str(file), model=folder, index=1)
    assert (shown.num_examples, shown.prompt) == (2, z1.decode(asked[2].prompt_ids))
    assert shown.plain().replace("«", "").startswith(shown.prompt)
    report = check(str(file), model=folder)
    assert [note.partition(": ")[2] for note in report.notes()] == data.counts.notes()


def test_reasoning_of_a_message_with_calls_stands_before_the_first(z1: ChatTemplate) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    thought = {"role": "assistant", "reasoning_content": "so", "tool_calls": [call, call]}
    from finetune.data.dialogue.formats import RowRules, to_conversation

    row = {"messages": [{"role": "user", "content": "q"}, thought], "tools": list(TOOLS)}
    first, second = to_conversation(row, rules=RowRules(thinks=True)).messages[1:]
    assert thinking.split(first.content).thought == "\nso\n"
    assert (first.metadata, second.content) == ("f", "{}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>a</think><answer>b</answer>", "[<think>]a[</think>][<answer>]b[</answer>]"),
        (" <think></think>\n<answer></answer> ", " [<think>][</think>]\n[<answer>][</answer>] "),
        ("<think>a</think>b", "[<think>]a[</think>]b"), ("<answer>b</answer>", "[<answer>]b[</answer>]"),
        ("x<answer>b</answer>", "x<answer>b</answer>"), ("<think>a</think><answer>b", "[<think>]a[</think>]<answer>b"),
        ("<answer>a</answer>b</answer>", "[<answer>]a</answer>b[</answer>]"), ("<answer>a</answer>b", "<answer>a</answer>b"),
        ("<think>a</think>b</think>", "[<think>]a[</think>]b</think>"), ("<think>a\nb", "<think>a\nb"), ("", ""),
    ],
)  # fmt: skip
def test_tags_of_a_reply_are_those_that_it_begins_and_ends_with(text: str, parts: str) -> None:
    found = thinking.spoken_parts(text)
    assert "".join(f"[{part.text}]" if part.is_tag else part.text for part in found) == parts
    assert all(part.text for part in found)


@pytest.mark.parametrize(
    ("content", "thought", "said"),
    [
        ("a", "", "a"), (" <think>x</think>y", "x", "y"), (" x</think> y", " x", " y"), ("a</think>b</think>c", "a</think>b", "c"),
        ("<think>", "", "<think>"),
    ],
)  # fmt: skip
def test_a_reply_is_cut_behind_its_last_thought(content: str, thought: str, said: str) -> None:
    assert thinking.split(content) == (thought, said)


def test_a_turn_begins_behind_the_last_message_that_is_not_the_models() -> None:
    messages = dialogue(("user", "q"), ("call", "{}", "f"), ("reply", "a"), ("user", "r")).messages
    assert [thinking.turn_start(messages, stop) for stop in range(5)] == [None, None, 1, 1, None]
    assert thinking.turn_start(messages[1:], 2) == 0
    reply = Message("assistant", "a")
    for train, policy, is_last, trained in (
        (None, "every_reply", False, True), (None, "last_reply", False, False), (None, "last_reply", True, True),
        (True, "last_reply", False, True), (False, "every_reply", True, False),
    ):  # fmt: skip
        assert thinking.is_trained(replace(reply, train=train), is_last, policy) is trained


def test_the_beginning_of_a_thoughts_end_is_held_until_it_is_known() -> None:
    thought = _Thought(offers_tools=False)
    assert thought.take("<think>\nabc</th") == ("<think>\nabc", None)
    assert thought.take("x</t") == ("</thx", None)
    assert thought.take("hink>\n\nd") == ("</think>\n\nd", None)
    assert thought.rest() == ""


THOUGHTS = [
    ("<think>\nabc</think>\n\nd", "<think>\nabc</think>\n\nd", None), ("<think>\n\n</think>\n\nd", "d", None), ("<think></think>d", "d", None),
    ("<think>a</think>\n\nf\n{}", "<think>a</think>", ("f", "{}")), ("<think> </think>\n\nf\n{}x", "", ("f", "{}x")), ("<think>a</think>\n\nf g\n{}", "<think>a</think>\n\nf g\n{}", None),
    ("<think>a</think>\n\nf\nwords", "<think>a</think>\n\nf\nwords", None), ("<think>a</th", "<think>a</th", None), ("<think>a", "<think>a", None),
    ("plain <b> and </b>", "plain <b> and </b>", None), ("<think>a</think>", "<think>a</think>", None), ("<think>\n </think>", "", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "shown", "call"), THOUGHTS, ids=[one[0] for one in THOUGHTS])
def test_however_a_thought_comes_it_is_shown_alike_and_nothing_too_early(
    text: str, shown: str, call: tuple[str, str] | None
) -> None:
    """The prompt's own tag, and pieces of one to five characters: what is shown is never taken back."""
    opening = "<think>" if text.startswith("<think>") else ""
    for size in range(1, 6):
        thought, said, found = _Thought(offers_tools=True), "", None
        pieces = [text[at : at + size] for at in range(len(opening), len(text), size)]
        for piece in [opening, *pieces] if opening else pieces:
            if found is not None:
                found = (found[0], found[1] + piece)
                continue
            more, found = thought.take(piece)
            said += more
            assert shown.startswith(said), (said, size)
        rest = thought.rest() if found is None else ""
        assert (said + rest, found) == (shown, call), size


def test_what_is_no_thoughts_end_is_shown_at_once_and_no_call_without_tools() -> None:
    thought = _Thought(offers_tools=False)
    assert [thought.take(piece)[0] for piece in ("<think>\nab", "c", "d <", "/x")] == ["<think>\nab", "c", "d ", "</x"]  # fmt: skip
    plain = _Thought(offers_tools=False)
    assert plain.take("<think>a</think>\n\nf\n{}") == ("<think>a</think>\n\nf\n{}", None)
    over = _Thought(offers_tools=True)
    over.take("<think>a</think>\n\nnot a call,")
    assert over.take("f\n{}") == ("f\n{}", None), (
        "behind the first words of a text there is no call"
    )
