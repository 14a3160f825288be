"""What is said of targets, which they are, and what is read back of an evaluation's folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rows import write_rows
from test_scoring_parts import SAID

from finetune.errors import DataError, ModelError
from finetune.evaluation import compared, folder, schema, targets
from finetune.evaluation.compared import ScoredTarget
from finetune.evaluation.options import Options
from finetune.evaluation.schema import Comparison, Evaluation, Score, TargetScores
from finetune.evaluation.scores.labels import LabelReader
from finetune.evaluation.scores.statistics import LossTable
from finetune.evaluation.scoring import Scoring
from finetune.evaluation.targets import Target, find_targets
from finetune.evaluation.tasks.table import TaskScore, TaskTable

# --- what is said of a target ------------------------------------------------------------------


def scored(tmp_path: Path, name: str, job: Any = None, **target: Any) -> ScoredTarget:
    from finetune.evaluation.predictions import write_predictions

    file = tmp_path / f"{name}.jsonl"
    write_predictions(file, [compared.scoring.score(SAID, Scoring())])
    return ScoredTarget(Target(name, f"path/{name}", target.pop("kind", "adapter"), **target), job, file, Options())  # fmt: skip


def test_what_is_said_of_a_target_is_what_was_noted_of_it(tmp_path: Path) -> None:
    facts = {"seconds": 2.5, "batch_size": 7, "prompts_per_rank": [3, 4], "dtype": "x"}
    results = SimpleNamespace(facts=facts, losses=lambda name: (np.array([len(name)]), np.ones(1)), note=lambda _: None)  # fmt: skip
    done: Any = SimpleNamespace(results=results, losses={"loss": 1, "general-1": 1}, general_name="general-1", options=Options(), settings=None)  # fmt: skip
    one = scored(tmp_path, "a", done, step=30, run="run")
    found = one.described
    assert (found.name, found.path, found.kind, found.step, found.run) == ("a", "path/a", "adapter", 30, "run")  # fmt: skip
    assert (found.seconds, found.batch_size, found.prompts_per_rank) == (2.5, 7, [3, 4])
    assert found.predictions == "predictions/a.jsonl"
    assert (found.scores["loss"].value, found.scores["general_loss"].value) == (4.0, 9.0)
    assert list(found.scores)[:3] == ["loss", "perplexity", "general_loss"]
    del done.losses["general-1"]
    assert "general_loss" not in scored(tmp_path, "b", done).described.scores
    bare = scored(tmp_path, "c").described
    assert (bare.seconds, bare.batch_size, bare.prompts_per_rank, bare.step) == (0.0, None, [], None)  # fmt: skip


def test_a_whole_evaluation_says_published_figures_needles_labels_and_versions(
    tmp_path: Path,
) -> None:
    one, other = scored(tmp_path, "a"), scored(tmp_path, "b")
    one.tasks = TaskTable({"needle/4": TaskScore("how", ("en:4:0",), (100.0,))})
    reader = LabelReader()
    for number in range(12):
        reader.add("yn"[number % 2], "y", f"d:{number}")
    other.labels = reader.table()
    found = compared.evaluation_of([one, other], Options(tasks=("glm4-chat",)), {"mine": "so"})
    assert [(figure.score, figure.value) for figure in found.published][1] == ("mmlu/acc", 72.4)
    assert found.needles == {"a": {"en:4:0": 100.0}}
    assert list(found.labels) == ["b"]
    assert (found.signatures["needle/4"], found.signatures["mine"]) == ("how", "so")
    assert "rouge-l" in found.signatures
    assert "torch" not in found.versions, "nothing was generated"
    assert {"jieba", "nltk", "pyicu-wheels", "rouge-chinese", "sacrebleu", "numpy"} <= {*found.versions}  # fmt: skip
    assert found.settings == {"definition": "default", "own": []}
    assert found.format == 1


def test_scores_of_the_same_questions_are_compared_and_of_others_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compared, "_slices", lambda _: {"kind": {}})
    targets = [scored(tmp_path, name) for name in "abc"]
    for one, ids in zip(targets, (("q1", "q2"), ("q1", "q2"), ("q1", "q3")), strict=True):
        one.tasks = TaskTable({"t/acc": TaskScore("s", ids, (0.0, 100.0)), "t/own": TaskScore("s", value=1.0)})  # fmt: skip
        one.losses = {"general_loss": LossTable(np.ones(2), np.ones(2), source="general_loss")}
    found = compared._comparisons(targets)
    assert [(one.a, one.b) for one in found if one.metric == "t/acc"] == [("b", "a")]
    assert len([one for one in found if one.metric == "general_loss"]) == 3
    assert len([one for one in found if one.metric == "exact_match"]) == 3
    assert not [one for one in found if one.metric == "t/own"]
    whole = compared.evaluation_of(targets, Options(), {})
    assert (len(whole.comparisons), whole.slices) == (len(found), {"kind": {}})
    targets[1].places = [("elsewhere", 1)]
    assert targets[0].places != targets[1].places
    odd = compared.evaluation_of(targets, Options(), {})
    assert (odd.comparisons, odd.slices) == ([], {}), "nothing is compared"


def test_where_nothing_was_generated_tasks_and_losses_are_compared_alone(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    made = [ScoredTarget(Target(name, name, "base"), None, tmp_path / "none.jsonl", Options()) for name in "ab"]  # fmt: skip
    for one in made:
        one.tasks = TaskTable({"t/acc": TaskScore("s", ("q1", "q2"), (0.0, 100.0))})
    assert [(one.a, one.b, one.metric) for one in compared._comparisons(made)] == [("b", "a", "t/acc")]  # fmt: skip
    assert compared.single(made[0], Evaluation(format=1, targets=[]))["scores"] == {}
    assert made[0].described.scores.keys() == {"t/acc"}


# --- targets -----------------------------------------------------------------------------------


def test_the_base_of_a_model_that_was_tuned_whole_is_scored_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"whole": "full", "merged": "merged", "plain": "model"}
    monkeypatch.setattr(targets, "kind_of", kinds.get)
    monkeypatch.setattr(targets, "recorded_base", lambda path: (f"base of {path}", None))
    found = find_targets(["plain", "whole", "merged"], with_base=True)
    assert [(one.name, one.kind, one.path) for one in found] == [
        ("base", "base", "base of whole"), ("plain", "base", "plain"), ("whole", "full", "whole"), ("merged", "merged", "merged"),
    ]  # fmt: skip


def test_a_tuned_model_that_names_no_base_has_none_to_score(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(targets, "kind_of", {"whole": "full", "plain": "model"}.get)
    monkeypatch.setattr(targets, "recorded_base", lambda _: (None, None))
    with pytest.raises(ModelError, match="none of the targets says which model it was tuned from"):
        find_targets(["whole"], with_base=True)
    found = find_targets(["whole", "plain"], with_base=True)
    assert [one.name for one in found] == ["whole", "plain"], "the base is there by name"


def test_the_base_of_a_prefix_is_looked_for_where_it_moved_like_that_of_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(targets, "recorded_base", lambda _: ("gone", "f"))
    monkeypatch.setattr(targets, "model_fingerprint", lambda _: "f")
    for kind, base in (("adapter", str(tmp_path)), ("prefix", str(tmp_path)), ("merged", None), ("full", None)):  # fmt: skip
        monkeypatch.setattr(targets, "_kind", lambda _, kind=kind: kind)
        assert targets._target("x", [str(tmp_path)]).base == base, kind


@pytest.mark.parametrize(
    ("name", "plain"), [("…", "target"), ("-a.", "a"), ("a//b c", "a-b-c"), ("好", "好")]
)
def test_a_name_is_good_for_a_file(name: str, plain: str) -> None:
    [found] = targets._named([Target(name, "p", "predictions")])
    assert found.name == plain


# --- reading it back ---------------------------------------------------------------------------


def read_back(place: Path, **changes: Any) -> Evaluation:
    target = {"name": "a", "path": "p", "kind": "base", "predictions": "p.jsonl", "scores": {"chrf": {"value": 1.0, "n": 2}}}  # fmt: skip
    place.mkdir(exist_ok=True)
    text = json.dumps({"format": 1, "targets": [target | changes.pop("target", {})]} | changes)
    (place / "evaluation.json").write_text(text)
    return schema.read_evaluation(place)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": []}, "holds no scores"), ({"target": {"scores": {}}}, "holds no scores"), ({"target": {"scores": {"chrf": {"n": 0}}}}, "holds no scores"),
        ({"format": 2}, "is not as `finetune evaluate` writes it:\n  format: "), ({"target": {"step": -1}}, "targets.0.step: "),
        ({"comparisons": [{"a": "a", "b": "b", "metric": "m", "difference": 1, "verdict": "best"}]}, "comparisons.0.verdict: "),
        ({"target": {"batch_size": 10**15}}, "targets.0.batch_size: "), ({"target": {"name": None}}, "targets.0.name: "),
    ],
)  # fmt: skip
def test_what_no_evaluation_says_is_named_by_its_place(
    tmp_path: Path, changes: Any, said: str
) -> None:
    assert read_back(tmp_path / "good").metrics == ["chrf"]
    with pytest.raises(DataError, match=re.escape(said)):
        read_back(tmp_path / "bad", **changes)


def test_a_folder_whose_files_changed_is_no_whole_evaluation(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [{"prediction": "a", "reference": "yes"}])
    folder.write(tmp_path / "out", [Target("one", str(one), "predictions")], [], Options())
    assert schema.read_evaluation(tmp_path / "out").num_samples == 1
    (tmp_path / "out" / "predictions" / "one.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"out is no whole evaluation: .*one\.jsonl"):
        schema.read_evaluation(tmp_path / "out")


def test_what_is_read_is_a_plain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(schema, "check_plain", asked.append)
    read_back(tmp_path)
    assert asked == [tmp_path / "evaluation.json"]


def test_samples_are_those_that_all_were_asked_for_in_one_order(tmp_path: Path) -> None:
    def row(place: int, **more: Any) -> dict[str, Any]:
        return {"where": "d", "message": place, "prediction": f"r{place}", "scores": {"x": place, "y": None}} | more  # fmt: skip

    scores = {"x": Score(value=1.0, n=1)}
    found = Evaluation(
        format=1, targets=[TargetScores(name=name, path=name, kind="full", predictions=f"{name}.jsonl", scores=scores) for name in "ab"],
    )  # fmt: skip
    write_rows(tmp_path / "a.jsonl", [row(1), row(2), row(3)])
    write_rows(tmp_path / "b.jsonl", [row(0), row(1, prediction="other"), row(3)])
    common = schema.common_rows(tmp_path, found)
    assert common == {("d", 1), ("d", 3)}
    one, other = schema.samples(tmp_path, found, common)
    assert (one.row["message"], one.replies, one.scores) == (1, ["r1", "other"], [{"x": 1.0}] * 2)
    assert other.row["message"] == 3
    write_rows(tmp_path / "b.jsonl", [row(3), row(1)])
    with pytest.raises(DataError, match=r"b\.jsonl has \('d', 3\) where .*a\.jsonl has \('d', 1\)"):
        list(schema.samples(tmp_path, found, common))
    for line, said in (("[1]\n", "b.jsonl:1: not a JSON object"), ("{\n", "evaluate again"), ("[" * 100_000, "evaluate again")):  # fmt: skip
        (tmp_path / "b.jsonl").write_text(line)
        with pytest.raises(DataError) as error:
            schema.common_rows(tmp_path, found)
        assert said in str(error.value)
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\); evaluate again"):
        list(schema._rows(tmp_path))


def test_the_first_comparison_of_two_is_told_from_both_sides_and_of_no_other_score() -> None:
    one = Comparison(a="x", b="y", metric="chrf", difference=2.0, verdict="better")
    found = Evaluation(
        format=1, targets=[], comparisons=[one.model_copy(update={"metric": "loss"}), one]
    )
    assert found.comparison("x", "y", "chrf") is one
    turned = found.comparison("y", "x", "chrf")
    assert turned is not None
    assert (turned.metric, turned.verdict) == ("chrf", "worse")
    assert found.comparison("x", "z", "chrf") is None
    assert found.comparison("z", "y", "chrf") is None
