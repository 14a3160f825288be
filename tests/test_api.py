"""The program from Python: what its four functions take and return, and the examples that use them."""

from __future__ import annotations

import inspect
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import config, write_dialogues

import finetune
from finetune import api
from finetune.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import custom_dataset  # noqa: E402
import custom_metric  # noqa: E402
import ten_lines  # noqa: E402
from custom_callback import StopAtLoss  # noqa: E402

KEPT = {
    "train": "(config: 'str | Path | Mapping[str, Any]', *overrides: 'str', callbacks: 'Sequence[Any]' = ()) -> 'dict[str, Any]'",
    "evaluate": "(*models: 'str | Path', data: 'str | Sequence[str]' = (), output: 'str | Path | None' = None, "
    "include_base: 'bool' = False, metrics: 'Sequence[str | Metric]' = (), **changes: 'Any') -> 'dict[str, Any]'",
    "load": "(model: 'str | Path', *, base: 'str | None' = None) -> 'Chat'",
    "render": "(row: 'Row | Sequence[Row]', model: 'str | Path') -> 'ShowResult'",
}
DIALOGUE = [
    {"role": "user", "content": "the order"},
    {"role": "assistant", "content": "the answer"},
]


@pytest.mark.parametrize("name", KEPT)
def test_what_a_function_takes_and_returns_is_kept(name: str) -> None:
    assert str(inspect.signature(getattr(finetune, name))) == KEPT[name]
    assert inspect.getdoc(getattr(finetune, name))


def test_these_are_all_and_nothing_heavy_comes_before_one_is_called() -> None:
    assert set(finetune.__all__) == KEPT.keys()
    code = (
        "import sys; from finetune import train, evaluate, load, render;"
        "sys.exit(str({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
    with pytest.raises(AttributeError, match="no attribute 'tune'"):
        finetune.tune  # noqa: B018


def test_a_row_is_shown_with_what_carries_loss(tiny_chatglm: Path) -> None:
    shown = finetune.render(DIALOGUE, tiny_chatglm)
    assert shown.plain() == "[gMASK]<sop><|user|>\nthe order<|assistant|>«\nthe answer<|user|>»"
    assert finetune.render({"prompt": "the order", "response": "the answer"}, tiny_chatglm).plain() == shown.plain()  # fmt: skip
    with pytest.raises(DataError, match="the row is no dialogue: the dialogue has no messages"):
        finetune.render([], tiny_chatglm)


def test_a_mapping_is_checked_as_a_file_is(tmp_path: Path, tiny_chatglm: Path) -> None:
    settings = config(tiny_chatglm, tmp_path / "none.jsonl", tmp_path / "run")
    with pytest.raises(DataError, match="does not exist"):
        finetune.train(settings)
    settings["training"]["max_stps"] = 1
    with pytest.raises(ConfigError, match=r"training\.max_stps: unknown key .*did you mean max_steps"):  # fmt: skip
        finetune.train(settings)


def test_a_callback_ends_the_run_with_a_checkpoint(tmp_path: Path, tiny_chatglm: Path) -> None:
    rows = write_dialogues(tmp_path / "rows.jsonl", 12)
    settings = config(tiny_chatglm, rows, tmp_path / "run")
    done = finetune.train(settings, "training.max_steps=5", callbacks=[StopAtLoss(1e9)])
    assert done["steps"] == 1
    assert Path(done["checkpoint"]).name == "checkpoint-1"


def test_the_ten_lines_and_a_metric_of_ones_own(
    tmp_path: Path, tiny_chatglm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, run = write_dialogues(tmp_path / "rows.jsonl", 30), tmp_path / "run"
    quick: dict[str, Any] = {"max_steps": 2, "report_to": []}
    reply = ten_lines.main(str(tiny_chatglm), str(rows), str(run), **quick)
    assert isinstance(reply, str)
    out = capsys.readouterr().out
    assert "«\nA new battery costs 79 euros.<|user|>»" in out
    assert "report.html" in out
    found = finetune.evaluate(
        run, max_samples=2, max_new_tokens=4, metrics=[custom_metric.right_numbers],
        output=tmp_path / "scores",
    )  # fmt: skip
    assert "right_numbers" in json.dumps(found)
    assert (tmp_path / "scores/report.html").exists()


def test_a_sampled_reply_depends_on_its_seed_alone(tiny_chatglm: Path) -> None:
    chat = api.load(tiny_chatglm)
    asked = [DIALOGUE[:1], {"messages": DIALOGUE[:1]}]
    how = {"max_new_tokens": 4, "temperature": 1.0, "seed": 3}
    assert chat.replies(asked, **how) == chat.replies(asked, **how)
    assert chat.reply(DIALOGUE[:1], max_new_tokens=4)["role"] == "assistant"


def test_rows_come_from_a_database(tmp_path: Path, tiny_chatglm: Path) -> None:
    database, output = tmp_path / "tickets.db", tmp_path / "train.jsonl"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE tickets (question TEXT, answer TEXT, rating INTEGER)")
        connection.executemany(
            "INSERT INTO tickets VALUES (?, ?, ?)",
            [("屏幕碎了", "请送来检修。", 5), ("hello", "", 3), ("hello", "hello", 2)],
        )
    connection.close()
    assert custom_dataset.main(str(database), str(output)) == 2
    first, second = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert (first["messages"][1]["weight"], second["messages"][1]["weight"]) == (2.0, 1.0)
    assert finetune.render(first, tiny_chatglm).num_supervised > 1


@pytest.mark.parametrize(
    ("reply", "reference", "score"),
    [("79 euros", "It costs 79.", 100.0), ("79 or 80", "79", 0.0), ("none", "none", None)],
)
def test_the_metric_of_the_example(reply: str, reference: str, score: float | None) -> None:
    assert custom_metric.right_numbers(reply, reference) == score
