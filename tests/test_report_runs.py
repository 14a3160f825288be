"""From real tiny runs to their report: `finetune compare` and `finetune evaluate` on the same replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command_line
import pytest
import runs

from finetune.evaluation.schema import read_evaluation
from finetune.report.compare import targets_of
from finetune.report.runs import read_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_chatglm: Path) -> Path:
    """Runs `small` and `large` (LoRA of rank 2 and 4) of four steps, asked before, halfway and after."""
    place = tmp_path_factory.mktemp("trained")
    data = runs.write_dialogues(place / "train.jsonl", 12)
    held_out = runs.write_dialogues(place / "heldout.jsonl", 5, seed=1)
    for name, rank in (("small", 2), ("large", 4)):
        settings = runs.config(
            tiny_chatglm, data, place / name, method__rank=rank, training__max_steps=4,
            data__validation=str(held_out), evaluation__every_steps=2, evaluation__at_start=True,
            training__save_every_steps=2,
        )  # fmt: skip
        runs.run_here(settings)
    return place


def in_training(run: Path, step: int) -> dict[str, float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    (found,) = [r for r in records if r["step"] == step and "eval_rouge-l" in r]
    return {key[5:]: value for key, value in found.items() if key.startswith("eval_")}


def test_comparing_runs_gives_the_scores_of_their_training(
    trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = trained / "comparison"
    words = ("compare", str(trained / "small"), str(trained / "large"), "--output", str(output))
    assert command_line.exit_code(*words) == 0
    said = capfd.readouterr().out
    assert said.splitlines()[2].split() == ["method.rank", "2", "4"]  # differences come first

    evaluation = read_evaluation(output)
    assert [target.name for target in evaluation.targets] == ["base", "small-2", "small-4", "large-2", "large-4"]  # fmt: skip
    for target in evaluation.targets[1:]:
        assert target.run is not None
        assert target.step is not None
        wanted = in_training(Path(target.run), target.step)
        found = {name: one.value for name, one in target.scores.items()}
        assert {name: wanted[name] for name in found} == found
    assert len(evaluation.comparisons) > 0
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.index("What the runs do differently") < page.index("<h2>Scores</h2>")
    assert '<th scope="row">method.rank</th><td>2</td><td>4</td>' in page


def test_the_data_of_a_run_is_counted_in_its_report(trained: Path) -> None:
    data: Any = read_run(trained / "small").data
    assert data["train"]["examples"] == sum(data["train"]["lengths"]["numbers"]) == 12
    assert data["validation"]["rows"] == 5


def test_runs_that_were_asked_other_questions_are_not_compared(
    trained: Path, tmp_path: Path
) -> None:
    import shutil

    other = shutil.copytree(trained / "large", tmp_path / "other")
    file = other / "predictions-4.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[1:]), encoding="utf-8")
    words = ("compare", str(trained / "small"), str(other), "--output", str(tmp_path / "out"))
    assert command_line.exit_code(*words) == 2
    assert not (tmp_path / "out").exists()
    for left in other.glob("predictions-*"):
        left.unlink()
    assert command_line.exit_code(*words) == 2


def test_runs_with_one_name_keep_apart(trained: Path, tmp_path: Path) -> None:
    import shutil

    again = read_run(Path(shutil.copytree(trained / "small", tmp_path / "small")))
    found = targets_of([read_run(trained / "small"), again])
    names = [target.name for target in found]
    assert len(set(names)) == len(names) == 5
    assert names[-1] == f"{tmp_path.name}-small-4"


def test_evaluating_a_run_writes_the_page_and_says_the_answer(
    trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = trained / "evaluated"
    assert command_line.exit_code("evaluate", str(trained / "small"), "--base", "--output", str(output)) == 0  # fmt: skip
    said = capfd.readouterr().out
    evaluation = read_evaluation(output)
    steps = [target.step for target in evaluation.targets]
    assert steps == [None, 2, 4]
    found = evaluation.targets[2].scores["rouge-l"].value
    assert found == in_training(trained / "small", 4)["rouge-l"]
    assert "worst replies of small-checkpoint-" in said
    assert f"report: {output / 'report.html'}" in said
    assert command_line.exit_code("evaluate", str(trained / "small"), "--no-generate", "--output", str(output)) == 0  # fmt: skip
    assert "--generate asks for replies too" in capfd.readouterr().out
    assert "eval_loss" not in (output / "report.html").read_text(encoding="utf-8")
