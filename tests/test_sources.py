"""Sources to dialogues: one report of all bad rows, layouts by file, weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rows import turns

from finetune.data.reading.files import BadRow
from finetune.data.reading.sources import Reading, SourceSpec, read_conversations, weighted
from finetune.errors import DataError

GOOD = json.dumps({"messages": turns("Q", "A")})


def source(folder: Path, name: str, rows: list[str]) -> str:
    path = folder / name
    path.write_text("\n".join(rows), encoding="utf-8")
    return str(path)


def prompts(stream: Any) -> list[str]:
    return [conversation.messages[0].content for conversation in stream]


def pair(number: int) -> str:
    return json.dumps({"prompt": str(number), "response": "A"})


def test_all_bad_rows_of_all_files_are_in_one_report(tmp_path: Path) -> None:
    first = source(tmp_path, "a.jsonl", [pair(1), "x", pair(2), '{"prompt": "Q"}'])
    second = source(tmp_path, "b.jsonl", [GOOD, '{"messages": 3}'])
    stream = read_conversations([SourceSpec(first), SourceSpec(second)])
    with pytest.raises(DataError) as error:
        list(stream)
    assert str(error.value) == "\n".join(
        [
            "3 of 6 rows cannot be used:",
            f"  {first}:2: not JSON at column 1: Expecting value",
            f"  {first}:4: the row has no pair of columns prompt/response or prompt/completion or "
            "content/summary or question/answer or query/response or query/answer or "
            "question/response or source/target or input/output or input/target or user/assistant; its columns are 'prompt'",
            f"  {second}:2: messages: is a number, not a list of messages",
            "Fix these rows; a training run with data.on_bad_row: skip leaves them out.",
        ]
    )


def test_a_long_list_of_bad_rows_is_capped_but_counted(tmp_path: Path) -> None:
    path = source(tmp_path, "a.jsonl", [pair(0)] + ["x"] * 500)
    with pytest.raises(DataError, match=r"500 of 501 rows") as error:
        list(read_conversations([SourceSpec(path)]))
    assert "… and 470 more" in str(error.value)


def test_skipped_rows_are_counted_and_named(tmp_path: Path) -> None:
    path = source(tmp_path, "a.jsonl", [pair(0), "x", pair(2), pair(3)])
    stream = read_conversations([SourceSpec(path)], Reading("skip", 0.25))
    assert prompts(stream) == ["0", "2", "3"]
    assert (stream.rows, stream.num_bad, stream.formats) == (4, 1, {path: "pairs"})
    assert stream.bad_rows == [BadRow(f"{path}:2", "not JSON at column 1: Expecting value")]


def test_more_bad_rows_than_allowed_stop_the_run_all_the_same(tmp_path: Path) -> None:
    path = source(tmp_path, "a.jsonl", [pair(0), "x", pair(2), pair(3)])
    with pytest.raises(DataError, match=r"25.0%, more than data.max_bad_rows allows \(24.0%\)"):
        list(read_conversations([SourceSpec(path)], Reading("skip", 0.24)))


def test_a_file_that_cannot_be_read_to_its_end_is_never_skipped(tmp_path: Path) -> None:
    path = source(tmp_path, "a.json", [f"[{GOOD},", GOOD])
    with pytest.raises(DataError, match="cannot be skipped"):
        list(read_conversations([SourceSpec(path)], Reading("skip", 0.99)))


def test_a_layout_that_is_not_known_is_told_with_the_columns(tmp_path: Path) -> None:
    path = source(tmp_path, "a.jsonl", ['{"body": "…"}'] * 30)
    with pytest.raises(DataError, match=r"a.jsonl:1: the layout is not known .*\('body'\)"):
        list(read_conversations([SourceSpec(path)]))


def test_each_file_of_a_folder_has_its_own_layout(tmp_path: Path) -> None:
    source(tmp_path, "a.jsonl", [pair(1)])
    source(tmp_path, "b.json", [f"[{GOOD}]"])
    stream = read_conversations([SourceSpec(str(tmp_path))])
    assert prompts(stream) == ["1", "Q"]
    assert list(stream.formats.values()) == ["pairs", "messages"]


@pytest.mark.parametrize(
    ("weight", "copies"), [(1.0, {1}), (2.0, {2}), (3.0, {3}), (0.5, {0, 1}), (2.5, {2, 3})]
)
def test_a_weight_repeats_rows_and_a_fraction_takes_a_seeded_share(
    tmp_path: Path, weight: float, copies: set[int]
) -> None:
    path = source(tmp_path, "a.jsonl", [pair(n) for n in range(1200)])
    spec = [SourceSpec(path, weight=weight)]
    found = prompts(read_conversations(spec, seed=1))
    assert len(found) == 1200 * weight
    assert {found.count(str(n)) for n in range(0, 1200, 20)} == copies
    assert found == prompts(read_conversations(spec, seed=1))
    assert (found == prompts(read_conversations(spec, seed=2))) == (weight == int(weight))


@pytest.mark.parametrize(("num", "weight", "expected"), [(10, 0.5, 5), (3, 0.1, 0), (7, 0.1, 1), (1024 * 3 + 1, 0.25, 768), (1024 * 10, 0.0003, 3)])  # fmt: skip
def test_a_fraction_of_the_rows_is_exact(num: int, weight: float, expected: int) -> None:
    assert sum(1 for _ in weighted(range(num), weight, "0")) == expected


def test_a_missing_path_is_reported_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_conversations([SourceSpec(str(tmp_path / "none.jsonl"))])


def test_images_are_found_beside_their_data_file(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Q", "image": "images/1.png"}, {"role": "assistant", "content": "A"}]}  # fmt: skip
    path = source(tmp_path, "a.jsonl", [json.dumps(row)])
    (conversation,) = read_conversations([SourceSpec(path)])
    assert conversation.images == (f"{tmp_path}/images/1.png",)
