"""An evaluation in short: scores with arrows, the answer in words, the three worst samples."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.evaluation.schema import (
    Evaluation,
    Score,
    TargetScores,
    predictions_of,
    read_evaluation,
)
from finetune.evaluation.scores.metrics import METRICS, headline_of, metric
from finetune.language import sentence, width, word
from finetune.report import sentences
from finetune.report.runs import Run, differences

if TYPE_CHECKING:
    from rich.text import Text

WORST = 3
LONGEST_LINE = 160
_COLOURS = {"↑": "green", "↓": "red", "→": "dim"}


def say_page(page: Path) -> None:
    """Says where the page of an evaluation is."""
    console.say(f"\n{word('report: ')}{page}")


def show(folder: Path) -> None:
    """Says what the evaluation in `folder` found."""
    evaluation = read_evaluation(folder)
    best = evaluation.best(evaluation.headline)
    on_page = {one.name for one in METRICS if one.shown == "page"}
    columns = (one.name for one in METRICS if one.name not in on_page)
    chosen = [name for name in columns if name in evaluation.metrics]
    # And what was asked for by name: public tasks, a judge, the user's own.
    chosen += [name for name in evaluation.metrics if name not in on_page]
    metrics = list(dict.fromkeys([evaluation.headline, *chosen]))
    console.table(
        ["model", *(metric(name).label for name in metrics)],
        [_row(evaluation, target, metrics) for target in evaluation.targets],
    )
    told = [
        *sentences.conclusion(evaluation, evaluation.headline),
        *sentences.beside_published(evaluation),
    ]
    for line in told:
        console.say(sentence(line))
    for name in metrics:
        if name in evaluation.signatures:
            console.say(f"{metric(name).label}: {evaluation.signatures[name]}")
    if not evaluation.num_samples and "loss" in evaluation.metrics:
        console.say(
            word("only the loss was measured, as in training; --generate asks for replies too")
        )
    worst = worst_samples(folder, best, evaluation.headline)
    if worst:
        console.say(f"\n{word('worst replies of ')}{best.name}:")
    for score, row in worst:
        console.say(_sample(evaluation.headline, score, row))


def show_differences(runs: Sequence[Run]) -> None:
    """Says in which options the runs differ."""
    rows = [[key, *(_text(value) for value in values)] for key, values in differences(runs)]
    if rows:
        console.table(["option", *(str(run.path) for run in runs)], rows)
    else:
        console.say("the configurations of these runs are the same")


def show_runs(runs: Sequence[Run]) -> None:
    """Says what runs there are, in what they differ, and how well they did."""
    different = dict(differences(runs)) if len(runs) > 1 else {}
    rows = []
    for number, run in enumerate(runs):
        options = [f"{key} {_text(values[number])}" for key, values in different.items() if values[number] is not None]  # fmt: skip
        scores = [best_score(run, "loss"), best_score(run, generated_headline(run))]
        rows.append([str(run.path), run.last_step, len(run.checkpoints), *scores, ", ".join(options)])  # fmt: skip
    console.table(["run", "steps", "checkpoints", "best loss", "best score", "differs in"], rows)


def generated_headline(run: Run) -> str | None:
    """The generated score that a run is listed with."""
    generated = [name for name in run.scored if metric(name).source == "replies"]
    return headline_of(generated) if generated else None


def best_score(run: Run, name: str | None) -> str:
    """`rouge-l 50.4 at 44`, or a dash."""
    found = run.best(name) if name else None
    if name is None or found is None:
        return "–"
    step, value = found
    named = "" if name == "loss" else f"{metric(name).label} "
    return f"{named}{sentences.number(name, value)} at {step}"


def worst_samples(
    folder: Path, target: TargetScores, name: str
) -> list[tuple[float, dict[str, Any]]]:
    """The samples with the worst scores, worst first; none for a score that no single reply has."""
    file = predictions_of(folder, target)

    def scored() -> Iterator[tuple[float, dict[str, Any]]]:
        with file.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                value = row.get("scores", {}).get(name)
                if value is not None:
                    yield value, row

    worst = heapq.nlargest if metric(name).lower_is_better else heapq.nsmallest
    return worst(WORST, scored(), key=lambda pair: pair[0])


def _row(evaluation: Evaluation, target: TargetScores, names: Sequence[str]) -> list[object]:
    return [target.name, *(_cell(evaluation, target, name) for name in names)]


def _cell(evaluation: Evaluation, target: TargetScores, name: str) -> Text:
    from rich.text import Text

    score = target.scores.get(name, Score())
    arrow = sentences.arrow(evaluation, target, name)
    said = sentences.number(name, score.value)
    if name == evaluation.headline and (between := sentences.interval(name, score)):
        said += f" ({between})"
    colour = _COLOURS.get(arrow, "")
    is_best = target is evaluation.best(name) and len(evaluation.targets) > 1
    return Text.assemble((f"{arrow} " if arrow else "", colour), (said, "bold" if is_best else ""), justify="right")  # fmt: skip


def _sample(name: str, score: float, row: dict[str, Any]) -> str:
    prompt = str(row.get("prompt", "")).removesuffix("<|assistant|>").rpartition("|>")[2]
    texts = {
        word("Prompt"): prompt,
        word("Reference"): str(row.get("reference", "")),
        word("Reply"): str(row.get("prediction", "")),
    }
    wide = max(map(width, texts)) + 2
    lines = [f"{row.get('where', '')}, {metric(name).label} {sentences.number(name, score)}"]
    lines += [
        f"  {said.lower()}{' ' * (wide - width(said))}{_line(text)}" for said, text in texts.items()
    ]
    return "\n".join(lines)


def _line(text: str) -> str:
    """A text on one line, its end left out when it is long; no terminal obeys what stands in it."""
    flat = " ".join(text.split())
    flat = "".join(char if char.isprintable() else repr(char)[1:-1] for char in flat)
    return flat if len(flat) <= LONGEST_LINE else flat[: LONGEST_LINE - 2] + " …"


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character: four rows of two dots."""


MANY_POINTS = 1000


def curve(points: Sequence[tuple[float, float]], *, columns: int = 60, rows: int = 8) -> list[str]:
    """Lines of text that draw values over steps, the axes' ends beside them; none for fewer than two points."""
    if len(points) < 2:
        return []
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    cells = [[0] * columns for _ in range(rows)]
    many = len(points) > MANY_POINTS  # then they lie close enough by themselves
    for step, value in points if many else _between(points, 2 * columns):
        x = round((step - steps[0]) / (steps[-1] - steps[0] or 1) * (2 * columns - 1))
        y = round((high - value) / (high - low or 1) * (4 * rows - 1))
        cells[y // 4][x // 2] |= DOTS[y % 4][x % 2]
    names = [f"{high:.4g}", *[""] * (rows - 2), f"{low:.4g}"]
    drawn = [f"{name:>8} \u2502{''.join(chr(0x2800 + bits) for bits in line)}" for name, line in zip(names, cells, strict=True)]  # fmt: skip
    ends = f"{steps[0]:g}".ljust(columns - len(f"{steps[-1]:g}")) + f"{steps[-1]:g}"
    return [
        *drawn,
        f"{'':>8} \u2514{chr(0x2500) * columns}",
        f"{'':>10}{ends}",
    ]


def _between(points: Sequence[tuple[float, float]], number: int) -> Iterator[tuple[float, float]]:
    """The points of straight lines from each to the next."""
    for (x0, y0), (x1, y1) in pairwise(points):
        for part in range(number + 1):
            yield x0 + (x1 - x0) * part / number, y0 + (y1 - y0) * part / number
