"""What the terminal shows of evaluations and runs."""

from __future__ import annotations

import json
from pathlib import Path

import evaluations
import pytest

from finetune.evaluation.schema import read_evaluation
from finetune.report.runs import read_run
from finetune.report.terminal import show, show_runs, worst_samples


def test_the_list_of_runs_says_best_scores_and_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [read_run(evaluations.write_run(tmp_path / name, rank=rank)) for name, rank in (("a", 8), ("b", 16))]  # fmt: skip
    show_runs(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "run"
    assert lines[2].endswith("1.357 at 60  rouge-l 50.0 at 60  method.rank 8")
    assert lines[3].endswith("method.rank 16")


def test_the_terminal_gets_a_table_the_answer_and_the_three_worst(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = evaluations.write_evaluation(tmp_path / "out")
    show(made)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].split() == ["model", "rouge-l", "exact", "match", "bleu-4", "stop", "rate"]
    assert lines[2].split()[0] == "base"
    assert "↑" in lines[5]
    assert "lora 60 is better than base in rouge-l" in said
    found = worst_samples(made, read_evaluation(made).targets[-1], "rouge-l")
    assert len(found) == 3
    values = [json.loads(line)["scores"]["rouge-l"] for line in (made / "predictions" / "lora-60.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]  # fmt: skip
    assert [value for value, _ in found] == sorted(values)[:3]
    assert said.count("  reference  ") == 3


def test_the_terminal_shows_what_was_asked_for_by_name_and_speaks_chinese(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = evaluations.write_evaluation(tmp_path / "out")
    file = made / "evaluation.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    asked = ("json_schema_validity", "general_loss", "judge_win_rate", "my:politeness", "mmlu/acc")
    for target in found["targets"]:
        target["scores"] |= {key: {"value": 50.0, "n": 40} for key in [*asked, "rouge-2"]}
    file.write_text(json.dumps(found), encoding="utf-8")
    monkeypatch.setenv("FINETUNE_LANG", "zh")
    show(made)
    said = capsys.readouterr().out
    head, *_, reply = said.splitlines()
    for name in asked:
        assert name.replace("_", " ") in head
    assert "rouge 2" not in head.replace("-", " ")
    assert "lora 60 的 rouge-l 最高：" in said
    assert "最差的回复，来自 lora 60:" in said
    assert reply.startswith("  回复")


def test_a_reply_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = evaluations.write_evaluation(tmp_path / "out", samples=2)
    file = made / "predictions" / "lora-60.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    rows[0]["prediction"] = "\x1b[2Jgone\u202e"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    show(made)
    said = capsys.readouterr().out
    assert "\\x1b[2Jgone\\u202e" in said
    assert "\x1b" not in said
