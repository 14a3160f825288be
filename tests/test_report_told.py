"""What Markdown, CSV, the terminal, `--require`, `--watch` and `finetune status` say of evaluations and runs."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluations
import pytest
from test_report_runs import write_history
from test_report_words import compared, evaluation, score

from finetune.artifacts.run_dir import RunDirectory
from finetune.errors import ConfigError, ModelError, RequirementError
from finetune.evaluation.evaluate import Options
from finetune.evaluation.schema import Evaluation
from finetune.report import (
    compare,
    export,
    sentences,
    status,
    terminal,
    watching,
)
from finetune.report.requirements import check_names, check_requirements, read_requirements
from finetune.report.runs import Run, find_runs, read_run
from finetune.storage.manifest import seal


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The base and two checkpoints of two runs each, on eight samples."""
    return evaluations.write_evaluation(tmp_path / "out", samples=8, runs=("lora", "wide"), steps=(20, 40))  # fmt: skip


# --- Markdown, CSV ----------------------------------------------------------------------


def test_markdown_is_the_answer_in_bold_the_rest_and_the_table_of_the_headline_first() -> None:
    found = evaluation(compared("one", "base", 5.0, "better"), base=40.0, one=45.0).model_dump()
    for target in found["targets"]:
        target["scores"] = {"loss": score(None), "bleu-4": score(10.0, 0.5)} | target["scores"]
    found["signatures"] = {"rouge-l": "f1 | <words>", "bleu-4": "other"}
    assert export.markdown(Evaluation.model_validate(found)).splitlines() == [
        "**one has the highest rouge-l of 1 checkpoint: 45.0 (44.0 to 46.0).**",
        "one is better than base in rouge-l: +5.0 (3.0 to 8.0; p < 0.001).",
        "",
        "| score | base | one |",
        "|---|---|---|",
        "| rouge-l | 40.0 (39.0 to 41.0) | ↑ 45.0 (44.0 to 46.0) |",
        "| bleu-4 | 10.0 (9.5 to 10.5) | 10.0 (9.5 to 10.5) |",
        "",
        "rouge-l: f1 \\| &lt;words>",
    ]
    assert "\r" not in export.comma_separated(Evaluation.model_validate(found))
    slices = {"kind": {"tool": {"one": {"rouge-l": score(3.0)}}, "plain": {"base": {"rouge-l": score(2.0)}}}}  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(export.comma_separated(Evaluation.model_validate(found | {"slices": slices})))))  # fmt: skip
    assert [(row["target"], row["value of slice"], row["score"], row["low"], row["high"], row["n"]) for row in rows if row["slice"]] == [
        ("base", "plain", "2.0", "1.0", "3.0", "50"), ("one", "tool", "3.0", "2.0", "4.0", "50"),
    ]  # fmt: skip


# --- requirements, comparisons, watching -------------------------------------------------------


def test_a_comparison_that_was_not_made_meets_nothing() -> None:
    found = evaluation(compared("base", "one", 5.0, "better"), base=40.0, one=45.0, two=50.0)
    for rule in ("not worse than base on rouge-l", " better than base on rouge-l "):
        with pytest.raises(RequirementError, match="two and base cannot be compared in it"):
            check_requirements(found, read_requirements([rule]))
    bare = evaluation(one=45.0).model_dump()
    bare["targets"][0]["scores"]["rouge-l"] |= {"low": None, "high": None}
    with pytest.raises(RequirementError, match=r"rouge-l > 1 surely: one has rouge-l 45\.0$"):
        check_requirements(Evaluation.model_validate(bare), read_requirements(["rouge-l > 1 surely"]))  # fmt: skip
    [said] = check_requirements(evaluation(one=45.0), read_requirements(["rouge-l > -1.5e1"]))
    assert said == "rouge-l > -1.5e1: one has rouge-l 45.0 (44.0 to 46.0)"


def run_with_replies(folder: Path, *steps: int, config: str = "model: {path: m}\n") -> Run:
    write_history(folder, [], config)
    for step in steps:
        row = {"where": "d:1", "message": 1, "prompt": "p", "reference": "r", "prediction": "x"}
        (folder / f"predictions-{step}.jsonl").write_text(json.dumps(row) + "\n")
    return read_run(folder)


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_run_is_compared_with_its_own_steps_and_writes_over_what_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(compare, "write", lambda *given: written.append(given) or {"made": 1})  # type: ignore[func-returns-value]
    run = run_with_replies(tmp_path / "run", 2, 10)
    assert list(run.predictions) == [2, 10]
    assert compare.compare([run], tmp_path / "out", overwrite=overwrite) == {"made": 1}
    [(output, targets, others, options)] = written
    assert (output, others, options) == (tmp_path / "out", [], Options(overwrite=overwrite))
    assert [(one.name, one.kind) for one in targets] == [("run-2", "full"), ("run-10", "full")]


def test_only_runs_with_a_whole_checkpoint_are_evaluated_and_only_those_that_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, states in {"a": (True, False, True), "b": (False,), "c": ()}.items():
        for step, is_whole in enumerate(states, 1):
            saved = tmp_path / name / f"checkpoint-{step}"
            saved.mkdir(parents=True)
            (saved / "file").write_text("x")
            seal(saved)
            if not is_whole:
                (saved / "file").write_text("y")
    good = [str(tmp_path / "a" / f"checkpoint-{step}") for step in (1, 3)]
    assert watching._good([str(tmp_path / name) for name in "abc"]) == good
    assert watching._good([str(tmp_path / "b")]) == []
    with pytest.raises(ConfigError, match="--watch looks at runs: name one"):
        watching.until_over([], lambda models: models)
    states = iter(["done", "running", "done", "done"])
    monkeypatch.setattr(watching, "read_status", lambda _: type("S", (), {"state": next(states)}))
    pauses: list[float] = []
    monkeypatch.setattr(watching.time, "sleep", pauses.append)
    monkeypatch.setattr(watching, "_good", lambda _: [])
    with pytest.raises(ConfigError, match="x, y has no checkpoint"):
        watching.until_over(["x", "y"], lambda models: models)
    assert pauses == [watching.EVERY_SECONDS], "while any of them trains"


# --- runs and their status ---------------------------------------------------------------------


def test_what_cannot_be_read_of_a_run_is_named_and_a_run_without_lines_is_one_with_a_checkpoint(
    tmp_path: Path,
) -> None:
    folder = write_history(tmp_path / "run", [{"step": 3, "loss": 1.0}, {"step": 5, "loss": True}])
    run = read_run(folder)
    assert run.summary == {"path": str(folder), "steps": 5, "checkpoints": [], "best": {}, "config": {"model.path": "m"}}  # fmt: skip
    (folder / "data.json").write_text("{")
    with pytest.raises(ConfigError, match=r"data\.json cannot be read .*; delete it"):
        read_run(folder)
    (folder / "data.json").unlink()
    (folder / "metrics.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be read .*; delete it"):
        read_run(folder)
    (folder / "metrics.jsonl").unlink()
    assert find_runs(tmp_path) == []
    for name in ("checkpoint-4", "weights-4", "checkpoint-30"):
        (folder / name).mkdir()
    [found] = find_runs(tmp_path)
    assert (found.path, found.checkpoints, found.best_step) == (folder, [4, 30], None)
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yaml:1"):
        read_run(folder)


HELD = [{"step": 10, "epoch": 0.5, "loss": 2.0, "seconds_per_step": 3.0}]


def test_steps_that_nothing_says_are_counted_by_three_epochs_and_nothing_is_left_behind_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_history(tmp_path / "run", HELD)
    assert status.read_status(run).steps == 60
    for step, steps in ((2, 55), (10, 0)):
        saved = run / f"checkpoint-{step}"
        saved.mkdir()
        (saved / "trainer_state.json").write_text(json.dumps({"max_steps": steps}))
    found = status.read_status(run)
    assert (found.steps, found.checkpoint) == (60, str(run / "checkpoint-10")), "0 says nothing"
    assert found.written == (run / "metrics.jsonl").stat().st_mtime
    (run / "best.json").write_text(json.dumps({"checkpoint": "checkpoint-7", "metric": "loss", "value": 1}))  # fmt: skip
    found = status.read_status(run)
    assert (found.best, found.best_metric, found.best_value) == (None, None, None)
    (run / "best.json").write_text(json.dumps({"checkpoint": "checkpoint-10", "metric": "loss", "value": "low"}))  # fmt: skip
    (run / "config.yaml").write_text("training: {num_epochs: many}\n")
    found = status.read_status(run)
    assert (found.best_metric, found.best_value, found.steps) == ("loss", None, 60)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 10, "loss": NaN, "learning_rate": {10**400}}}\n')
    found = status.read_status(run)
    assert (dict(found.rows())["loss"], found.learning_rate) == ("nan", None)
    assert dict(found.rows())["best checkpoint"] == str(run / "checkpoint-10")
    (run / "config.yaml").write_text("training: {max_steps: 8}\n")
    with RunDirectory.open(run):
        found = status.read_status(run)
    assert (found.state, found.steps, found.seconds_left) == ("running", 8, 0.0)
    assert "left" not in dict(found.rows())
    assert dict(replace(found, seconds_left=90.0).rows())["left"] == "1:30"

    def denied(_: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr(status, "is_held", denied)
    assert (status.read_status(run).state, status.read_status(run).process) == ("unknown", None)


# --- the terminal ------------------------------------------------------------------------------


def test_the_terminal_says_how_its_scores_come_about_and_what_losses_alone_lack(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = made / "evaluation.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    found["published"] = [{"score": "rouge-l", "value": 72.4, "model": "GLM"}]
    file.write_text(json.dumps(found), encoding="utf-8")
    terminal.show(made)
    said = capsys.readouterr().out
    assert "\nrouge-l: f1, jieba words, mean over pairs\n" in said
    assert "chrF2" not in said, "a score that no target has"
    assert "GLM is published with 72.4." in said
    assert "only the loss" not in said
    for target in found["targets"]:
        target["scores"] = {"loss": score(2.0)}
    file.write_text(json.dumps(found | {"data": [], "comparisons": []}), encoding="utf-8")
    terminal.show(made)
    said = capsys.readouterr().out
    assert "only the loss was measured, as in training; --generate asks for replies too" in said
    assert "worst replies" not in said


def test_a_worst_reply_is_said_with_its_place_and_the_last_question_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = {"where": "d.jsonl:7", "prompt": "[gMASK]<sop><|system|>\nbe\n<|user|>\nwho\nis it?<|assistant|>", "reference": "me", "prediction": ""}  # fmt: skip
    assert terminal._sample("rouge-l", 12.345, row) == "d.jsonl:7, rouge-l 12.3\n  prompt     who is it?\n  reference  me\n  reply      "  # fmt: skip
    monkeypatch.setenv("FINETUNE_LANG", "zh")
    *_, prompt, reference, reply = terminal._sample("rouge-l", 1.0, row).split("\n")
    begins = {len(line) + sum("\u4e00" <= c <= "\u9fff" for c in line) for line in (prompt[:-len("who is it?")], reference[:-len("me")], reply)}  # fmt: skip
    assert len(begins) == 1  # a Chinese character is two columns wide


def test_runs_are_listed_with_their_steps_and_differences_or_that_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = ("training: {seed: 1, list: [1]}\n", "training: {seed: 1, list: [甲]}\nmethod: {rank: 4}\n")  # fmt: skip
    records = [{"step": 7, "eval_loss": 1.5, "eval_chrf": 3.0, "eval_exact_match": 4.0, "eval_stop_rate": 90.0}]  # fmt: skip
    runs = [read_run(write_history(tmp_path / str(n), records, one)) for n, one in enumerate(configs)]  # fmt: skip
    (runs[0].path / "checkpoint-7").mkdir()
    runs[0] = read_run(runs[0].path)
    terminal.show_runs(runs)
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [re.split(" {2,}", line)[1:] for line in lines] == [
        ["7", "1", "1.500 at 7", "exact match 4.0 at 7", "training.list [1]"],
        ["7", "0", "1.500 at 7", "exact match 4.0 at 7", 'training.list ["甲"], method.rank 4'],
    ]
    terminal.show_runs(runs[:1])
    assert "training.list" not in capsys.readouterr().out
    terminal.show_differences(runs)
    said = capsys.readouterr().out
    assert [line.split() for line in said.splitlines()[2:]] == [["training.list", "[1]", '["甲"]'], ["method.rank", "–", "4"]]  # fmt: skip
    assert said.splitlines()[0].split() == ["option", *(str(run.path) for run in runs)]
    terminal.show_differences(runs[:1])
    assert capsys.readouterr().out == "the configurations of these runs are the same\n"
    empty = read_run(write_history(tmp_path / "empty", []))
    assert terminal.generated_headline(empty) is None
    assert [terminal.best_score(empty, name) for name in (None, "loss")] == ["–", "–"]


def test_a_curve_of_the_terminal_joins_its_points_and_keeps_to_its_box() -> None:
    flat = terminal.curve([(3, 2.0), (3, 2.0)], columns=4, rows=2)
    assert flat == ["       2 │⠁⠀⠀⠀", "       2 │⠀⠀⠀⠀", "         └────", "          3  3"]
    rising = terminal.curve([(0, 0.0), (8, 1.0)], columns=4, rows=2)
    # The diagonal of eight dots by eight, and one more in the middle, where both halves are rounded.
    assert [line[10:] for line in rising[:2]] == ["⠀⠀⡠⠊", "⡠⠊⠁⠀"]
    many = [(float(n), float(n % 2)) for n in range(1001)]
    assert terminal.curve(many, columns=2, rows=2)[0] == "       1 │⠉⠉"
    assert len(terminal.curve(many)) == 10


def test_files_of_a_run_that_are_none_or_too_large_are_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_history(tmp_path / "run", [{"step": 1}])
    (folder / "predictions-3.jsonl").mkdir()
    (folder / "predictions-03.jsonl.bak").touch()
    assert read_run(folder).predictions == {}
    os.mkfifo(folder / "predictions-2.jsonl")
    with pytest.raises(ModelError, match=r"predictions-2\.jsonl is not a plain file"):
        read_run(folder)
    (folder / "predictions-2.jsonl").unlink()
    (folder / "data.json").write_text('{"train": {}}')
    for limit, name in ((11, "metrics"), (12, "data"), (13, "")):
        monkeypatch.setattr("finetune.report.runs.LARGEST_JSON", limit)
        if name:
            with pytest.raises(ModelError, match=name):
                read_run(folder)
        else:
            assert read_run(folder).data == {"train": {}}
    (folder / "metrics.jsonl").write_text("")
    monkeypatch.setattr("finetune.report.runs.LARGEST_JSON", 12)
    with pytest.raises(ModelError, match="data"):
        read_run(folder)


def test_the_answer_ends_with_what_was_forgotten_and_where_it_is_weak() -> None:
    worse = compared("one", "base", 0.4, "worse", metric="general_loss")
    found = evaluation(worse, base=40.0, one=45.0).model_dump()
    for target in found["targets"]:
        target["scores"]["general_loss"] = score(1.0)
    found["slices"] = {"kind": {"tool": {"one": {"rouge-l": score(30.0)}}}}
    said = sentences.conclusion(Evaluation.model_validate(found), "rouge-l")
    assert said == [
        "one has the highest rouge-l of 1 checkpoint: 45.0 (44.0 to 46.0).",
        "one is worse than base in general loss: +0.400 (−1.600 to 3.400; p < 0.001).",
        "one is weakest on kind tool: 30.0 (29.0 to 31.0), 50 replies.",
    ]
    other = compared("two", "one", 5.0, "better")
    both = evaluation(compared("two", "base", 5.0, "better"), other, base=1.0, one=2.0, two=7.0)
    assert len(sentences.conclusion(both, "rouge-l")) == 2, "beside a base that is enough"


def test_public_tasks_and_metrics_of_the_user_are_scores_that_may_be_required() -> None:
    check_names(read_requirements(["mmlu/acc > 1", "mine > 1", "loss < 2"]), ["mine"])
    with pytest.raises(ConfigError) as caught:
        check_names(read_requirements(["mine > 1", "rouge-m > 1"]), [])
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == ["--require 'mine > 1'", "--require 'rouge-m > 1'"]  # fmt: skip
