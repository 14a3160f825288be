"""Rows as people reported them, through the commands: what a user sees of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from dialogues import Z1_TEMPLATE
from PIL import Image
from pyarrow import parquet
from row_parts import REPLY

from finetune import cli

QUESTION = {"role": "user", "content": "<image>\nWhich colour?"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "room_state",
        "description": "State of a room",
        "parameters": {"type": "object", "properties": {"room": {"type": "string"}}},
    },
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def run(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[object, str, str]:
    """Exit code, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return ended.value.code or 0, *capfd.readouterr()


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def token_rows(capfd: pytest.CaptureFixture[str], file: Path, model: Path) -> list[Any]:
    code, out, err = run(capfd, "data", "tokens", file, "--model", model)
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_images_in_parquet_are_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    image = {"bytes": (tmp_path / "red.png").read_bytes(), "path": None}
    rows = [
        {"messages": [QUESTION, REPLY], "images": [image]},
        {"image": image, "question": "Which colour?", "answer": "Red."},
    ]
    for row in rows:
        parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        code, out, _ = run(capfd, "data", "check", tmp_path / "a.parquet", "--json")
        assert (code, json.loads(out)["sources"][0]["images"]) == (0, 1)


def test_a_placeholder_behind_the_question_and_a_path_under_a_root_are_taken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows").mkdir()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    behind = {"role": "user", "content": "Which colour?\n<image>"}
    row = {"messages": [behind, REPLY], "images": [str(tmp_path / "red.png")]}
    file = write(tmp_path / "rows" / "a.jsonl", row)
    assert run(capfd, "data", "check", file)[0] == 2
    code, out, _ = run(capfd, "data", "check", file, "--image-root", tmp_path, "--json")
    assert (code, json.loads(out)["sources"][0]["images"]) == (0, 1)


def test_an_image_that_a_row_lost_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", {"messages": [QUESTION, REPLY], "images": []})
    code, _, err = run(capfd, "data", "check", file)
    assert code == 0
    assert "1 × an image's placeholder or path in a text, where it is text" in err


def test_the_nulls_of_a_table_change_nothing(
    tmp_path: Path, tiny_chatglm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def row(**absent: Any) -> dict[str, Any]:
        properties = WEATHER["function"]["parameters"]["properties"] | absent  # type: ignore[index]
        parameters = {"type": "object", "properties": properties}
        function = {**WEATHER["function"], "parameters": parameters}  # type: ignore[dict-item]
        call = {"name": "room_state", "arguments": {"room": "3", **absent}}
        return {
            "tools": [{"type": "function", "function": function}],
            "messages": [
                {"role": "user", "content": "Is room 3 free?"},
                {"role": "assistant", "content": None, "tool_calls": [{"function": call}]},
                {"role": "tool", "content": "free"},
                REPLY,
            ],
        }

    nulls = write(tmp_path / "nulls.jsonl", row(day=None))
    plain = write(tmp_path / "plain.jsonl", row())
    assert token_rows(capfd, nulls, tiny_chatglm) == token_rows(capfd, plain, tiny_chatglm)


def test_a_call_without_its_result_is_named_with_its_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = [{"id": i, "function": {"name": "room_state", "arguments": "{}"}} for i in ("a", "b")]
    file = write(tmp_path / "a.jsonl", {
        "tools": [WEATHER],
        "messages": [
            {"role": "user", "content": "Rooms 1 and 2?"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "a", "content": "free"},
            REPLY,
        ],
    })  # fmt: skip
    code, _, err = run(capfd, "data", "check", file)
    assert code == 2
    assert f"{file}:1: the call 'b' before message 3 has no result" in err


def test_replies_under_a_thinking_checkpoint_begin_as_their_prompts_do(
    tmp_path: Path, tiny_glm4: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "z1"
    model.mkdir()
    for file in tiny_glm4.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "chat_template.jinja").write_text(Z1_TEMPLATE, encoding="utf-8")
    thought = {"role": "assistant", "content": "<think>\nTwo.\n</think>\n4"}
    asked = {"role": "user", "content": "2+2?"}
    rows = [{"messages": [asked, REPLY]}, {"messages": [asked, thought, asked, thought]}]
    file = write(tmp_path / "a.jsonl", *rows)
    assert len(token_rows(capfd, file, model)) == 3
    for index in (0, 1):
        words = ("data", "show", file, "--model", model, "--index", index, "--json")
        code, out, err = run(capfd, *words)
        assert code == 0, err
        shown = json.loads(out)
        whole = "".join(token["text"] for token in shown["tokens"])
        learned = "".join(token["text"] for token in shown["tokens"] if token["supervised"])
        assert whole == shown["prompt"] + learned
    code, _, err = run(capfd, "data", "check", file, "--model", model)
    assert code == 0
    assert "1 of 3 turns with loss have no reasoning" in err
