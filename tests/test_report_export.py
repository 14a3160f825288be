"""An evaluation as Markdown, as CSV, and as a page with labels, published figures and Chinese words."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import evaluations
import pytest
from typer.testing import CliRunner

from finetune.cli.commands import app
from finetune.evaluation.predictions import language
from finetune.evaluation.schema import read_evaluation
from finetune.report.export import comma_separated, markdown
from finetune.report.page import write_page


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The base and one checkpoint, with labels, a public task and empty replies of the base."""
    made = evaluations.write_evaluation(tmp_path / "out", samples=12, steps=(44,))
    file = made / "evaluation.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    name = found["targets"][-1]["name"]
    found["labels"] = {name: {"labels": ["ham", "spam"], "precision": [50.0, 60.0], "recall": [70.0, 80.0], "f1": [58.3, 68.6], "confusion": [[7, 3, 0], [1, 8, 1]]}}  # fmt: skip
    for target in found["targets"]:
        target["scores"]["mmlu/acc"] = {"value": 71.2, "low": 70.5, "high": 71.9, "n": 900}
    found["published"] = [{"score": "mmlu/acc", "value": 72.4, "model": "GLM-4-9B-Chat"}]
    file.write_text(json.dumps(found), encoding="utf-8")
    replies = made / found["targets"][0]["predictions"]
    rows = [json.loads(line) for line in replies.read_text("utf-8").splitlines()]
    for row in rows[:5]:
        row["prediction"] = ""
    replies.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return made


def test_markdown_holds_the_answer_and_every_score_with_its_interval(folder: Path) -> None:
    text = markdown(read_evaluation(folder))
    assert text.startswith("**lora 44 has the highest rouge-l of 1 checkpoint:")
    assert "mmlu/acc: base 71.2 (70.5 to 71.9), lora 44 71.2 (70.5 to 71.9); GLM-4-9B-Chat is published with 72.4." in text  # fmt: skip
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| score | base | lora 44 |"
    assert "| mmlu/acc | 71.2 (70.5 to 71.9) | 71.2 (70.5 to 71.9) |" in rows
    assert len(rows) == 2 + len(read_evaluation(folder).metrics)


def test_a_table_of_markdown_stays_one_whatever_a_name_says(folder: Path) -> None:
    found = read_evaluation(folder)
    odd = found.targets[0].model_copy(update={"name": "a|b\n<img>`x`"})
    text = markdown(
        found.model_copy(update={"targets": [odd, found.targets[1]], "comparisons": []})
    )
    assert "| score | a\\|b &lt;img>'x' | lora 44 |" in text


def test_csv_has_a_line_for_every_score_of_the_whole_and_of_every_slice(folder: Path) -> None:
    found = read_evaluation(folder)
    rows = list(csv.DictReader(io.StringIO(comma_separated(found))))
    whole = [row for row in rows if row["target"] == "base" and not row["slice"]]
    assert {row["metric"] for row in whole} == set(found.targets[0].scores)
    assert {row["slice"] for row in rows} == {"", *found.slices}
    formula = found.targets[0].model_copy(update={"name": "=cmd()"})
    text = comma_separated(found.model_copy(update={"targets": [formula]}))
    assert text.splitlines()[1].startswith("'=cmd()")


def test_the_command_prints_it(folder: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(folder), "--format", "markdown"])
    assert done.exit_code == 0, done.output
    assert done.stdout == markdown(read_evaluation(folder))
    assert not (folder / "report.html").exists()


def test_the_page_shows_labels_published_figures_and_empty_replies(folder: Path) -> None:
    page = write_page(folder).read_text(encoding="utf-8")
    assert '<section id="labels">' in page
    assert '<td class="heat4">7</td><td class="heat2">3</td><td class="heat0">0</td>' in page
    assert "GLM-4-9B-Chat" in page
    assert "5 of 12 replies empty" in page
    assert page.count("<figure>") == page.count("<polyline") or "<svg" in page
    # One checkpoint has no curve of scores: only the loss while training is drawn over steps.
    assert "<figcaption>rouge-l</figcaption>" not in page


def test_the_page_speaks_chinese(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_LANG", "zh")
    page = write_page(folder).read_text(encoding="utf-8")
    assert '<html lang="zh">' in page
    for text in ("评测", "样本", "混淆矩阵", "公开任务与公布的数字", "搜索", "空回复", "95 % 区间"):
        assert text in page, text
    assert "Skip to" not in page


def test_the_language_of_a_text_is_told_by_its_letters() -> None:
    told = {"今天天气很好 ok": "chinese", "今日は": "japanese", "오늘 날씨": "korean", "Привет": "cyrillic script", "مرحبا": "arabic script", "a few words": "latin script", "สวัสดี": "thai", "3.14": "other"}  # fmt: skip
    assert {text: language(text) for text in told} == told
