"""What `data check` and `data show` say of data, number by number."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from examples import tiny_template
from hints import said
from PIL import Image
from row_parts import CALL, REPLY, RESULT, SYSTEM, THOUGHT, USER, reply, user

from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage
from finetune.data.preview import report, show
from finetune.data.preview.report import CheckReport, Lengths, SourceReport, check
from finetune.data.preview.show import ShownToken, ShowResult
from finetune.data.reading.files import BadRow
from finetune.data.reading.sources import Reading, SourceSpec, read_conversations


def write(path: Path, *rows: Any) -> str:
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def of(name: str, number: int) -> dict[str, Any]:
    """A source whose counts are all different, from `number` on."""
    counts = [
        "rows", "bad_rows", "dialogues", "turns", "replies", "masked_replies", "calls", "results", "system_messages",
        "images", "dialogues_with_tools", "tools", "undeclared_calls", "calls_in_words", "characters", "duplicates",
        "seen_before", "texts", "turns_with_loss", "without_thought",
    ]  # fmt: skip
    return {"path": name, **{count: number + n for n, count in enumerate(counts)}}


LENGTHS = Lengths(1000, 250, 51, 52, 53, 54, 55, 7)
FULL = SourceReport(
    **of("a.jsonl", 101), formats={"x": "pairs", "y": "messages", "z": "pairs"}, lengths=LENGTHS,
    languages={"Chinese": 3, "Korean": 2}, unread={"notes": 4}, doubts={"odd": 5},
)  # fmt: skip
EMPTY = SourceReport(
    **{name: 0 if name != "path" else "b.jsonl" for name in of("", 0)}, formats={}, lengths=None, languages={}, unread={},
    doubts={},
)  # fmt: skip


def test_every_line_of_the_table_has_its_own_number() -> None:
    headers, lines = CheckReport((FULL, EMPTY), (), max_length=64).table()
    assert headers == ["", "a.jsonl", "b.jsonl"]
    assert {name: value for name, value, _ in lines} == {
        "layout": "messages, pairs", "files": "3", "rows": "101", "bad rows": "102", "dialogues": "103", "of them plain text": "118",
        "user turns": "104", "replies": "105", "tool calls": "107", "tool results": "108", "system messages": "109",
        "replies without loss": "106", "images": "110", "dialogues with tools": "111", "different tools": "112",
        "characters": "115", "languages": "Chinese 3, Korean 2", "duplicates": "116", "also in an earlier source": "117",
        "tokens": "1000", "supervised": "25.0%", "tokens, shortest": "51", "tokens, median": "52", "tokens, p90": "53",
        "tokens, p99": "54", "tokens, longest": "55", "over 64 tokens": "7",
    }  # fmt: skip
    assert {value for *_, value in lines} == {"0", ""}
    assert CheckReport((EMPTY,), ()).table()[1] == []
    some = CheckReport((EMPTY, replace(EMPTY, images=1)), ()).table()[1]
    assert some == [["images", "0", "1"]]
    assert "over 64 tokens" not in {name for name, *_ in CheckReport((FULL,), ()).table()[1]}
    assert replace(LENGTHS, tokens=0).supervised_share == 250


def test_every_count_that_deserves_a_second_look_has_its_sentence() -> None:
    assert CheckReport((FULL, EMPTY), (), max_length=64).notes() == [
        f"a.jsonl: {note}"
        for note in (
            "notes: what 4 rows hold there is not read; data.ignore_columns says that it is meant",
            "5 × odd",
            "120 of 119 turns with loss have no reasoning and are trained behind an empty thought; data.reasoning: require refuses replies without",
            "117 dialogues are in an earlier source too; scores on them say nothing",
            "116 dialogues repeat an earlier one of the same source",
            "114 replies write a call into their text and a tool answers; they teach the model to end plain text with <|observation|>",
            "113 calls name a tool that their dialogue does not define",
            "7 dialogues are over 64 tokens",
        )
    ]  # fmt: skip
    short = replace(EMPTY, lengths=replace(LENGTHS, over_max_length=0))
    assert CheckReport((short, replace(short, lengths=None)), (), max_length=64).notes() == []


def test_a_report_for_programs_has_all_of_it() -> None:
    bad = (BadRow("a:1", "no"), BadRow("b:2", "end", fatal=True))
    found = CheckReport((FULL, EMPTY), bad, max_length=64).as_dict()
    assert list(found) == ["sources", "bad_rows", "num_bad", "max_length"]
    assert found["bad_rows"] == [
        {"where": "a:1", "reason": "no", "fatal": False}, {"where": "b:2", "reason": "end", "fatal": True},
    ]  # fmt: skip
    assert (found["num_bad"], found["max_length"]) == (102, 64)
    assert found["sources"][0]["lengths"]["p90"] == 53


def test_each_kind_of_message_and_mark_is_counted_as_itself(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    tools = [{"name": "f"}, {"name": "g"}]
    other = {**CALL, "metadata": "h", "train": False}
    picture = {"role": "user", "content": "look", "images": ["a.png", "a.png", "a.png"]}
    wordy = {"role": "assistant", "content": 'f {"a": 1}'}
    rows = [
        {"messages": [SYSTEM, USER, CALL, CALL, other, other, RESULT, {**REPLY, "weight": 0}, picture, REPLY], "tools": tools},
        {"messages": [USER, wordy, RESULT, REPLY, USER, {**REPLY, "train": False}], "tools": tools[:1]},
        {"messages": [USER, CALL, RESULT, REPLY]},
        {"messages": [USER, REPLY]}, {"messages": [USER, REPLY]}, {"messages": [USER, REPLY]}, {"messages": [USER]},
    ]  # fmt: skip
    file = write(tmp_path / "a.jsonl", *rows)
    texts = write(tmp_path / "b.jsonl", {"text": "привет"}, {"text": "早上好"}, {"text": "晚上好"})
    first, second = check([file, texts]).sources
    found = {name: value for name, value in vars(first).items() if isinstance(value, int)}
    assert found == {
        "rows": 7, "bad_rows": 1, "dialogues": 6, "turns": 8, "replies": 9, "masked_replies": 4, "calls": 5, "results": 3,
        "system_messages": 1, "images": 3, "dialogues_with_tools": 2, "tools": 2, "undeclared_calls": 3, "calls_in_words": 1,
        "characters": 1 + 7 + 4 + 10 + 8 + 10 + 3, "duplicates": 2, "seen_before": 0, "texts": 0, "turns_with_loss": 0,
        "without_thought": 0,
    }  # fmt: skip
    assert (second.texts, second.characters, second.dialogues) == (3, 6 + 3 + 3, 3)
    assert list(second.languages.items()) == [("Chinese", 2), ("Cyrillic script", 1)]


def test_reasons_are_kept_for_each_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "KEPT_REASONS", 2)
    one, two = (write(tmp_path / name, "x", "y", "z", {"messages": [USER, REPLY]}) for name in "ab")
    found = check([one, two])
    assert [row.location for row in found.bad_rows] == [f"{one}:1", f"{one}:2", f"{two}:1", f"{two}:2"]  # fmt: skip
    assert found.num_bad == 6


def test_more_dialogues_than_are_taken_at_once_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_BATCH", 2)
    rows = [{"prompt": f"Q{n}", "response": "A"} for n in range(5)]
    assert check(write(tmp_path / "a.jsonl", *rows)).sources[0].dialogues == 5


def test_lengths_are_told_by_their_ranks() -> None:
    census = report._Census(None, 150)
    census.lengths, census.supervised = array("i", range(200, 0, -1)), 99
    found = census._lengths()
    assert found == Lengths(20_100, 99, 1, 100, 180, 198, 200, 50)
    assert report._Census(None, None, lengths=array("i", [3]))._lengths().over_max_length is None


BASE = Conversation((user("Q"), reply("{}", metadata="f"), Message("observation", "o"), reply()))


def with_message(number: int, **changes: Any) -> Conversation:
    messages = list(BASE.messages)
    messages[number] = replace(messages[number], **changes)
    return replace(BASE, messages=tuple(messages))


OTHERS = {
    "content": with_message(0, content="R"), "role": with_message(0, role="system"), "a call's name": with_message(1, metadata="g"),
    "images": with_message(0, images=(ShownImage("a"),)), "tools": replace(BASE, tools=({"type": "python"},)),
    "thinking": replace(BASE, thinks=True), "no thinking": replace(BASE, thinks=False), "text": replace(BASE, text="x"),
    "order": replace(BASE, messages=BASE.messages[::-1]), "fewer": replace(BASE, messages=BASE.messages[:2]),
}  # fmt: skip


def test_dialogues_are_the_same_by_what_the_model_sees() -> None:
    digests = {name: report._digest(other) for name, other in OTHERS.items()}
    assert len({*digests.values(), report._digest(BASE)}) == len(OTHERS) + 1
    tools = replace(BASE, tools=({"type": "cogview"},))
    assert report._digest(tools) != digests["tools"]
    for same in (
        replace(BASE, location="f:1", unread=("x",), doubts=("y",), category="z"),
        with_message(3, train=False, weight=0.5),
    ):
        assert report._digest(same) == report._digest(BASE)
    shown = with_message(0, images=(ShownImage("a", 0, marked=True),))
    assert report._digest(shown) == digests["images"]


def test_a_language_is_told_by_the_beginning_of_what_both_sides_say() -> None:
    def language(*messages: Message) -> str:
        return report._language(messages)

    assert language(user("a" * 400 + "你好" * 900)) == "Latin script"
    assert language(user("a" * 390), reply("好" * 400)) == "Latin script"
    assert language(Message("system", "你好" * 90), user("hello"), reply("hi")) == "Latin script"
    assert language(user("ok"), reply("你好")) == "Chinese"
    assert language(Message("observation", "你好" * 90), user("hello")) == "Latin script"
    assert language(user("12345678 你")) == "Chinese"  # digits are no letters
    assert language(user("abcd 你")) == "Latin script"
    assert language(user("ab 你好")) == "Chinese"
    assert language(user("ab 你")) == "Latin script"


# --- show ----------------------------------------------------------------------------------------


def piece(text: str, *, learned: bool = False, control: bool = False) -> ShownToken:
    return ShownToken((1,), text, learned, control)


def result(*tokens: ShownToken) -> ShowResult:
    return ShowResult("f:1", "pairs", 1, len(tokens), sum(t.supervised for t in tokens), tokens, "p", "s")  # fmt: skip


def test_what_carries_loss_is_marked_in_text_and_colour() -> None:
    tokens = [
        piece("<|user|>", control=True), piece("a\nb"), piece("c", learned=True), piece("d\n", learned=True),
        piece("e"), piece("<|user|>", learned=True, control=True),
    ]  # fmt: skip
    shown = result(*tokens)
    assert shown.plain() == "<|user|>a\nb«cd\n»e«<|user|>»"
    assert result(*tokens[:2]).plain() == "<|user|>a\nb"
    assert result(*tokens[:5]).plain().endswith("«cd\n»e")
    coloured = shown.text()
    assert coloured.plain == "<|user|>a⏎\nbcd⏎\ne<|user|>"
    assert [span.style for span in coloured.spans] == [
        "bright_black bold", "white", "green", "bright_green", "bright_black", "bright_green bold",
    ]  # fmt: skip
    assert list(shown.as_dict()) == [
        "where", "format", "num_examples", "num_tokens", "num_supervised", "tokens", "prompt", "stop",
    ]  # fmt: skip
    assert shown.as_dict()["where"] == "f:1"


def test_spans_that_touch_are_one() -> None:
    assert show.merged(iter([(1, 2), (2, 4), (5, 6), (6, 7), (9, 9)])) == [[1, 4], [5, 7], [9, 9]]
    assert show.merged(iter([])) == []


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return tiny_template(tmp_path_factory.mktemp("tokenizer"))


def test_a_character_of_several_tokens_is_one_piece_on_either_side_of_the_loss(
    template: ChatTemplate,
) -> None:
    rare = "龘"
    talk = Conversation((user(f"a{rare}"), reply(f"{rare}b")), location="f:1")
    shown = show.shown(talk, template, "pairs")
    texts = {token.text: token for token in shown.tokens}
    pieces = [token for token in shown.tokens if token.text == rare]
    assert [(len(token.ids) > 1, token.supervised) for token in pieces] == [(True, False), (True, True)]  # fmt: skip
    assert (texts["<|user|>"].control, texts["<|assistant|>"].control) == (True, True)
    assert not texts["a"].control
    ids = [token for piece in shown.tokens for token in piece.ids]
    assert ids == template.render([talk])[0].input_ids.tolist()
    assert (shown.num_tokens, shown.location, shown.format) == (len(ids), "f:1", "pairs")
    assert shown.num_supervised == sum(len(token.ids) for token in shown.tokens if token.supervised)
    half = ids[
        : ids.index(pieces[0].ids[0]) + 1
    ]  # a character that is never whole comes as far as it goes
    broken = list(show._pieces(half, [False] * len(half), template))
    assert [token for piece in broken for token in piece.ids] == half
    assert broken[-1].text.endswith("\N{REPLACEMENT CHARACTER}")
    cut = [*half, template.tokenizer.control_ids["<|user|>"]]
    pieces = list(show._pieces(cut, [False] * len(cut), template))
    assert (pieces[-1].text, pieces[-1].control) == ("<|user|>", True)


def test_a_dialogue_that_is_not_there_is_told_with_what_is(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "response": "A"} for n in range(12)]
    file = write(tmp_path / "a.jsonl", *rows, "x")

    def stream() -> Any:
        return read_conversations([SourceSpec(file)], Reading("collect"))

    assert show._at_index(stream(), file, 11).messages[0].content == "Q11"
    assert show._at_index(stream(), file, 0).messages[0].content == "Q0"
    few = said(show._at_index, stream(), file, 12)
    assert few.startswith(f"{file} has no dialogue 12; it has 12; give an --index from 0 on. 1 of 13 rows")  # fmt: skip
    assert show._at_line(stream(), file, 1).messages[0].content == "Q0"
    assert show._at_line(stream(), file, 11).messages[0].content == "Q10"
    assert said(show._at_line, stream(), file, 13).startswith(f"{file}:13: not JSON")
    assert said(show._at_line, stream(), file, 14) == (
        f"{file} has no row that begins on line 14; give the line of another row"
    )
    good = write(tmp_path / "b.jsonl", *rows[:2])
    whole = read_conversations([SourceSpec(good)], Reading("collect"))
    assert said(show._at_index, whole, good, 2) == f"{good} has no dialogue 2; it has 2; give an --index from 0 on"  # fmt: skip


def test_a_broken_character_never_stands_on_both_sides_of_the_loss(template: ChatTemplate) -> None:
    ids = template.tokenizer.plain.encode("龘", add_special_tokens=False).ids
    assert len(ids) > 1
    pieces = list(show._pieces(ids, [False, *[True] * (len(ids) - 1)], template))
    assert [(len(piece.ids), piece.supervised) for piece in pieces] == [(1, False), (len(ids) - 1, True)]  # fmt: skip


def test_rows_are_looked_at_for_the_checkpoint_that_is_named(
    tmp_path: Path, tiny_chatglm: Path
) -> None:
    file = write(tmp_path / "a.jsonl", {"messages": [USER, THOUGHT]}, {"messages": [USER, REPLY]})
    assert check(file).num_bad == 0
    (bad,) = check(file, model=tiny_chatglm).bad_rows
    assert "this checkpoint does not think" in bad.reason
    assert "this checkpoint does not think" in said(show.show, file, model=tiny_chatglm, line=1)
    assert "this checkpoint does not think" in said(list, show.tokens(file, tiny_chatglm))
    write(tmp_path / "b.jsonl", {"prompt": "Q", "response": "A"})
    assert show.show(f"{tmp_path}/*.jsonl", model=tiny_chatglm, index=1).format == "pairs"
    assert show.show(f"{tmp_path}/*.jsonl", model=tiny_chatglm).format == "messages"


def test_the_last_reply_is_asked_and_stops_as_it_is_trained(template: ChatTemplate) -> None:
    talk = Conversation((user("one"), reply("two"), user("three"), reply("four")), location="f:1")
    shown = show.shown(talk, template, "x")
    whole = "".join(token.text for token in shown.tokens)
    assert (whole, shown.stop) == (f"{shown.prompt}\nfour<|user|>", "<|user|>")
    called = Conversation((user("one"), reply("{}", metadata="f"), Message("observation", "o"), reply("four")))  # fmt: skip
    assert show.shown(called, template, "x").stop == "<|user|>"
    text = show.shown(Conversation((), text="one two", location="f:2"), template, "text")
    assert (text.prompt, text.stop, text.num_examples) == ("[gMASK]<sop>", "<|endoftext|>", 1)
    assert "".join(token.text for token in text.tokens) == "[gMASK]<sop>one two<|endoftext|>"
