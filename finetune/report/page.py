"""An evaluation folder and its runs -> report.html, one file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

from markupsafe import Markup

from finetune import __version__, console
from finetune.evaluation.schema import (
    Evaluation,
    Score,
    TargetScores,
    goodness,
    read_evaluation,
    run_copy,
)
from finetune.evaluation.scores.labels import OTHER
from finetune.evaluation.scores.metrics import metric
from finetune.language import language, sentence, word
from finetune.report import sentences
from finetune.report.charts import Point, Series, histogram, lines
from finetune.report.page_data import ASSETS, Content, page_data, read_content
from finetune.report.runs import Run, differences, read_run
from finetune.storage.outputs import write_marked
from finetune.webpages import encodable, hashed, templates, theme

PAGE = "report.html"
SCRIPTS = ("difference.js", "slices.js", "samples.js", "page.js")
COLOURS = 8
BINS = 30


def write_page(folder: Path) -> Path:
    """Writes `report.html` beside the `evaluation.json` in `folder`, and returns its path.

    Raises:
        DataError: The folder is no whole evaluation.
    """
    evaluation = read_evaluation(folder)
    runs = runs_of(folder, evaluation)
    for name in {target.run for target in evaluation.targets if target.run} - set(runs):
        console.warn(
            f"{folder} keeps no records of {name}: its losses and configuration are left out of the "
            "report; evaluate again where the run lies"
        )
    text = encodable(page(evaluation, read_content(folder, evaluation), runs))
    return write_marked(folder / PAGE, text, mark="style-src")


def runs_of(folder: Path, evaluation: Evaluation) -> dict[str, Run]:
    """The runs of the targets by name, those whose records the folder keeps."""
    names = dict.fromkeys(target.run for target in evaluation.targets if target.run)
    kept = {name: run_copy(folder, name) for name in names}
    return {name: read_run(place) for name, place in kept.items() if place is not None}


def page(evaluation: Evaluation, content: Content, runs: Mapping[str, Run]) -> str:
    """The page's text."""
    colours = colours_of(evaluation)
    style, script = theme() + asset("page.css"), "\n".join(map(asset, SCRIPTS))
    headline = evaluation.headline
    template = templates(ASSETS).get_template("page.html")
    return template.render(
        title=_title(evaluation, content),
        files=evaluation.data,
        t=word,
        language=language(),
        conclusion=list(map(sentence, sentences.conclusion(evaluation, headline))),
        outcome=_outcome(evaluation, headline),
        differences=[(key, [_shown(v) for v in values]) for key, values in differences(list(runs.values()))],
        runs=runs,
        run_colours=_run_colours(evaluation),
        legend=_legend(evaluation, colours),
        panels=panels(evaluation, runs, colours),
        metrics=_ordered(evaluation),
        rows=_rows(evaluation, colours, content.reply_lengths),
        verdicts=[(kind, sentence(said)) for kind, said in sentences.verdicts(evaluation, headline)],
        by_metric=[(kind, sentence(said)) for kind, said in sentences.by_metric(evaluation)],
        published=_published(evaluation),
        confusions=_confusions(evaluation),
        spread=sentence(
            f"{len(content.samples):,} of the {content.num_samples:,} samples are in this page, evenly "
            "spaced; scores and lengths are of all."
        ),
        needles=_needles(evaluation),
        best=evaluation.best(headline),
        headline=headline,
        has_base=evaluation.base is not None,
        has_slices=bool(evaluation.slices),
        lengths=length_charts(evaluation, content, runs, colours),
        content=content,
        configs={name: _sections(run) for name, run in runs.items()},
        settings=_flat_settings(evaluation.settings),
        versions=evaluation.versions,
        signatures=evaluation.signatures,
        words=sentences,
        label=lambda name: metric(name).label,
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        style_hash=hashed(style),
        script_hash=hashed(script),
        data=page_data(evaluation, content, colours),
    )  # fmt: skip


def colours_of(evaluation: Evaluation) -> list[int]:
    """A colour per target: 0 for the base, one for all checkpoints of a run, others their own."""
    given: dict[str, int] = {}
    return [
        0 if one.kind == "base" else given.setdefault(one.run or one.name, len(given) % COLOURS + 1)
        for one in evaluation.targets
    ]


def panels(
    evaluation: Evaluation, runs: Mapping[str, Run], colours: Sequence[int]
) -> list[tuple[str, Markup]]:
    """(title, chart): the loss of the runs, then every metric of checkpoints over steps."""
    losses = [replace(one, name=sentence(one.name)) for one in loss_curves(evaluation, runs)]
    drawn = [(word("loss while training"), "loss", losses)]
    drawn += [
        (word(metric(name).label), name, metric_series(evaluation, name, colours))
        for name in _ordered(evaluation)
    ]
    return [
        (title, lines(series, title=name))
        for title, name, series in drawn
        if any(len(one.points) > 1 for one in series)  # one dot between axes tells nothing
    ]


def metric_series(evaluation: Evaluation, name: str, colours: Sequence[int]) -> list[Series]:
    """The base and merged models as levels, the checkpoints of every run as a line."""
    levels: list[Series] = []
    stepped: dict[str, tuple[list[Point], int]] = {}
    for target, colour in zip(evaluation.targets, colours, strict=True):
        score = target.scores.get(name)
        if score is None or score.value is None:
            continue
        point = Point(float(target.step or 0), score.value, score.low, score.high)
        if target.step is None:
            levels.append(Series(target.name, colour, [point], "level"))
        else:
            points, _ = stepped.setdefault(target.run or target.name, ([], colour))
            points.append(point)
    curves = [
        Series(_run_name(run), colour, sorted(points, key=lambda point: point.x))
        for run, (points, colour) in stepped.items()
    ]
    return [*levels, *curves]


def loss_curves(evaluation: Evaluation, runs: Mapping[str, Run]) -> list[Series]:
    """Training loss of every run as a thin line, validation loss with dots."""
    colours = _run_colours(evaluation)
    series = []
    for name, run in runs.items():
        training = [Point(x, y) for x, y in run.curve("loss")]
        held_out = [Point(x, y) for x, y in run.curve("eval_loss")]
        series.append(Series(f"{_run_name(name)}, training", colours[name], training, "thin"))
        series.append(Series(f"{_run_name(name)}, validation", colours[name], held_out))
    return series


def _title(evaluation: Evaluation, content: Content) -> str:
    number = evaluation.num_samples or content.num_samples
    named = sentences.number_of(evaluation)
    return sentence(f"{named} on {number:,} replies" if number else f"{named} by their loss")


def _run_colours(evaluation: Evaluation) -> dict[str, int]:
    pairs = zip(evaluation.targets, colours_of(evaluation), strict=True)
    return {target.run: colour for target, colour in pairs if target.run}


def _legend(evaluation: Evaluation, colours: Sequence[int]) -> list[tuple[str, int]]:
    names = {
        (_run_name(target.run) if target.run and target.step is not None else target.name): colour
        for target, colour in zip(evaluation.targets, colours, strict=True)
    }
    return list(names.items())


def _ordered(evaluation: Evaluation) -> list[str]:
    """The metrics, first the one that stands for all."""
    return list(dict.fromkeys([evaluation.headline, *evaluation.metrics]))


def _rows(
    evaluation: Evaluation, colours: Sequence[int], reply_lengths: Sequence[Sequence[int]] = ()
) -> list[dict[str, Any]]:
    def best_of(name: str) -> float | None:
        scores = [target.scores.get(name, Score()) for target in evaluation.targets]
        return max(scores, key=lambda score: goodness(name, score)).value

    best = {name: best_of(name) for name in evaluation.metrics}

    def cell(target: TargetScores, name: str) -> dict[str, Any]:
        score = target.scores.get(name, Score())
        return {
            "text": sentences.number(name, score.value),
            "interval": sentence(sentences.interval(name, score)),
            "arrow": sentences.arrow(evaluation, target, name),
            "best": metric(name).better != "neither"
            and score.value is not None
            and sentences.number(name, score.value) == sentences.number(name, best[name]),
        }

    return [
        {
            "target": target,
            "colour": colour,
            "empty": sum(not length for length in lengths),
            "replies": len(lengths),
            "cells": [cell(target, name) for name in _ordered(evaluation)],
        }
        for target, colour, lengths in zip(
            evaluation.targets, colours, reply_lengths or repeat(()), strict=False
        )
    ]


def _published(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Scores of public tasks beside published figures, those that some target has."""
    return [
        {
            "score": one.score,
            "model": one.model,
            "value": sentences.number(one.score, one.value),
            "cells": [
                (
                    sentences.number(one.score, score.value),
                    sentence(sentences.interval(one.score, score)),
                )
                for score in (
                    target.scores.get(one.score, Score()) for target in evaluation.targets
                )
            ],
        }
        for one in evaluation.published
        if any(one.score in target.scores for target in evaluation.targets)
    ]


def _confusions(evaluation: Evaluation) -> list[dict[str, Any]]:
    """For the base and the best, label by label: scores, and how often it was taken for each other."""
    best = evaluation.best(evaluation.headline).name
    names = dict.fromkeys([best, *([evaluation.base.name] if evaluation.base else [])])
    found = []
    for name in names:
        if (report := evaluation.labels.get(name)) is None:
            continue
        rows = zip(report.labels, report.precision, report.recall, report.f1, report.confusion, strict=True)  # fmt: skip
        found.append(
            {
                "name": name,
                "labels": [*report.labels, word(OTHER)],
                "rows": [
                    {
                        "label": label,
                        "scores": [f"{value:.1f}" for value in (precision, recall, f1)],
                        "cells": [(number, _heat(number, sum(numbers))) for number in numbers],
                    }
                    for label, precision, recall, f1, numbers in rows
                ],
            }
        )
    return found


def _needles(evaluation: Evaluation) -> list[dict[str, Any]]:
    """For every target: depth by length, the share of hidden sentences that it found."""
    found = []
    for name, needles in evaluation.needles.items():
        cells: dict[tuple[str, str], list[float]] = {}
        for place, value in needles.items():
            _, length, depth = [*place.split(":"), "", ""][:3]
            cells.setdefault((depth, length), []).append(value or 0.0)
        lengths, depths = (
            sorted({key[at] for key in cells}, key=lambda text: (len(text), text)) for at in (1, 0)
        )
        means = {key: sum(values) / len(values) for key, values in cells.items()}
        rows = [
            (depth, [(f"{mean:.0f}", _heat(round(mean), 100)) if (mean := means.get((depth, length))) is not None else ("–", 0) for length in lengths])
            for depth in depths
        ]  # fmt: skip
        found.append({"name": name, "lengths": lengths, "rows": rows})
    return found


def _heat(number: int, total: int) -> int:
    """0 to 5: the shade of a cell by its share of its row."""
    return 0 if not number else min(5, 1 + 5 * number // max(total, 1))


def _outcome(evaluation: Evaluation, headline: str) -> str:
    base, best = evaluation.base, evaluation.best(headline)
    found = evaluation.comparison(best.name, base.name, headline) if base else None
    return sentences.css(found) if found else "open"


def length_charts(
    evaluation: Evaluation, content: Content, runs: Mapping[str, Run], colours: Sequence[int]
) -> list[tuple[str, str, Markup]]:
    """(name, unit, histogram): base and best beside the references first, then what else there is."""
    everything = [content.reference_lengths, *content.reply_lengths]
    top = max((sorted(one)[int(len(one) * 0.99)] for one in everything if one), default=0)
    edges, ends = edges_of(top), edges_of(max(content.prompt_lengths, default=0))
    outline = _counted(content.reference_lengths, edges)
    prompts = histogram(ends, _counted(content.prompt_lengths, ends), title="Lengths of the prompts")  # fmt: skip
    unit = word("characters; line: references")
    first = (evaluation.base, evaluation.best(evaluation.headline))
    charts = [
        (target in first, target.name, unit, histogram(edges, _counted(found, edges), outline, title=f"Lengths of the replies of {target.name}", colour=colour))
        for target, found, colour in zip(evaluation.targets, content.reply_lengths, colours, strict=True)
    ]  # fmt: skip
    return [
        *[chart[1:] for chart in charts if chart[0]],
        (word("prompts"), word("characters"), prompts),
        *_training_lengths(runs),
        *[chart[1:] for chart in charts if not chart[0]],
    ]


def edges_of(top: int) -> list[float]:
    """Borders of at most `BINS` equal bins of whole numbers from 0 to beyond `top`."""
    width = max(1, -(-(top + 1) // BINS))
    return [float(width * place) for place in range(min(BINS, top // width + 1) + 1)]


def _counted(found: Sequence[int], edges: Sequence[float]) -> list[int]:
    """How many values lie between the edges; longer ones count in the last bin."""
    numbers = [0] * (len(edges) - 1)
    for value in found:
        numbers[min(int(value // (edges[1] - edges[0])), len(numbers) - 1)] += 1
    return numbers


def _training_lengths(runs: Mapping[str, Run]) -> list[tuple[str, str, Markup]]:
    """Tokens of the training examples, once per data set."""
    charts: dict[str, tuple[str, str, Markup]] = {}
    for name, run in runs.items():
        found = run.data.get("train", {})
        if "lengths" in found:
            edges, numbers = found["lengths"]["edges"], found["lengths"]["numbers"]
            chart = histogram(edges, numbers, title="Lengths of the training examples")
            charts.setdefault(found["fingerprint"], (f"training, {_run_name(name)}", "tokens", chart))  # fmt: skip
    return list(charts.values())


def _sections(run: Run) -> dict[str, list[tuple[str, str]]]:
    """Options by section, as text."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for key, value in run.config.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append((name or section, _shown(value)))
    return sections


def _flat_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    named = {key.replace("_", " "): value for key, value in settings.items() if value != []}
    return [(key, _shown(value)) for key, value in named.items()]


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _run_name(run: str) -> str:
    return Path(run).name


def asset(name: str) -> str:
    """The text of a style sheet or a script."""
    return (ASSETS / name).read_text(encoding="utf-8")
