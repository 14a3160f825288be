"""From real tiny runs to their report: `finetune compare` and `finetune evaluate` on the same replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command_line
import pytest
import runs

from finetune.errors import ConfigError
from finetune.evaluation.schema import read_evaluation
from finetune.report.compare import targets_of
from finetune.report.runs import differences, find_runs, read_run


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


def write_history(folder: Path, records: list[dict[str, Any]], config: str = "model: {path: m}\n") -> Path:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_best_of_equal_scores_is_the_first_in_the_direction_of_its_score(
    tmp_path: Path,
) -> None:
    rows = [
        {"step": step, "eval_loss": loss, "eval_bleu-4": bleu, "eval_chrf": None}
        for step, loss, bleu in ((2, 3.0, 10.0), (4, 1.0, 30.0), (6, 1.0, 30.0), (8, 2.0, 20.0))
    ]
    run = read_run(write_history(tmp_path / "run", [*rows, {"step": "9", "eval_loss": 0.1}, {"eval_loss": 0.0}]))  # fmt: skip
    assert run.best("loss") == (4, 1.0)
    assert run.best("bleu-4") == (4, 30.0)
    assert run.best("chrf") is None
    assert run.last_step == 8
    assert run.scored == ["loss", "bleu-4", "chrf"]
    assert run.summary["best"] == {"loss": {"step": 4, "value": 1.0}, "bleu-4": {"step": 4, "value": 30.0}}  # fmt: skip


def test_runs_are_found_oldest_first_and_neither_in_checkpoints_nor_in_hidden_folders(
    tmp_path: Path,
) -> None:
    import os

    for number, name in enumerate(("new", "a/old", "run/checkpoint-2", "run/weights-2", ".kept/run", "evaluated/runs/x", "1/2/3/4/deep", "1/2/3/4/5/deeper", "bare")):  # fmt: skip
        folder = write_history(tmp_path / name, [{"step": 1, "loss": 1.0}])
        os.utime(folder / "config.yaml", (100 - number, 100 - number))
    (tmp_path / "evaluated" / "evaluation.json").write_text("{}")
    (tmp_path / "bare" / "metrics.jsonl").unlink()
    found = [run.path.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)]
    assert found == ["a/old", "new"]
    deep = [run.path.name for run in find_runs(tmp_path / "1")]
    assert deep == ["deep"]


def test_runs_differ_in_what_is_not_the_same_in_all_but_their_folder(tmp_path: Path) -> None:
    configs = [f"model: {{path: m}}\ntraining: {{output_dir: r{n}, seed: {n % 2}, list: [1, {n}]}}\n" for n in range(3)]  # fmt: skip
    configs[2] += "method: {rank: 4, empty: {}}\n"
    runs = [read_run(write_history(tmp_path / str(n), [], one)) for n, one in enumerate(configs)]
    assert differences(runs) == [
        ("training.seed", [0, 1, 0]),
        ("training.list", [[1, 0], [1, 1], [1, 2]]),
        ("method.rank", [None, None, 4]),
        ("method.empty", [None, None, {}]),
    ]


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ({"edges": [0, 1], "numbers": [3]}, ""), ({"edges": [1, 0], "numbers": [3]}, "edges of lengths must rise"),
        ({"edges": [0], "numbers": []}, "edges of lengths must rise"), ({"edges": [0, 1], "numbers": [-1]}, "greater than or equal to 0"),
    ],
)  # fmt: skip
def test_counts_that_no_training_wrote_are_refused(
    tmp_path: Path, lengths: dict[str, Any], said: str
) -> None:
    folder = write_history(tmp_path / "run", [])
    (folder / "data.json").write_text(json.dumps({"train": {"lengths": lengths, "more": 1}}))
    if not said:
        assert read_run(folder).data["train"]["more"] == 1
        return
    with pytest.raises(ConfigError, match=said):
        read_run(folder)


def test_the_base_of_runs_is_one_target_for_each_model(tmp_path: Path) -> None:
    runs = []
    for name, model, kind in (("a", "x/m", "lora"), ("b", "x/m", "ptuning_v2"), ("c", "y/n", "full")):  # fmt: skip
        config = f"model: {{path: {model}}}\nmethod: {{kind: {kind}}}\n"
        folder = write_history(tmp_path / name, [], config)
        for step in (0, 10, 2):
            (folder / f"predictions-{step}.jsonl").write_text(name)
        (folder / "predictions-9.jsonl.part").write_text("")
        runs.append(read_run(folder))
    found = [(one.name, one.kind, one.step, Path(one.path).read_text()) for one in targets_of(runs)]
    assert found == [
        ("base", "base", None, "a"), ("base-n", "base", None, "c"),
        ("a-2", "adapter", 2, "a"), ("a-10", "adapter", 10, "a"), ("b-2", "prefix", 2, "b"),
        ("b-10", "prefix", 10, "b"), ("c-2", "full", 2, "c"), ("c-10", "full", 10, "c"),
    ]  # fmt: skip
    assert [one.run for one in targets_of(runs)[:3]] == [None, None, str(tmp_path / "a")]
