"""Published data and the README's record, row by row."""

from __future__ import annotations

import json
import re
from pathlib import Path

from finetune.data.dialogue.conversation import Conversation, calls_in_words
from finetune.data.dialogue.formats import FORMATS, to_conversation
from finetune.data.reading.sources import SourceSpec, read_conversations


def read(path: Path) -> list[Conversation]:
    return list(read_conversations([SourceSpec(str(path))]))


def test_every_published_row_is_accepted(glm4_assets: Path) -> None:
    data = glm4_assets / "data"
    counts = {
        "advertisegen/train.jsonl": 3000,
        "advertisegen/dev.jsonl": 1070,
        "advertisegen/dev_raw.json": 1070,
        "alpaca/alpaca_zh.json": 1000,
        "toolcall/glaive_zh_sharegpt.json": 300,
        "vision/eye_chart/train.jsonl": 200,
        "vision/eye_chart/dev.jsonl": 50,
    }
    assert {name: len(read(data / name)) for name in counts} == counts


def test_both_forms_of_advertisegen_are_the_same_dialogues(glm4_assets: Path) -> None:
    folder = glm4_assets / "data" / "advertisegen"
    listed, raw = read(folder / "dev.jsonl"), read(folder / "dev_raw.json")
    assert [c.messages for c in listed] == [c.messages for c in raw]


def test_two_published_tool_dialogues_write_a_call_into_a_reply(glm4_assets: Path) -> None:
    found = read(glm4_assets / "data" / "toolcall" / "glaive_zh_sharegpt.json")
    odd = [c for c in found if calls_in_words(c)]
    assert len(odd) == 2
    assert all("AI" in c.messages[calls_in_words(c)[0]].content for c in odd)


def test_published_rows_become_what_the_golden_dialogues_show(glm4_assets: Path) -> None:
    golden: dict[str, list[Conversation]] = {}
    with (glm4_assets / "golden" / "chat_template.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            dialogue = to_conversation({"messages": row["messages"]})
            golden.setdefault(row["source"], []).append(dialogue)
    data = glm4_assets / "data"
    for source, file, expected in (
        ("glaive_zh", "toolcall/glaive_zh_sharegpt.json", 60),
        ("alpaca_zh", "alpaca/alpaca_zh.json", 30),
        ("advertisegen", "advertisegen/dev_raw.json", 40),
    ):
        ours = {(c.messages, json.dumps(c.tools)) for c in read(data / file)}
        if source == "advertisegen":
            ours |= {(c.messages, "[]") for c in read(data / "advertisegen/train.jsonl")}
        found = [(c.messages, json.dumps(c.tools)) in ours for c in golden[source]]
        assert (source, sum(found)) == (source, expected)


def test_the_record_in_the_readme_is_what_it_says() -> None:
    text = (Path(__file__).parent.parent / "data" / "README.md").read_text(encoding="utf-8")
    record = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert record is not None
    conversation = to_conversation(json.loads(record[1]))
    assert [m.role for m in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "observation",
        "assistant",
    ]
    assert all(f"`{layout}`" in text for layout in FORMATS)
