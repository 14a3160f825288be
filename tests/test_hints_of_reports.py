"""One table: what a report cannot do -> the options that its message tells to set."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hints import options, said, unsaid
from test_report_runs import write_history
from test_report_words import evaluation

from finetune.report import board, compare, terminal, watching
from finetune.report.requirements import check_names, check_requirements, read_requirements
from finetune.report.runs import read_run


def run_of(folder: Path, **replies: str) -> Any:
    """A run with these references at its evaluations, `at_STEP`."""
    write_history(folder, [])
    for at, reference in replies.items():
        row = {"where": "d:1", "message": 1, "prompt": "p", "reference": reference, "prediction": "x"}  # fmt: skip
        (folder / f"predictions-{at.removeprefix('at_')}.jsonl").write_text(json.dumps(row) + "\n")
    return read_run(folder)


def test_every_text_about_a_report_names_the_options_that_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none, one = run_of(tmp_path / "none"), run_of(tmp_path / "one", at_2="r")
    two = run_of(tmp_path / "two", at_2="r", at_4="other")
    rules = read_requirements(["better than base on rouge-l"])
    told: list[str] = []
    monkeypatch.setattr(terminal.console, "say", told.append)
    monkeypatch.setattr(watching, "read_status", lambda _: type("S", (), {"state": "done"}))
    losses = evaluation(metric="loss", one=1.0)
    monkeypatch.setattr(terminal, "read_evaluation", lambda _: losses)
    monkeypatch.setattr(terminal, "worst_samples", lambda *_: [])
    terminal.show(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = said(board.serve, tmp_path, port=port, every=1)
    assert text.startswith(f"cannot bind 127.0.0.1:{port}: Address already in use")
    texts = [
        (text, "--port"),
        (said(compare.compare, [none, one], tmp_path / "out"), "--include-base --data"),
        (said(compare.compare, [one], tmp_path / "out"), "evaluation.every_steps evaluation.at_start"),
        (said(compare.compare, [two], tmp_path / "out"), "data.validation evaluation.max_samples --data"),
        (said(read_requirements, ["x"]), "--require"),
        (said(check_names, read_requirements(["x > 1"]), []), "--require"),
        (said(check_requirements, evaluation(one=1.0), rules), "--include-base"),
        (said(watching.until_over, [], list), "--watch"),
        (said(watching.until_over, [str(tmp_path)], list), "--watch"),
        (next(line for line in told if "only the loss" in line), "--generate"),
    ]  # fmt: skip
    wrong = {one: (sorted(options(one)), named) for one, named in texts if options(one) != set(named.split())}  # fmt: skip
    assert wrong == {}
    assert unsaid("report", [one for one, _ in texts]) == []
