"""Parts of the report: sentences in every direction, tables, colours, files that are not ours, the worst replies."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rows import write_rows
from test_report_runs import write_history
from test_report_words import compared, evaluation, score

from finetune.errors import ConfigError, DataError, ModelError, RequirementError
from finetune.evaluation.schema import Comparison, Evaluation, Score, TargetScores
from finetune.report import compare, export, page, page_data, plots, sentences, terminal, watching
from finetune.report.requirements import check_requirements, read_requirements
from finetune.report.runs import read_run
from finetune.report.status import Status

# --- sentences ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "text"),
    [(None, ""), (0.0009, "p < 0.001"), (0.001, "p = 0.001"), (0.0456, "p = 0.046"), (0.0999, "p = 0.100"), (0.1, "p = 0.10"), (0.456, "p = 0.46")],
)  # fmt: skip
def test_a_chance_has_the_places_that_matter(p: float | None, text: str) -> None:
    assert sentences.chance(p) == text


@pytest.mark.parametrize(
    ("name", "value", "signed", "text"),
    [("rouge-l", -1.25, False, "−1.2"), ("loss", 1.23456, True, "+1.235"), ("perplexity", 2.345, False, "2.35"), ("rouge-l", None, True, "–"), ("rouge-l", 0.0, True, "+0.0")],
)  # fmt: skip
def test_a_number_has_the_places_of_its_score(name: str, value: float | None, signed: bool, text: str) -> None:  # fmt: skip
    assert sentences.number(name, value, signed=signed) == text


def test_an_interval_needs_both_ends() -> None:
    assert sentences.interval("loss", Score(value=1, low=0.5, high=1.5)) == "0.500 to 1.500"
    for score_ in (Score(value=1, low=0.5), Score(value=1, high=1.5)):
        assert sentences.interval("loss", score_) == ""


@pytest.mark.parametrize(("verdict", "arrow"), [("better", "↑"), ("worse", "↓"), ("no real difference", "→")])  # fmt: skip
def test_an_arrow_says_how_a_target_stands_beside_the_base(verdict: str, arrow: str) -> None:
    found = evaluation(compared("one", "base", 1.0, verdict), base=1.0, one=2.0)
    base, one = found.targets
    assert sentences.arrow(found, one, "rouge-l") == arrow
    assert sentences.arrow(found, base, "rouge-l") == ""
    assert sentences.arrow(found, one, "chrf") == ""
    assert sentences.css(found.comparisons[0]) == verdict.replace(" ", "-")


def test_the_corrected_chance_is_said_and_the_plain_one_where_there_is_no_other() -> None:
    one = Comparison(a="x", b="y", metric="loss", difference=-0.5, p=0.01, p_holm=0.03, verdict="better")  # fmt: skip
    assert sentences.verdict(one) == "x is better than y in loss: −0.500 (p = 0.030)."
    assert sentences.verdict(one.model_copy(update={"p_holm": None})).endswith("(p = 0.010).")
    assert sentences.verdict(one.model_copy(update={"p_holm": None, "p": None, "verdict": "worse"})) == "x is worse than y in loss: −0.500."  # fmt: skip


def sliced(metric: str, whole: float, **parts: tuple[float, float, float, int]) -> Evaluation:
    found = evaluation(metric=metric, one=whole)
    slices = {"prompt_length": {name: {"one": {metric: {"value": v, "low": low, "high": high, "n": n}}} for name, (v, low, high, n) in parts.items()}}  # fmt: skip
    return found.model_copy(update={"slices": Evaluation.model_validate(found.model_dump() | {"slices": slices}).slices})  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "part", "named"),
    [
        ("rouge-l", (40.0, 35.0, 49.0, 10), True), ("rouge-l", (40.0, 35.0, 50.0, 10), False), ("rouge-l", (40.0, 35.0, 49.0, 9), False),
        ("rouge-l", (60.0, 55.0, 65.0, 99), False), ("loss", (60.0, 51.0, 65.0, 10), True), ("loss", (60.0, 50.0, 65.0, 10), False), ("length_ratio", (40.0, 35.0, 45.0, 99), False),
    ],
)  # fmt: skip
def test_a_weakness_lies_clearly_on_the_bad_side_of_the_whole(
    metric: str, part: tuple[float, float, float, int], named: bool
) -> None:
    said = sentences.weakness(sliced(metric, 50.0, short=part), metric)
    assert bool(said) is named
    if named:
        assert said[0].startswith("one is weakest on prompt length short: ")


def test_the_weakest_of_several_parts_is_named() -> None:
    low, lower = (40.0, 35.0, 45.0, 20), (30.0, 25.0, 35.0, 20)
    for parts in ({"a": low, "b": lower}, {"b": lower, "a": low}):
        [said] = sentences.weakness(sliced("rouge-l", 50.0, **parts), "rouge-l")
        assert "prompt length b: 30.0 (25.0 to 35.0), 20 replies" in said
    high, higher = (60.0, 55.0, 65.0, 20), (70.0, 65.0, 75.0, 20)
    [said] = sentences.weakness(sliced("loss", 50.0, a=high, b=higher), "loss")
    assert "prompt length b" in said


def test_the_best_is_compared_with_all_the_base_first_and_the_others_with_the_base() -> None:
    pairs = [compared(a, b, 1.0, "better") for a, b in (("two", "base"), ("two", "one"), ("one", "base"))]  # fmt: skip
    found = evaluation(*pairs, one=45.0, base=40.0, two=50.0)
    said = [text for _, text in sentences.verdicts(found, "rouge-l")]
    assert [text.split(" in ")[0] for text in said] == [
        "two is better than base", "two is better than one", "one is better than base",
    ]  # fmt: skip
    assert len(sentences.by_metric(found)) == 1
    assert sentences.by_metric(evaluation(one=1.0)) == []


def test_models_are_counted_by_what_they_are() -> None:
    found = evaluation(base=1.0, one=2.0, two=3.0)
    assert sentences.number_of(found) == "3 models"
    assert sentences.number_of(found, tuned=True) == "2 checkpoints"
    assert sentences.number_of(evaluation(base=1.0), tuned=True) == "1 model"
    assert sentences.number_of(evaluation(one=1.0)) == "1 checkpoint"
    assert [sentences.listed(list(names)) for names in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]  # fmt: skip


# --- requirements ------------------------------------------------------------------------------


def test_a_score_is_named_by_itself_and_a_task_by_its_only_score() -> None:
    found = evaluation(metric="mmlu/acc", one=70.0).model_dump()
    found["targets"][0]["scores"]["mmlu"] = score(10.0)
    both = Evaluation.model_validate(found)
    [said] = check_requirements(both, read_requirements(["mmlu < 20"]))
    assert "one has mmlu 10.0" in said
    found["targets"][0]["scores"]["gsm8k/a"] = found["targets"][0]["scores"]["gsm8k/b"] = score(1.0)
    two = Evaluation.model_validate(found)
    with pytest.raises(RequirementError, match="there is no score 'gsm8k'"):
        check_requirements(two, read_requirements(["gsm8k > 0"]))
    check_requirements(two, read_requirements(["gsm8k/a > 0"]))


def test_each_requirement_is_met_by_the_best_in_its_own_score() -> None:
    plain = evaluation(one=50.0, two=40.0).model_dump()
    for target, loss in zip(plain["targets"], (2.0, 1.0), strict=True):
        target["scores"]["loss"] = score(loss, 0.1)
    found = Evaluation.model_validate(plain)
    said = check_requirements(found, read_requirements(["rouge-l >= 50", "loss <= 1.0", "loss < 1.2 surely"]))  # fmt: skip
    assert [line.split(": ")[1].split(" has")[0] for line in said] == ["one", "two", "two"]
    with pytest.raises(RequirementError) as error:
        check_requirements(found, read_requirements(["rouge-l > 50", "loss < 1.05 surely", "loss < 2"]))  # fmt: skip
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["rouge-l > 50", "loss < 1.05 surely"]  # fmt: skip


# --- tables and pages --------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["=", "+", "-", "@"])
def test_no_text_is_a_formula_in_a_spreadsheet_and_columns_are_in_their_places(sign: str) -> None:
    found = evaluation(one=1.5).model_dump()
    found["targets"][0] |= {"name": f"{sign}SUM(1)", "step": 7}
    found["slices"] = {f"{sign}a": {f"{sign}b": {f"{sign}SUM(1)": {"rouge-l": score(3.0)}}}}
    rows = list(csv.reader(io.StringIO(export.comma_separated(Evaluation.model_validate(found)))))
    assert rows[0] == list(export.ROWS)
    assert rows[1] == [
        f"'{sign}SUM(1)",
        "adapter",
        "7",
        "",
        "",
        "rouge-l",
        "1.5",
        "0.5",
        "2.5",
        "50",
    ]
    assert rows[2][:6] == [f"'{sign}SUM(1)", "adapter", "7", f"'{sign}a", f"'{sign}b", "rouge-l"]


def targets(*given: tuple[str, str, str | None]) -> Evaluation:
    found = [TargetScores(name=name, path=name, kind=kind, step=None if run is None else 1, run=run, predictions="x", scores={"loss": Score(value=1.0, n=1)}) for name, kind, run in given]  # fmt: skip
    return Evaluation(format=1, targets=found)


def test_runs_have_a_colour_each_of_eight_and_the_base_has_its_own() -> None:
    given = [
        ("base", "base", None),
        ("a", "adapter", "r1"),
        ("b", "adapter", "r1"),
        ("c", "full", None),
    ]
    more = [(f"m{n}", "merged", None) for n in range(8)]
    assert page.colours_of(targets(*given, *more)) == [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    assert page._run_colours(targets(*given)) == {"r1": 1}
    assert page._legend(targets(*given), [0, 1, 1, 2]) == [("base", 0), ("r1", 1), ("c", 2)]


def test_scores_over_steps_rise_with_the_steps_and_others_are_levels() -> None:
    def target(name: str, step: int | None, value: float | None) -> TargetScores:
        return TargetScores(name=name, path=name, kind="adapter", step=step, run="r/x" if step else None, predictions="x", scores={"loss": Score(value=value, low=0.5, high=2.0, n=1)})  # fmt: skip

    found = Evaluation(format=1, targets=[target("c", 30, 1.0), target("b", 20, 2.0), target("level", None, 3.0), target("a", 10, 0.7), target("none", 5, None)])  # fmt: skip
    level, curve = page.metric_series(found, "loss", [1, 1, 2, 1, 1])
    assert (level.name, level.style, level.colour) == ("level", "level", 2)
    assert (curve.name, [(p.x, p.y, p.low) for p in curve.points]) == ("x", [(10, 0.7, 0.5), (20, 2.0, 0.5), (30, 1.0, 0.5)])  # fmt: skip
    both = [target("a", 10, 0.7), target("b", 20, 2.0).model_copy(update={"run": "s/x"})]
    alike = page.metric_series(Evaluation(format=1, targets=both), "loss", [1, 2])
    assert [(one.name, len(one.points)) for one in alike] == [("x", 1), ("x", 1)]


@pytest.mark.parametrize(
    ("number", "total", "shade"), [(0, 10, 0), (1, 10, 1), (2, 10, 2), (5, 10, 3), (9, 10, 5), (10, 10, 5), (1, 0, 5), (1, 100, 1)]
)  # fmt: skip
def test_a_cell_is_as_dark_as_its_share_of_the_row(number: int, total: int, shade: int) -> None:
    assert page._heat(number, total) == shade


def test_hidden_sentences_are_shown_by_depth_and_length() -> None:
    needles = {f"{language}:{length}:{depth}": value for language, value in (("en", 100.0), ("zh", 0.0)) for length in (4096, 16384, 512) for depth in (0, 50, 100)}  # fmt: skip
    del needles["en:512:100"], needles["zh:512:100"]
    [found] = page._needles(targets(("a", "base", None)).model_copy(update={"needles": {"a": needles | {"en:4096:0": None}}}))  # fmt: skip
    assert found["lengths"] == ["512", "4096", "16384"]
    assert [depth for depth, _ in found["rows"]] == ["0", "50", "100"]
    assert found["rows"][0][1] == [("50", 3), ("0", 0), ("50", 3)]
    assert found["rows"][2][1][0] == ("–", 0)


def test_lengths_fall_between_the_edges_they_belong_to() -> None:
    assert page._counted([0, 9, 10, 19, 25], [0.0, 10.0, 20.0]) == [2, 3]
    assert page.edges_of(0) == [0.0, 1.0]
    assert page.edges_of(29) == [float(n) for n in range(31)]
    assert page.edges_of(30) == [2.0 * n for n in range(17)]


def test_the_page_knows_which_scores_are_better_lower_or_neither() -> None:
    found = evaluation(compared("one", "base", 1.0, "better"), base=40.0, one=45.0, two=44.0)
    content = page_data.Content(1, metrics=["bleu-4"])
    data = json.loads(page_data.page_data(found, content, [0, 1, 2]))
    assert data["lower"] == ["loss", "perplexity", "general_loss", "repetition_rate"]
    assert data["neither"] == ["length_ratio"]
    assert (data["base"], data["best"], data["headline"]) == (0, 1, "bleu-4")
    assert [one["colour"] for one in data["targets"]] == [0, 1, 2]
    assert data["comparisons"] == [[1, 0, "rouge-l", 1.0, "better", sentences.verdict(found.comparisons[0])]]  # fmt: skip
    content.metrics = ["bleu-4", "rouge-l"]
    assert json.loads(page_data.page_data(found, content, [0, 1, 2]))["headline"] == "rouge-l"


def test_pictures_end_where_the_page_has_no_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def picture(_: Any, image: str) -> bytes:
        if image == "gone":
            raise DataError("gone")
        return image.encode() * 30

    monkeypatch.setattr(page_data, "picture", picture)
    monkeypatch.setattr(page_data, "PICTURE_BYTES", 100)
    pictures = page_data._Pictures(Path())
    assert [pictures.place(name) for name in ("a", "a", "gone", "b", "c", "a")] == [
        0, 0, "gone (this folder keeps no picture of it)", 1, "c (not in this page, which has its 0 MB of pictures)", 0,
    ]  # fmt: skip


# --- plots, terminal, comparisons, status, watching --------------------------------------------


@pytest.mark.parametrize(("vector", "ours"), [(True, True), (False, False)])
def test_a_bitmap_that_we_did_not_draw_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vector: bool, ours: bool
) -> None:
    picture = f"<svg><style>{plots.MARK}</style></svg>"
    monkeypatch.setattr(plots, "read_evaluation", lambda _: None)
    monkeypatch.setattr(plots, "_pictures", lambda *_: {"loss": picture})
    monkeypatch.setattr(plots, "painted", lambda _: b"new")
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", SimpleNamespace())
    (tmp_path / "plots").mkdir()
    bitmap = tmp_path / "plots" / "loss.png"
    bitmap.write_bytes(b"old")
    if vector:
        (tmp_path / "plots" / "loss.svg").write_text(picture)
    if ours:
        plots.write_plots(tmp_path)
        assert bitmap.read_bytes() == b"new"
        return
    with pytest.raises(ConfigError, match=r"loss\.png was not written by this program"):
        plots.write_plots(tmp_path)
    assert bitmap.read_bytes() == b"old"
    assert not (tmp_path / "plots" / "loss.svg").exists()


@pytest.mark.parametrize(("name", "worst"), [("rouge-l", [1.0, 2.0, 3.0]), ("repetition_rate", [9.0, 5.0, 4.0])])  # fmt: skip
def test_the_worst_replies_are_those_at_the_bad_end(tmp_path: Path, name: str, worst: list[float]) -> None:  # fmt: skip
    rows = [{"prediction": "x", "scores": {name: value}} for value in (4.0, None, 1.0, 9.0, 3.0, 2.0, 5.0)]  # fmt: skip
    write_rows(tmp_path / "one.jsonl", [*rows, {"prediction": "no scores"}])
    found = evaluation(one=1.0).targets[0]
    assert [value for value, _ in terminal.worst_samples(tmp_path, found, name)] == worst


def test_the_best_of_each_column_is_bold_where_there_is_a_choice() -> None:
    plain = evaluation(base=1.0, one=50.0, two=40.0).model_dump()
    for target, loss in zip(plain["targets"], (0.1, 2.0, 1.0), strict=True):
        target["scores"]["loss"] = score(loss, 0.1)
    found = Evaluation.model_validate(plain)

    def bold(target: int, name: str) -> bool:
        return "bold" in str(terminal._cell(found, found.targets[target], name).spans)

    assert [bold(n, "rouge-l") for n in range(3)] == [False, True, False]
    assert [bold(n, "loss") for n in range(3)] == [False, False, True]
    alone = evaluation(one=1.0)
    assert "bold" not in str(terminal._cell(alone, alone.targets[0], "rouge-l").spans)
    assert terminal._cell(found, found.targets[1], "rouge-l").plain == "50.0 (49.0 to 51.0)"
    assert terminal._cell(found, found.targets[1], "loss").plain == "2.000"


def test_a_long_line_is_cut_at_its_end() -> None:
    assert terminal._line("a\n b\t" + "c" * 156) == "a b " + "c" * 156
    assert terminal._line("x" * 161) == "x" * 158 + " …"


@pytest.mark.parametrize("what", ["where", "reference"])
def test_runs_that_answered_other_questions_are_named(tmp_path: Path, what: str) -> None:
    found = []
    for name in ("a", "b"):
        folder = write_history(tmp_path / name, [])
        row = {"where": "d:1", "message": 1, "prompt": "p", "reference": "r", "prediction": "x"}
        write_rows(folder / "predictions-2.jsonl", [row | ({what: "other"} if name == "b" else {})])
        found.append(read_run(folder))
    with pytest.raises(DataError, match="b-2: asked other questions than a-2"):
        compare.compare(found, tmp_path / "out")
    with pytest.raises(ConfigError, match="name two or more runs"):
        compare.compare(found[:1], tmp_path / "out")
    empty = read_run(write_history(tmp_path / "c", []))
    with pytest.raises(ConfigError, match=r"c: no predictions-STEP\.jsonl"):
        compare.compare([*found, empty], tmp_path / "out")


STATUS = Status(
    path="r", state="running", process="process 7", step=1234, steps=2000, loss=1.23456, learning_rate=1e-4,
    tokens_per_second=12345.6, seconds_per_step=1.0, seconds_left=90.0, checkpoint="c", best="b", best_metric="loss",
    best_value=0.5, written=1.0,
)  # fmt: skip


def test_what_a_status_knows_is_said_in_rows() -> None:
    found = dict(STATUS.rows())
    assert found["state"] == "running (process 7)"
    assert found["step"] == "1,234 of 2,000"
    assert (found["loss"], found["learning rate"], found["tokens a second"]) == ("1.2346", "1.00e-04", "12,346")  # fmt: skip
    assert (found["newest checkpoint"], found["best checkpoint"]) == ("c", "b (loss 0.5)")
    assert "left" in found
    bare = replace(STATUS, process=None, steps=None, seconds_left=None, loss=None, best_value=None, checkpoint=None)  # fmt: skip
    rows = dict(bare.rows())
    assert (rows["state"], rows["step"], rows["best checkpoint"], rows["newest checkpoint"]) == ("running", "1,234", "b", "none")  # fmt: skip
    assert not {"left", "loss"} & rows.keys()


def test_a_run_is_asked_whether_it_trains_before_its_checkpoints_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The last checkpoint comes, and the run ends, between the first question and the second.
    questions: list[str] = []

    def state(_: Path) -> Any:
        questions.append("state")
        return SimpleNamespace(state="running" if len(questions) < 2 else "done")

    def good(_: Any) -> list[str]:
        questions.append("checkpoints")
        return ["last"] if len(questions) > 1 else []

    monkeypatch.setattr(watching, "read_status", state)
    monkeypatch.setattr(watching, "_good", good)
    monkeypatch.setattr(watching.time, "sleep", lambda _: None)
    assert watching.until_over(["run"], lambda models: models) == ["last"]


@pytest.mark.parametrize(("left", "raises"), [(["a", "b"], True), (["a"], False), ([], False)])
def test_an_error_counts_unless_a_checkpoint_went_away(
    tmp_path: Path, left: list[str], raises: bool
) -> None:
    models = [str(tmp_path / name) for name in "ab"]
    for name in left:
        (tmp_path / name).mkdir()

    def fail(_: list[str]) -> None:
        raise ModelError("broken")

    if raises:
        with pytest.raises(ModelError):
            watching._made(fail, models)
    else:
        assert watching._made(fail, models) is None
