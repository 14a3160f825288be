"""What the report's page, its data, its tables of text and `finetune status` take from an evaluation and its runs."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluations
import pytest
from test_report_parts import targets
from test_report_words import compared, evaluation, score

from finetune import __version__
from finetune.errors import ConfigError
from finetune.evaluation.schema import Evaluation, Published, Sample, TargetScores, read_evaluation
from finetune.evaluation.scores.metrics import metric
from finetune.report import (
    page,
    page_data,
    plots,
    sentences,
)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The base and two checkpoints of two runs each, on eight samples."""
    return evaluations.write_evaluation(tmp_path / "out", samples=8, runs=("lora", "wide"), steps=(20, 40))  # fmt: skip


# --- the page ----------------------------------------------------------------------------------


def test_a_page_says_what_was_asked_how_and_with_which_versions(made: Path) -> None:
    text = page.write_page(made).read_text(encoding="utf-8")
    head = text[: text.index("<main>")]
    assert "<title>5 models on 8 replies</title>" in head
    for said in ("data/heldout.jsonl · 8 samples", "decoding greedy", "max new tokens 64", "replies every_reply"):  # fmt: skip
        assert f"<span>{said}</span>" in head
    tail = text[text.index('<section id="made">') :]
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", tail)
    lora, wide = (str(made.parent / name) for name in ("lora", "wide"))
    for pair in (
        ("decoding", "greedy"), ("rouge-l", "f1, jieba words, mean over pairs"), ("torch", "2.13.0"), ("fingerprint", f"<code>{'5f3a' * 16}</code>"),
        ("lora 40", f"{lora}/checkpoint-40 <small>12 s</small>"), ("examples", "300"), ("tokens", "40,210"),
    ):  # fmt: skip
        assert pair in pairs, pair
    for run, rank in ((lora, "8"), (wide, "16")):
        [options] = re.findall(rf"Configuration of {run}</summary>(.*?)</details>", tail, re.DOTALL)
        assert "<h3>method</h3>" in options
        assert f"<dt>rank</dt><dd>{rank}</dd>" in options
    assert f"Written by finetune {__version__}." in tail
    assert [name for name, _ in page._legend(read_evaluation(made), [0, 1, 1, 2, 2])] == ["base", "lora", "wide"]  # fmt: skip
    assert f'<i class="mark c2"></i>{wide}</th>' in text, "a run of the table of differences"
    for part in ("style", "script"):
        [*_, shown] = re.findall(rf"<{part}>(.*?)</{part}>", text, re.DOTALL)
        assert f"{part}-src 'sha256-{page.hashed(shown)}'" in head
    file = made / "evaluation.json"
    file.write_text(file.read_text("utf-8").replace('"greedy"', '"half \\ud800 a pair"'), "utf-8")
    assert "decoding half \\ud800 a pair" in page.write_page(made).read_text("utf-8")
    (made / "report.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"report\.html was not written by this program"):
        page.write_page(made)


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [("better", "better"), ("worse", "worse"), ("no real difference", "no-real-difference"), (None, "open")],
)  # fmt: skip
def test_the_answer_has_the_colour_of_the_best_beside_the_base(
    verdict: str | None, outcome: str
) -> None:
    pairs = [compared("two", "base", 1.0, verdict)] if verdict else []
    other = compared("one", "base", 1.0, "better" if verdict == "worse" else "worse")
    found = evaluation(*pairs, other, base=40.0, one=41.0, two=45.0)
    assert page._outcome(found, "rouge-l") == outcome
    assert page._outcome(evaluation(one=1.0), "rouge-l") == "open"
    kinds = [kind for kind, _ in sentences.verdicts(found, "rouge-l")]
    assert kinds[: len(pairs)] == [outcome] * len(pairs)
    assert [kind for kind, _ in sentences.by_metric(found)] == [outcome] * len(pairs)


def test_losses_alone_have_another_title_and_what_all_were_asked_is_counted(made: Path) -> None:
    found = read_evaluation(made)
    assert page._title(found, page_data.Content(3)) == "5 models on 8 replies"
    bare = found.model_copy(update={"data": []})
    assert page._title(bare, page_data.Content(1234)) == "5 models on 1,234 replies"
    assert page._title(bare, page_data.Content(0)) == "5 models by their loss"


def test_labels_are_shown_of_the_best_then_of_the_base_as_shares_of_each_row() -> None:
    report = {"labels": ["ham", "spam"], "precision": [50.04, 60.0], "recall": [70.0, 80.0], "f1": [58.3, 68.6], "confusion": [[7, 3, 0], [1, 8, 1]]}  # fmt: skip
    plain = evaluation(base=40.0, one=41.0, two=45.0).model_dump()
    plain["labels"] = dict.fromkeys(("base", "one", "two"), report)
    best, base = page._confusions(Evaluation.model_validate(plain))
    assert (best["name"], base["name"]) == ("two", "base")
    assert best["labels"] == ["ham", "spam", "(none of them)"]
    assert best["rows"] == [
        {"label": "ham", "scores": ["50.0", "70.0", "58.3"], "cells": [(7, 4), (3, 2), (0, 0)]},
        {"label": "spam", "scores": ["60.0", "80.0", "68.6"], "cells": [(1, 1), (8, 5), (1, 1)]},
    ]
    del plain["labels"]["two"]
    assert [one["name"] for one in page._confusions(Evaluation.model_validate(plain))] == ["base"]


def test_published_figures_stand_beside_scores_that_somebody_has() -> None:
    found = evaluation(metric="mmlu/acc", base=70.5, one=70.0).model_dump()
    found["targets"][0]["scores"] = {"rouge-l": score(1.0)}
    figures = [Published(score=name, value=74.75, model="GLM-4-9B") for name in ("x/y", "mmlu/acc")]
    [row] = page._published(Evaluation.model_validate(found | {"published": figures}))
    assert (row["score"], row["model"], row["value"]) == ("mmlu/acc", "GLM-4-9B", "74.8")
    assert row["cells"] == [("–", ""), ("70.0", "69.0 to 71.0")]


def test_losses_are_drawn_run_by_run_training_thin_and_validation_with_dots(made: Path) -> None:
    found = read_evaluation(made)
    runs = page.runs_of(made, found)
    drawn = page.loss_curves(found, runs)
    assert [(one.name, one.style, one.colour) for one in drawn] == [
        ("lora, training", "thin", 1), ("lora, validation", "line", 1),
        ("wide, training", "thin", 2), ("wide, validation", "line", 2),
    ]  # fmt: skip
    assert [point.x for point in drawn[1].points] == [0, 20, 40]
    assert drawn[1].points[0].y == 3.9
    assert len(drawn[0].points) == 20
    (loss, chart), (headline, scores), *_ = page.panels(found, runs, page.colours_of(found))
    assert 'aria-label="loss over steps. ' in chart
    assert 'aria-label="rouge-l over steps. ' in scores
    assert (loss, headline) == ("loss while training", "rouge-l")
    assert "wide, validation: 3.9 to" in chart


def test_lengths_are_those_of_base_and_best_first_of_the_data_once(made: Path) -> None:
    found = read_evaluation(made)
    runs = page.runs_of(made, found)
    content = page_data.Content(3, prompt_lengths=[5, 70], reference_lengths=[30, 0], reply_lengths=[[10], [20], [5], [6], [25, 29]])  # fmt: skip
    charts = page.length_charts(found, content, runs, [0, 1, 1, 2, 2])
    best = found.best("rouge-l").name
    assert best == "wide 40"
    others = ["lora 20", "lora 40", "wide 20"]
    assert [name for name, _, _ in charts] == ["base", best, "prompts", "training, lora", *others]
    assert [unit for _, unit, _ in charts[:4]] == ["characters; line: references"] * 2 + ["characters", "tokens"]  # fmt: skip
    drawn = {name: str(chart) for name, _, chart in charts}
    assert f'aria-label="Lengths of the replies of {best}"' in drawn[best]
    assert '"bar c2"' in drawn[best]
    bare = {name: replace(run, data={"train": {"fingerprint": "x"}}) for name, run in runs.items()}
    assert len(page.length_charts(found, content, bare, [0, 1, 1, 2, 2])) == len(charts) - 1
    assert '"bar c0"' in drawn["base"]
    assert "outline" in drawn["base"]
    assert "outline" not in drawn["prompts"]
    assert re.findall("<title>([^<]*: 1)</title>", drawn["prompts"]) == ["3 to 6: 1", "69 to 72: 1"]
    assert re.findall("<title>([^<]*: 1)</title>", drawn[best]) == ["24 to 26: 1", "28 to 30: 1"]
    assert re.findall("<title>(.*?)</title>", drawn["training, lora"])[0] == "0 to 120: 100"
    assert 'aria-label="Lengths of the training examples"' in drawn["training, lora"]


def test_few_very_long_replies_do_not_squeeze_all_the_others() -> None:
    found = evaluation(one=1.0)
    content = page_data.Content(200, reference_lengths=[0], reply_lengths=[[*range(100), *range(99), 5000]])  # fmt: skip
    [chart, _] = page.length_charts(found, content, {}, [1])
    titles = re.findall("<title>(.*?)</title>", chart[2])
    assert titles[-1].startswith("96 to 100: "), "edges are those of the 99th of a hundred"
    assert sum(int(title.split(": ")[1]) for title in titles) == 200


def test_options_are_shown_by_section_as_they_are_written() -> None:
    run: Any = type("Run", (), {"config": {"method.kind": "lora", "method.targets": ["甲"], "seed": None, "a.b.c": True}})  # fmt: skip
    assert page._sections(run) == {"method": [("kind", "lora"), ("targets", '["甲"]')], "seed": [("seed", "–")], "a": [("b.c", "true")]}  # fmt: skip
    settings = {"max_new_tokens": 64, "tasks": [], "system": "甲", "seed": 0}
    assert page._flat_settings(settings) == [("max new tokens", "64"), ("system", "甲"), ("seed", "0")]  # fmt: skip


# --- its data ----------------------------------------------------------------------------------


def test_a_sample_keeps_its_place_its_texts_and_the_slices_that_say_something() -> None:
    row = {"where": "d.jsonl:3", "message": 2, "prompt": "p", "reference": "r", "slices": {"kind": "tool", "source": "", "turns": 3}, "images": ["a", 5]}  # fmt: skip
    pictures: Any = type("Pictures", (), {"place": staticmethod(lambda name: f"place of {name}")})
    packed = page_data._packed(0, Sample(row, ["x", "y"], [{"rouge-l": 1.0}, {}]), pictures)
    assert packed == {
        "number": 1, "where": "d.jsonl:3 message 3", "prompt": "p", "reference": "r", "replies": ["x", "y"],
        "scores": [{"rouge-l": 1.0}, {}], "slices": {"kind": "tool", "turns": "3"}, "images": ["place of a", "place of 5"],
    }  # fmt: skip
    bare = page_data._packed(6, Sample({"slices": [], "images": []}, [], []), pictures)
    assert bare == {"number": 7, "where": "", "prompt": "", "reference": "", "replies": [], "scores": [], "slices": {}}  # fmt: skip


def test_lengths_and_scores_of_the_page_are_those_of_the_predictions(made: Path) -> None:
    found = read_evaluation(made)
    content = page_data.read_content(made, found)
    rows = [[json.loads(line) for line in (made / one.predictions).read_text("utf-8").splitlines()] for one in found.targets]  # fmt: skip
    assert content.prompt_lengths == [len(row["prompt"]) for row in rows[0]]
    assert content.reference_lengths == [len(row["reference"]) for row in rows[0]]
    assert content.reply_lengths == [[len(row["prediction"]) for row in each] for each in rows]
    assert content.metrics == ["bleu-4", "rouge-l", "exact_match", "stop_rate"]
    one = content.samples[5]
    assert one["scores"] == [[each[5]["scores"][name] for name in content.metrics] for each in rows]
    assert one["replies"] == [each[5]["prediction"] for each in rows]
    content.samples[0]["scores"][0] = {"mine": 1.0, "rouge-l": 2.0, "bleu-4": 3.0, "added": 4.0}
    assert page_data._metrics([{"scores": content.samples[0]["scores"][:1]}], found) == ["bleu-4", "rouge-l", "added", "mine"]  # fmt: skip
    data = json.loads(page_data.page_data(found, page_data.read_content(made, found), [0, 1, 1, 2, 2]))  # fmt: skip
    assert data["slices"]["kind"]["tool"]["base"]["rouge-l"]["n"] > 0
    assert (data["sliceMetrics"], data["sliceMetric"]) == (found.metrics, "rouge-l")
    assert (len(data["samples"]), data["words"], data["pictures"]) == (8, {}, [])


def test_plots_are_named_as_files_may_be_and_have_scores_only_over_steps(made: Path) -> None:
    file = made / "evaluation.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    for target in found["targets"]:
        scores = target["scores"]
        target["scores"] = {"rouge-l": scores["rouge-l"], "my:own/甲 b": scores["bleu-4"], "x" * 120: scores["bleu-4"]}  # fmt: skip
    file.write_text(json.dumps(found | {"comparisons": []}), encoding="utf-8")
    pictures = plots._pictures(made, read_evaluation(made))
    assert list(pictures) == ["loss", "rouge-l", "my-own-甲-b", "x" * 100, "lengths"]
    assert ">my:own/甲 b</text>" in pictures["my-own-甲-b"]
    assert ">base, characters; line: references</text>" in pictures["lengths"]
    assert ">prompts, characters</text>" in pictures["lengths"]
    for target in found["targets"]:
        target |= {"step": None, "run": None}
    file.write_text(json.dumps(found | {"comparisons": []}), encoding="utf-8")
    assert list(plots._pictures(made, read_evaluation(made))) == ["lengths"]


def test_targets_without_a_run_are_drawn_by_their_names() -> None:
    def target(name: str, step: int | None, value: float | None) -> TargetScores:
        return TargetScores(name=name, path=name, kind="adapter", step=step, predictions="x", scores={} if value is None else {"loss": score(value)})  # fmt: skip

    found = Evaluation(format=1, targets=[target("a", 2, 1.0), target("b", 4, 2.0), target("c", 4, None)])  # fmt: skip
    assert [(one.name, one.colour, len(one.points)) for one in page.metric_series(found, "loss", [1, 2, 3])] == [("a", 1, 1), ("b", 2, 1)]  # fmt: skip
    assert page.runs_of(Path(), found) == {}


def test_a_merged_model_of_a_run_is_named_by_itself_and_no_score_is_no_best() -> None:
    found = targets(("a", "adapter", "r/1"), ("b", "merged", "r/1"))
    merged = found.targets[1].model_copy(update={"step": None})
    found = found.model_copy(update={"targets": [found.targets[0], merged]})
    assert page._legend(found, [1, 1]) == [("1", 1), ("b", 1)]
    bare = evaluation(one=1.0, two=2.0).model_dump()
    for target in bare["targets"]:
        target["scores"]["chrf"] = {"value": None, "n": 3}
    rows = page._rows(Evaluation.model_validate(bare), [1, 2])
    assert [[cell["best"] for cell in row["cells"]] for row in rows] == [[False, False], [True, False]]  # fmt: skip


def test_the_data_of_a_page_without_a_base_has_none_and_compares_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = evaluation(compared("two", "one", 1.0, "better"), compared("two", "gone", 1.0, "better"), one=1.0, two=2.0)  # fmt: skip
    data = json.loads(page_data.page_data(found, page_data.Content(0), [1, 2]))
    assert (data["base"], data["best"], data["headline"]) == (None, 1, None)
    assert [row[:2] for row in data["comparisons"]] == [[1, 0]]
    monkeypatch.setenv("FINETUNE_LANG", "zh")
    words = page_data._words()
    assert sum(bool(re.search("[\u4e00-\u9fff]", text)) for text in words.values()) > 5
    assert all(text != said for text, said in words.items())


def test_a_chinese_page_says_its_title_its_answer_and_its_intervals_in_chinese(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_LANG", "zh")
    found = read_evaluation(made)
    runs, colours = page.runs_of(made, found), page.colours_of(found)
    titles = [title for title, _ in page.panels(found, runs, colours)]
    curves = page.panels(found, runs, colours)[0][1]
    assert "lora，训练" in curves
    said = [page._title(found, page_data.Content(3)), *titles[:1]]
    alone = evaluation(one=1.0)
    said += map(page.sentence, page.sentences.conclusion(alone, alone.headline))
    assert all(re.search("[\u4e00-\u9fff]", text) for text in said), said
    assert not [text for text in said if re.search(" (on|in|reaches|replies|models?) ", text)]
    intervals = {cell["interval"] for row in page._rows(found, colours) for cell in row["cells"]}
    assert any(" 至 " in text for text in intervals)
    assert not any(" to " in text for text in intervals)


def test_plots_are_drawn_again_over_ours_and_through_no_link(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plots, "_pictures", lambda *_: {"loss": f"<svg>{plots.MARK}</svg>"})
    monkeypatch.setattr(plots, "painted", lambda _: b"png")
    for _ in range(2):
        assert [file.name for file in plots.write_plots(made)] == ["loss.svg", "loss.png"]
    for name in ("loss.svg", "loss.png"):
        (tmp_path / "mine").write_text("mine")
        for file in (made / "plots").iterdir():
            file.unlink()
        (made / "plots" / name).symlink_to(tmp_path / "mine")
        with pytest.raises(ConfigError, match=f"{name} is a link"):
            plots.write_plots(made)
        assert (tmp_path / "mine").read_text() == "mine"
        (made / "plots" / name).unlink()
        plots.write_plots(made)
    shutil.move(made / "plots", tmp_path / "elsewhere")
    (made / "plots").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="plots is a link"):
        plots.write_plots(made)


# --- its markup --------------------------------------------------------------------------------


def with_everything(made: Path) -> Path:
    """The evaluation with labels, hidden sentences, a published figure, seven scores and an empty reply."""
    file = made / "evaluation.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    for number, target in enumerate(found["targets"]):
        target["scores"] |= {f"t{n}/acc": {"value": 10.0 * n + number, "low": n, "high": n + 0.5, "n": 9} for n in range(3)}  # fmt: skip
    report = {"labels": ["ham"], "precision": [50.0], "recall": [70.0], "f1": [58.3], "confusion": [[7, 3]]}  # fmt: skip
    found["labels"] = {"base": report}
    found["needles"] = {"base": {"en:4096:50": 100.0}}
    found["published"] = [{"score": "t1/acc", "value": 72.4, "model": "GLM"}]
    file.write_text(json.dumps(found), encoding="utf-8")
    replies = made / found["targets"][0]["predictions"]
    rows = [json.loads(line) for line in replies.read_text("utf-8").splitlines()]
    rows[3]["prediction"] = ""
    replies.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return made


def cells_of(text: str, table: str) -> list[list[str]]:
    """The cells of a table of the page, row by row, markup and all."""
    [found] = re.findall(rf'<table class="{table}">(.*?)</table>', text, re.DOTALL)[:1]
    rows = re.findall(r"<tr>(.*?)</tr>", found, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>.*?</t[hd]>", row, re.DOTALL) for row in rows]


def test_every_cell_of_the_pages_table_says_what_its_score_is(made: Path) -> None:
    found = read_evaluation(with_everything(made))
    text = page.write_page(made).read_text(encoding="utf-8")
    content = page_data.read_content(made, found)
    head, *rows = cells_of(text, "scores")
    labels = [re.sub("<[^>]*>", "", cell) for cell in head]
    assert labels == ["Model", *(metric(name).label for name in page._ordered(found))]
    words = {"↑": ("better", "better than the base"), "↓": ("worse", "worse than the base"), "→": ("level", "no real difference to the base")}  # fmt: skip
    expected = page._rows(found, page.colours_of(found), content.reply_lengths)
    assert {cell["arrow"] for row in expected for cell in row["cells"]} >= {"", "↑"}
    for row, cells in zip(expected, rows, strict=True):
        assert f'<i class="mark c{row["colour"]}"></i>{row["target"].name}<small>' in cells[0]
        assert ("; 1 of 8 replies empty" in cells[0]) is (row["target"].name == "base")
        step = row["target"].step
        assert (f", at step {step}" if step else "base; 1 of 8") in cells[0]
        for told, cell in zip(row["cells"], cells[1:], strict=True):
            assert ('class="best"' in cell) is told["best"]
            kind, said = words.get(told["arrow"], ("", ""))
            arrow = f'<span class="arrow {kind}" role="img" aria-label="{said}" title="{said}">{told["arrow"]}</span>'  # fmt: skip
            assert f"{arrow if said else ''}{told['text']}<small>{told['interval']}</small></td>" in cell  # fmt: skip
    _, published = cells_of(text[text.index('<section id="published">') :], "scores")
    assert [re.sub("<[^>]*>", " ", cell).split() for cell in published[1:3]] == [["72.4", "GLM"], ["10.0", "1.0", "to", "1.5"]]  # fmt: skip
    _, needles = cells_of(text[text.index('<section id="needles">') :], "confusion")
    assert needles[0] == '<th scope="row">50</th>'
    assert needles[1] == '<td class="heat5">100</td>'
    _, labelled = cells_of(text[text.index('<section id="labels">') :], "confusion")
    assert [re.sub("<[^>]*>", "", cell) for cell in labelled] == ["ham", "50.0", "70.0", "58.3", "7", "3"]  # fmt: skip


def test_a_page_has_the_parts_that_it_has_something_for_and_leads_to_each(made: Path) -> None:
    for copy, more in zip(sorted((made / "runs").iterdir()), ("seed: null", "list: [甲]"), strict=True):  # fmt: skip
        with (copy / "config.yaml").open("a", encoding="utf-8") as file:
            file.write(f"  {more}\n")
    text = page.write_page(with_everything(made)).read_text(encoding="utf-8")
    shown = dict(re.findall(r'<tr><th scope="row">([a-z.]+)</th>((?:<td>[^<]*</td>)+)</tr>', text))
    assert sorted(re.findall("<td>(.*?)</td>", shown["training.list"])) == ["[&#34;甲&#34;]", "–"]
    parts = re.findall(r'<section id="(\w+)">', text)
    assert parts == ["differences", "scores", "published", "needles", "labels", "verdicts", "slices", "lengths", "samples", "made"]  # fmt: skip
    [nav] = re.findall("<nav .*?</nav>", text, re.DOTALL)
    led = re.findall(r'<a href="#(\w+)">([^<]*)</a>', nav)
    assert [place for place, _ in led] == [one for one in parts if one not in ("published", "needles")]  # fmt: skip
    assert [word for _, word in led] == ["Runs", "Scores", "Labels", "Verdicts", "Slices", "Lengths", "Samples", "How it was made"]  # fmt: skip
    assert '<a class="skip" href="#samples">Skip to the samples</a>' in text
    assert re.findall(r"<summary>(\d+) more scores over steps</summary>", text) == ["2"]
    assert re.findall(r"<summary>(\d+) more</summary>", text) == ["4"]
    panels = re.findall(r"<figcaption>([^<]*?)(?: <small>([^<]*)</small>)?</figcaption>", text)
    assert [name for name, _ in panels[:2]] == ["loss while training", "rouge-l"]
    assert panels[0][1] == "thin: training, dots: validation"
    assert [said for _, said in panels[1:8]] == [""] * 7
    assert "Arrows compare with the base" in text
    assert 'id="pair-table"' in text
    alone = evaluations.write_evaluation(made.parent / "alone", samples=2, runs=())
    text = page.write_page(alone).read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)">', text) == ["scores", "slices", "lengths", "samples", "made"]  # fmt: skip
    assert 'id="pair-table"' not in text
    assert "evenly spaced" not in text
    found = json.loads((alone / "evaluation.json").read_text("utf-8"))
    found["targets"][0] |= {"kind": "merged"}
    (alone / "evaluation.json").write_text(json.dumps(found | {"slices": {}, "data": []}))
    (alone / found["targets"][0]["predictions"]).write_text("")
    text = page.write_page(alone).read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)">', text) == ["scores", "made"]
    assert '<a class="skip" href="#scores">Skip to the scores</a>' in text
    assert "Arrows compare" not in text
