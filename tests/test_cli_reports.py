"""What the commands about evaluations and runs say, to whom, and what they answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import exit_code

from finetune import console
from finetune.cli import report_commands
from finetune.evaluation.scores.votes import Duel


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_LANG", "en")
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")


def test_an_evaluation_is_said_once_by_the_first_process_and_answered_whole(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[Any] = []
    made = {"output": "out", "targets": []}
    monkeypatch.setattr("finetune.evaluation.evaluate.evaluate", lambda *given, **how: told.append(given) or made)  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr("finetune.cli.evaluation_commands.say_report", lambda folder: told.append(folder))  # fmt: skip
    monkeypatch.setattr("finetune.cli.evaluation_commands._check_requirements", lambda folder, asked: told.append((folder, len(asked))))  # fmt: skip
    words = ("evaluate", "model", "--require", "rouge-l >= 4")
    assert exit_code(*words, "--json") == 0
    assert json.loads(capfd.readouterr().out) == made
    assert told == [(["model"], ()), Path("out"), (Path("out"), 1)]
    told.clear()
    monkeypatch.setattr(console, "is_rank0", lambda: False)
    assert exit_code(*words) == 0
    assert told == [(["model"], ())]
    told.clear()
    monkeypatch.setattr(console, "is_rank0", lambda: True)
    monkeypatch.setattr("finetune.report.watching.until_over", lambda runs, evaluate: evaluate(["last"]) and {"output": "last"})  # fmt: skip
    assert exit_code(*words, "--watch", "--json") == 0
    assert json.loads(capfd.readouterr().out) == {"output": "last"}
    assert told == [(["last"], ()), Path("out"), (Path("last"), 1)]


def test_scores_of_a_task_are_not_known_before_it_ran(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.evaluation.evaluate.evaluate", lambda *_, **__: sys.exit(9))
    words = ("evaluate", "some/model", "--require", "x >= 4")
    assert exit_code(*words) == 2
    assert "there is no score 'x'" in capfd.readouterr().err
    assert exit_code(*words, "--tasks", "mmlu") == 9
    assert exit_code(*words, "--needle", "4k") == 9


def test_options_of_another_name_are_taken_and_told_by_their_new_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.evaluation.evaluate.evaluate", lambda *_, **__: sys.exit(9))
    told = {
        ("--base",): "--base is now --include-base", ("--general", "r"): "--general is now --regression-data",
        ("--bleu-unit", "word"): "--bleu-unit is now --definition: `character` is llamafactory, `word` is demo",
    }  # fmt: skip
    assert exit_code("evaluate", "some/model") == 9
    assert capfd.readouterr().err == ""
    for words, said in told.items():
        assert exit_code("evaluate", "some/model", *words) == 9
        assert capfd.readouterr().err == f"warning: {said}\n"


def test_votes_are_a_table_and_an_answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    duel = Duel(a="one", b="two", wins=7, losses=2, ties=1, dialogues=9, win_rate=75.0, low=50.5, high=90.25, p=0.0321, verdict="better")  # fmt: skip
    monkeypatch.setattr("finetune.evaluation.scores.votes.score_votes", lambda *_, **__: [duel])
    assert exit_code("evaluate", "--votes", "v", "--json") == 0
    said = capfd.readouterr()
    (pair,) = json.loads(said.out)["pairs"]
    assert (pair["a"], pair["wins"], pair["losses"], pair["ties"]) == ("one", 7, 2, 1)
    row = [cell.strip() for cell in said.err.splitlines()[2].split("  ") if cell.strip()]
    assert row == ["one : two", "7", "2", "1", "9", "75.0 (50.5 to 90.2)", "better, p = 0.032"]


def test_a_report_is_a_page_with_plots_or_text_that_no_terminal_obeys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Any] = []
    monkeypatch.setattr("finetune.report.page.write_page", lambda folder: told.append(("page", folder)) or folder / "report.html")  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr("finetune.report.terminal.show", lambda folder: told.append(("show", folder)))  # fmt: skip
    monkeypatch.setattr("finetune.report.terminal.say_page", lambda page: told.append(("said", page)))  # fmt: skip
    monkeypatch.setattr("finetune.report.plots.write_plots", lambda folder: told.append(("plots", folder)))  # fmt: skip
    assert exit_code("report", "out") == 0
    out = Path("out")
    assert told == [("page", out), ("show", out), ("said", out / "report.html"), ("plots", out)]
    assert capsys.readouterr().out == "plots: out/plots\n"
    monkeypatch.setattr("finetune.evaluation.schema.read_evaluation", lambda folder: folder)
    monkeypatch.setattr("finetune.report.export.markdown", lambda found: f"M {found} \x1b\n")
    monkeypatch.setattr("finetune.report.export.comma_separated", lambda found: f"C {found} \x1b\n")
    for kind, said in (("markdown", "M"), ("csv", "C")):
        for terminal, escape in ((False, "\x1b"), (True, "\u241b")):
            monkeypatch.setattr(sys.stdout, "isatty", lambda answer=terminal: answer)
            assert exit_code("report", "out", "--format", kind) == 0
            assert capsys.readouterr().out == f"{said} out {escape}\n"
    assert len(told) == 4


def test_runs_are_shown_and_answered_in_short(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []
    found = [SimpleNamespace(summary={"path": name}) for name in "ab"]
    monkeypatch.setattr("finetune.report.runs.find_runs", lambda *_, **__: found)
    monkeypatch.setattr("finetune.report.terminal.show_runs", shown.append)
    assert exit_code("runs", "--json") == 0
    assert json.loads(capfd.readouterr().out) == [{"path": "a"}, {"path": "b"}]
    assert shown == [found]


@pytest.mark.parametrize("drawn", [[], ["***", "1 2"]])
def test_a_status_has_its_curve_where_there_is_one(
    drawn: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    run = SimpleNamespace(curve=lambda name: asked.append(name) or [(1, 2.0)])  # type: ignore[func-returns-value]
    monkeypatch.setattr("finetune.report.status.read_status", lambda path: SimpleNamespace(rows=lambda: [["step", "3"]]))  # fmt: skip
    monkeypatch.setattr("finetune.report.runs.read_run", lambda path: run)
    monkeypatch.setattr("finetune.report.terminal.curve", lambda *_, **__: drawn)
    assert exit_code("status", "model") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["model"]
    assert lines[2].split() == ["step", "3"]
    assert lines[3:] == (["", "loss over steps", "***", "1 2"] if drawn else [])
    assert asked == ["loss"]


def test_a_comparison_tells_the_differences_first_and_then_the_report(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[Any] = []
    monkeypatch.setattr("finetune.report.runs.read_run", lambda path: path.name)
    monkeypatch.setattr("finetune.report.terminal.show_differences", lambda found: told.append(("differences", found)))  # fmt: skip
    monkeypatch.setattr("finetune.report.compare.compare", lambda found, output, overwrite: told.append((found, output, overwrite)) or {"x": 1})  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr(report_commands, "say_report", told.append)
    assert exit_code("compare", "a", "b", "--json") == 0
    assert json.loads(capfd.readouterr().out) == {"x": 1}
    folder = Path("comparison")
    assert told == [("differences", ["a", "b"]), (["a", "b"], folder, False), folder]
