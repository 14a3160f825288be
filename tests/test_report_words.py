"""Evaluations and runs, read and said: every expected number and sentence is worked out by hand."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import command_line
import evaluations
import pytest

from finetune import console
from finetune.errors import ConfigError, DataError
from finetune.evaluation.schema import Evaluation, read_evaluation
from finetune.report import charts, page, page_data, plots, sentences
from finetune.report.page import write_page
from finetune.report.runs import differences, find_runs, read_run


def score(value: float | None, half: float = 1.0) -> dict[str, Any]:
    low, high = (None, None) if value is None else (value - half, value + half)
    return {"value": value, "low": low, "high": high, "n": 0 if value is None else 50}


def evaluation(*comparisons: dict[str, Any], metric: str = "rouge-l", **scores: float) -> Evaluation:  # fmt: skip
    """Targets by name; `base` is the untuned one."""
    targets = [
        {
            "name": name,
            "path": name,
            "kind": "base" if name == "base" else "adapter",
            "step": None if name == "base" else 10,
            "predictions": f"{name}.jsonl",
            "scores": {metric: score(value)},
        }
        for name, value in scores.items()
    ]
    return Evaluation.model_validate({"format": 1, "targets": targets, "comparisons": comparisons})


def compared(a: str, b: str, difference: float, verdict: str, metric: str = "rouge-l") -> dict[str, Any]:  # fmt: skip
    return {
        "a": a, "b": b, "metric": metric, "difference": difference, "low": difference - 2,
        "high": difference + 3, "p": 0.01, "p_holm": 0.0004 if verdict != "no real difference" else 0.213, "verdict": verdict,
    }  # fmt: skip


def test_the_answer_names_the_best_and_says_whether_it_is_really_better() -> None:
    found = evaluation(
        compared("one", "base", 40.0, "better"),
        compared("two", "base", 46.5, "better"),
        compared("two", "one", 6.5, "no real difference"),
        base=4.0, one=44.0, two=50.5,
    )  # fmt: skip
    assert sentences.conclusion(found, "rouge-l") == [
        "two has the highest rouge-l of 2 checkpoints: 50.5 (49.5 to 51.5).",
        "two is better than base in rouge-l: +46.5 (44.5 to 49.5; p < 0.001).",
        "Between it and one there is no real difference.",
    ]


def test_the_answer_names_the_slice_on_which_the_best_is_weakest() -> None:
    def part(value: float, half: float, n: int = 50) -> dict[str, Any]:
        scores = {name: {"rouge-l": score(value, half) | {"n": n}} for name in ("one", "two")}
        return scores | {"one": {"rouge-l": score(1.0, 0.1)}}

    found = evaluation(one=44.0, two=50.5)
    slices = {
        "kind": {"plain": part(58.0, 2.0), "tool": part(43.0, 2.0)},
        "prompt_length": {"1-64 tokens": part(41.5, 3.0), "65-256 tokens": part(30.0, 25.0)},
        "turns": {"3": part(5.0, 1.0, n=9)},
    }  # too few, and too uncertain to lie below the whole
    said = sentences.conclusion(found.model_copy(update={"slices": _slices(slices)}), "rouge-l")
    assert said[1:] == [
        "two is weakest on prompt length 1-64 tokens: 41.5 (38.5 to 44.5), 50 replies."
    ]
    even = {"kind": {"plain": part(51.0, 2.0), "tool": part(49.9, 2.0)}}
    assert not sentences.weakness(found.model_copy(update={"slices": _slices(even)}), "rouge-l")


def test_without_a_base_the_answer_says_what_the_best_is_better_than() -> None:
    found = evaluation(
        compared("two", "one", 6.5, "better"),
        compared("three", "one", 7.0, "better"),
        compared("three", "two", 0.5, "no real difference"),
        one=44.0, two=50.5, three=51.0,
    )  # fmt: skip
    assert sentences.conclusion(found, "rouge-l")[1:] == [
        "Between it and two there is no real difference.",
        "It is really better than one.",
    ]


def test_the_weakest_slice_by_perplexity_is_the_highest() -> None:
    found = evaluation(metric="perplexity", one=9.0)
    values = {"a": {"one": {"perplexity": score(12.0)}}, "b": {"one": {"perplexity": score(5.0)}}}
    said = sentences.conclusion(
        found.model_copy(update={"slices": _slices({"source": values})}), "perplexity"
    )
    assert said[1:] == ["one is weakest on source a: 12.00 (11.00 to 13.00), 50 replies."]


def _slices(found: dict[str, Any]) -> Any:
    return evaluation(one=1.0).model_validate({"format": 1, "targets": [], "slices": found}).slices


def test_a_lower_perplexity_is_better() -> None:
    found = evaluation(metric="perplexity", base=60.0, one=9.25, two=8.5)
    assert sentences.conclusion(found, "perplexity") == [
        "two has the lowest perplexity of 2 checkpoints: 8.50 (7.50 to 9.50)."
    ]


def test_no_length_ratio_is_the_best() -> None:
    for metric, bold in (("length_ratio", [False, False]), ("loss", [True, False])):
        found = evaluation(metric=metric, one=90.0, two=110.0)
        rows = page._rows(found, colours=[1, 2])
        assert [row["cells"][0]["best"] for row in rows] == bold


def test_scores_that_read_the_same_are_both_the_best_and_the_deciding_score_comes_first() -> None:
    found = evaluation(one=44.04, two=44.01, three=43.9)
    plain = found.model_dump()
    for target in plain["targets"]:
        target["scores"] = {"bleu-4": score(1.0)} | target["scores"]
    asked = Evaluation.model_validate(plain)
    assert page._ordered(asked) == ["rouge-l", "bleu-4"]
    rows = page._rows(asked, colours=[1, 2, 3])
    assert [row["cells"][0]["best"] for row in rows] == [True, True, False]
    negative = page._rows(evaluation(metric="yours", one=-3.0, two=-2.0), colours=[1, 2])
    assert [row["cells"][0]["best"] for row in negative] == [False, True]


def test_a_comparison_reads_the_same_from_both_sides() -> None:
    found = evaluation(compared("base", "one", -40.0, "worse"), base=4.0, one=44.0)
    turned = found.comparison("one", "base", "rouge-l")
    assert turned is not None
    assert (turned.difference, turned.low, turned.high, turned.verdict) == (40, 37, 42, "better")
    assert sentences.arrow(found, found.targets[1], "rouge-l") == "↑"
    assert sentences.arrow(found, found.targets[0], "rouge-l") == ""


def test_no_real_difference_is_said_in_words() -> None:
    found = evaluation(compared("one", "base", -0.4, "no real difference"), base=4.4, one=4.0)
    sentence = "No real difference between one and base in rouge-l: −0.4 (−2.4 to 2.6; p = 0.21)."
    assert sentences.verdict(found.comparisons[0]) == sentence
    assert sentences.arrow(found, found.targets[1], "rouge-l") == "→"


def test_one_model_alone_gets_a_report_too(tmp_path: Path) -> None:
    made = evaluations.write_evaluation(tmp_path / "out", runs=())
    text = write_page(made).read_text(encoding="utf-8")
    assert re.search(r"<p>base reaches \d+\.\d \(.*\) in rouge-l\.</p>", text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "evaluation.json").unlink(), "holds no evaluation.json"),
        (lambda folder: (folder / "evaluation.json").write_text("{"), "evaluate again"),
        (lambda folder: (folder / "evaluation.json").write_text('{"format": 2, "targets": []}'), "format"),
        (lambda folder: (folder / "predictions" / "lora-20.jsonl").unlink(), "lora-20.jsonl"),
        (lambda folder: (folder / "predictions" / "lora-20.jsonl").write_text("[1]\n"), "lora-20.jsonl:1"),
    ],
    ids=["absent", "torn", "another format", "no predictions", "no objects"],
)  # fmt: skip
def test_what_is_no_whole_evaluation_is_refused_by_name(
    tmp_path: Path, damage: Any, said: str
) -> None:
    made = evaluations.write_evaluation(tmp_path / "out")
    damage(made)
    with pytest.raises(DataError, match=said):
        write_page(made)
    assert not (made / "report.html").exists()


def test_samples_that_some_target_was_not_asked_for_are_left_out(tmp_path: Path) -> None:
    made = evaluations.write_evaluation(tmp_path / "out", samples=6)
    file = made / "predictions" / "lora-40.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:2] + lines[3:]), encoding="utf-8")
    found = page_data.read_content(made, read_evaluation(made))
    assert [one["where"].split(":")[1].split()[0] for one in found.samples] == ["1", "2", "4", "5", "6"]  # fmt: skip


def test_a_page_carries_evenly_spaced_samples_of_very_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_data, "MOST_SAMPLES", 4)
    made = evaluations.write_evaluation(tmp_path / "out", samples=10)
    found = page_data.read_content(made, read_evaluation(made))
    assert [one["number"] for one in found.samples] == [3, 5, 8, 10]
    assert len(found.reference_lengths) == found.num_samples == 10
    assert "4 of the 10 samples are in this page" in write_page(made).read_text(encoding="utf-8")


def test_json_in_the_page_cannot_leave_its_element() -> None:
    text = page_data.inert_json({"a": "</script><!--\u2028\ud800&"})
    assert text == '{"a":"\\u003c/script\\u003e\\u003c!--\\u2028\\ud800\\u0026"}'
    assert json.loads(text) == {"a": "</script><!--\u2028\ud800&"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        page_data.inert_json([float("nan")])  # a browser reads no NaN


def test_ticks_are_round_numbers_inside_the_range() -> None:
    assert charts.ticks(0, 106) == [0, 25, 50, 75, 100]
    assert charts.ticks(0.8, 4.1) == [1, 2, 3, 4]
    assert charts.ticks(0, 3, whole=True) == [0, 1, 2, 3]
    assert charts.ticks(5, 5) == [5]


def test_bins_hold_every_value_once_and_longer_ones_in_the_last() -> None:
    from finetune.report.page import _counted, edges_of

    assert edges_of(2) == [0, 1, 2, 3]
    assert _counted([0, 1, 1, 2, 9], edges_of(2)) == [1, 2, 2]
    assert len(edges_of(10_000)) == 31
    assert edges_of(10_000)[-1] > 10_000


def test_a_run_that_was_killed_while_it_wrote_is_read(tmp_path: Path) -> None:
    run = read_run(evaluations.write_run(tmp_path / "lora"))
    assert run.last_step == 60
    assert run.best("loss") == (60, pytest.approx(1 + 2.5 / 7))
    assert run.best("rouge-l") == (60, 50.0)
    assert run.best("chrf") is None
    assert (run.checkpoints, run.best_step) == ([20, 40, 60], 60)
    assert run.data["train"]["examples"] == 300


def test_runs_are_found_below_a_folder_and_differ_where_they_differ(tmp_path: Path) -> None:
    for place, rank in (("a", 8), ("deeper/b", 16)):
        evaluations.write_run(tmp_path / place, rank=rank)
    (tmp_path / "a" / "checkpoint-20" / "config.yaml").write_text("method: {kind: lora}\n")
    (tmp_path / "model").mkdir()
    found = find_runs(tmp_path)
    assert sorted(run.path.name for run in found) == ["a", "b"]
    found.sort(key=lambda run: run.path.name)
    assert differences(found) == [("method.rank", [8, 16])]
    with pytest.raises(ConfigError, match="is not a folder"):
        find_runs(tmp_path / "nowhere")


def with_chinese_name(made: Path) -> Path:
    """One metric only, and a checkpoint with a Chinese name."""
    file = made / "evaluation.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    for target in found["targets"]:
        target["scores"] = {"rouge-l": target["scores"]["rouge-l"]}
    found["targets"][-1]["name"] = "微调 $60$"
    file.write_text(json.dumps(found | {"comparisons": []}), encoding="utf-8")
    return made


def test_plots_say_when_they_cannot_show_chinese_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    painter = pytest.importorskip("resvg_py")
    draw = painter.svg_to_bytes
    monkeypatch.setattr(
        painter, "svg_to_bytes", lambda **how: draw(**how | {"skip_system_fonts": True})
    )
    made = with_chinese_name(evaluations.write_evaluation(tmp_path / "out", samples=4))
    plots.write_plots(made)
    assert "no font with Chinese characters" in capsys.readouterr().err
    # Without any font of the system every label is still there: a picture has more ink with them.
    picture = (made / "plots" / "rouge-l.svg").read_text(encoding="utf-8")
    bare = re.sub(r"<text.*?</text>", "", picture)
    assert len(plots.painted(picture)) > len(plots.painted(bare)) + 500


def test_plots_are_the_pages_curves_with_names_and_a_chinese_font_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = with_chinese_name(evaluations.write_evaluation(tmp_path / "out", samples=4))
    written = plots.write_plots(made)
    assert ("no font with Chinese" in capsys.readouterr().err) is not plots.has_chinese_font()
    names = {path.name for path in written}
    assert names == {f"{name}.{kind}" for name in ("loss", "rouge-l", "lengths") for kind in ("png", "svg")}  # fmt: skip
    assert "微调 $60$" in (made / "plots" / "lengths.svg").read_text(encoding="utf-8")
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes()[:4] == b"\x89PNG"
    curve = re.compile(r'<polyline class="curve [^>]*>')
    page_text = write_page(made).read_text(encoding="utf-8")
    drawn = curve.findall((made / "plots" / "rouge-l.svg").read_text(encoding="utf-8"))
    assert drawn
    assert all(one in page_text for one in drawn)


def test_plots_without_a_painter_are_svg_and_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    made = evaluations.write_evaluation(tmp_path / "out", samples=4)
    assert write_page(made).is_file()
    with pytest.raises(ConfigError, match=r"glm4-finetune\[report\]"):
        plots.write_plots(made)
    assert {path.suffix for path in (made / "plots").iterdir()} == {".svg"}


def test_a_report_of_runs_that_are_gone_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    made = evaluations.write_evaluation(tmp_path / "out", samples=4)
    shutil.rmtree(made / "runs")
    write_page(made)
    assert "lora: its losses and configuration are left out" in capsys.readouterr().err


def test_the_commands_print_and_write_what_they_say(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "write_plots", lambda folder: [])
    made = evaluations.write_evaluation(tmp_path / "out", samples=4)
    assert command_line.exit_code("report", str(made)) == 0
    assert f"report: {made / 'report.html'}" in capfd.readouterr().out
    assert command_line.exit_code("runs", str(tmp_path), "--json") == 0
    (run,) = json.loads(capfd.readouterr().out)
    assert (run["path"], run["steps"]) == (str(tmp_path / "lora"), 60)
    assert run["best"]["rouge-l"] == {"step": 60, "value": 50.0}
    assert command_line.exit_code("report", str(tmp_path)) == 2


def test_rich_texts_keep_their_side_in_a_plain_table(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.text import Text

    console.table(["a", "b"], [["x", Text("1.0", justify="right")], ["y", Text("↑ 22.0", justify="right")]])  # fmt: skip
    assert capsys.readouterr().out.splitlines()[2:] == ["x     1.0", "y  ↑ 22.0"]


def test_every_cell_of_the_table_has_the_interval_of_its_own_score(tmp_path: Path) -> None:
    made = evaluations.write_evaluation(tmp_path / "out", samples=12)
    found = read_evaluation(made)
    rows = page._rows(found, page.colours_of(found))
    for row in rows:
        cells = zip(page._ordered(found), row["cells"], strict=True)
        for name, cell in cells:
            assert cell["interval"] == sentences.interval(name, row["target"].scores[name])
    assert len({cell["interval"] for row in rows for cell in row["cells"]}) > len(rows)


def test_one_checkpoint_has_no_curves_of_one_dot(tmp_path: Path) -> None:
    made = evaluations.write_evaluation(tmp_path / "out", samples=4, steps=(20,))
    found = read_evaluation(made)
    drawn = page.panels(found, page.runs_of(made, found), page.colours_of(found))
    assert [title for title, _ in drawn] == ["loss while training"]
