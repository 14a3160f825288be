"""`data check`, `data show` and `data tokens`: what they say about data is counted by hand here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.preview.report import check, show, tokens
from finetune.errors import DataError

TOOLS = [{"name": "f"}]
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi", "train": False},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "hi again"},
    ]
}
CALLS: dict[str, Any] = {
    "tools": TOOLS,
    "messages": [
        {"role": "user", "content": "你好，请问今天天气怎么样？"},
        {"role": "assistant", "metadata": "f", "content": "{}"},
        {"role": "assistant", "metadata": "g", "content": "{}"},
        {"role": "observation", "content": "{}"},
        {"role": "assistant", "content": "今天天气很好"},
    ],
}


def write(folder: Path, name: str, rows: list[Any]) -> str:
    path = folder / name
    texts = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)


def test_a_check_counts_what_a_file_holds(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [CHAT, CALLS, "oops", CHAT])
    report = check([path])
    (source,) = report.sources
    assert (source.rows, source.bad_rows, source.dialogues) == (4, 1, 3)
    assert (source.turns, source.replies, source.masked_replies) == (5, 5, 2)
    assert (source.calls, source.results, source.system_messages) == (2, 1, 2)
    assert (source.dialogues_with_tools, source.tools, source.undeclared_calls) == (1, 1, 1)
    assert source.characters == 2 * len("be briefhellohiagainhi again") + 13 + 6 + 6
    assert source.languages == {"Latin script": 2, "Chinese": 1}
    assert (source.duplicates, source.lengths) == (1, None)
    assert source.formats == {path: "messages"}
    assert report.num_bad == 1
    assert [tuple(row) for row in report.bad_rows] == [
        (f"{path}:3", "not JSON at column 1: Expecting value", False)
    ]


def test_a_check_finds_validation_rows_that_are_trained_on(tmp_path: Path) -> None:
    train = write(tmp_path, "train.jsonl", [CHAT, CALLS])
    as_pairs = {"prompt": "hello", "response": "hi"}
    held_out = write(tmp_path, "dev.jsonl", [{**CHAT, "id": 7}, {"messages": [*CHAT["messages"][:2], {"role": "assistant", "content": "hi"}]}])  # fmt: skip
    pairs = write(tmp_path, "more.jsonl", [as_pairs])
    report = check([train, held_out, pairs])
    assert [source.seen_before for source in report.sources] == [0, 1, 0]
    assert any("in an earlier source" in note and "dev.jsonl" in note for note in report.notes())


def test_a_check_never_stops_at_bad_files(tmp_path: Path) -> None:
    broken = write(tmp_path, "a.json", ["[", json.dumps(CHAT), "x"])
    unknown = write(tmp_path, "b.jsonl", [{"body": "…"}])
    good = write(tmp_path, "c.jsonl", [CHAT])
    report = check([broken, unknown, good])
    assert [(s.dialogues, s.bad_rows) for s in report.sources] == [(1, 1), (0, 1), (1, 0)]
    with pytest.raises(DataError, match="does not exist"):
        check([good, str(tmp_path / "none.jsonl")])


def test_a_report_is_plain_json_and_a_table(tmp_path: Path) -> None:
    report = check(write(tmp_path, "a.jsonl", [CHAT, "x"]))
    assert json.loads(json.dumps(report.as_dict()))["sources"][0]["dialogues"] == 1
    headers, lines = report.table()
    assert headers == ["", str(tmp_path / "a.jsonl")]
    assert ["user turns", "2"] in lines
    assert not any(line[0] == "images" for line in lines)


def test_lengths_are_those_of_the_rendered_dialogues(tmp_path: Path, tiny_chatglm: Path) -> None:
    path = write(tmp_path, "a.jsonl", [CHAT, CALLS, CHAT])
    rows = list(tokens(path, tiny_chatglm))
    lengths = sorted(len(row["input_ids"]) for row in rows)
    supervised = sum(end - start for row in rows for start, end in row["trained_spans"])
    (source,) = check([path], model=tiny_chatglm, max_length=lengths[1]).sources
    found = source.lengths
    assert found is not None
    assert (found.shortest, found.median, found.longest) == tuple(lengths)
    assert (found.tokens, found.supervised) == (sum(lengths), supervised)
    assert found.over_max_length == 1


def test_tokens_come_one_row_per_dialogue_with_adjacent_spans_merged(
    tmp_path: Path, tiny_chatglm: Path
) -> None:
    import tiny

    ids = tiny.CONTROL_IDS
    rows = list(tokens(write(tmp_path, "a.jsonl", [CHAT, CALLS]), tiny_chatglm))
    assert [set(row) for row in rows] == [{"input_ids", "trained_spans"}] * 2
    chat, calls = rows
    ((start, end),) = chat["trained_spans"]  # the first reply is masked
    assert (chat["input_ids"][start - 1], chat["input_ids"][end - 1]) == (
        ids["<|assistant|>"],
        ids["<|user|>"],
    )
    assert end == len(chat["input_ids"])
    both_calls, _ = calls["trained_spans"]  # the stop of the first call opens the second
    assert calls["input_ids"][slice(*both_calls)].count(ids["<|assistant|>"]) == 1
    assert calls["input_ids"][both_calls[1] - 1] == ids["<|observation|>"]


def test_bad_rows_are_an_error_for_tokens(tmp_path: Path, tiny_chatglm: Path) -> None:
    path = write(tmp_path, "a.jsonl", [CHAT, "x", {"messages": []}])
    with pytest.raises(DataError, match="2 of 3 rows cannot be used"):
        list(tokens(path, tiny_chatglm))


def test_show_marks_what_carries_loss(tmp_path: Path, tiny_chatglm: Path) -> None:
    path = write(tmp_path, "a.jsonl", [CHAT, CALLS])
    shown = show(path, model=tiny_chatglm, index=0)
    assert shown.plain() == (
        "[gMASK]<sop><|system|>\nbe brief<|user|>\nhello<|assistant|>\nhi"
        "<|user|>\nagain<|assistant|>«\nhi again<|user|>»"
    )
    assert shown.prompt == shown.plain().partition("«")[0]
    assert (shown.stop, shown.location, shown.format) == ("<|user|>", f"{path}:1", "messages")
    assert shown.num_tokens == sum(len(token.ids) for token in shown.tokens)
    assert shown.num_supervised == sum(len(t.ids) for t in shown.tokens if t.supervised)
    assert shown.text().plain.replace("⏎", "") == shown.plain().replace("«", "").replace("»", "")
    json.dumps(shown.as_dict())


def test_show_finds_a_dialogue_by_index_or_by_line(tmp_path: Path, tiny_chatglm: Path) -> None:
    path = write(tmp_path, "a.jsonl", [CHAT, "x", CALLS])
    by_line = show(path, model=tiny_chatglm, line=3)
    assert by_line == show(path, model=tiny_chatglm, index=1)
    assert "「" not in by_line.plain()
    assert "今天天气很好" in by_line.plain()  # characters that tokens share come out whole
    with pytest.raises(DataError, match=r"a.jsonl:2: not JSON"):
        show(path, model=tiny_chatglm, line=2)
    with pytest.raises(DataError, match="no row that begins on line 9"):
        show(path, model=tiny_chatglm, line=9)
    with pytest.raises(DataError, match=r"has no dialogue 5; it has 2; .*:\n.*a.jsonl:2: not JSON"):
        show(path, model=tiny_chatglm, index=5)


def test_tokens_of_the_golden_dialogues_are_the_published_ones(glm4_assets: Path) -> None:
    golden_file = glm4_assets / "golden" / "chat_template.jsonl"
    golden = [json.loads(line) for line in golden_file.read_text(encoding="utf-8").splitlines()]
    rows = list(tokens(str(golden_file), glm4_assets / "assets" / "glm-4-9b-chat"))
    assert len(rows) == len(golden) == 136
    for row, expected in zip(rows, golden, strict=True):
        assert row == {key: expected[key] for key in ("input_ids", "trained_spans")}
