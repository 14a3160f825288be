"""An evaluation in short: scores with arrows, the answer in words, the three worst samples."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.evaluation.uncertainty import LOWER_IS_BETTER
from finetune.report import sentences
from finetune.report.folder import Evaluation, Score, Target, read_evaluation
from finetune.report.runs import Run, differences

if TYPE_CHECKING:
    from rich.text import Text

SHOWN = ("loss", "rouge-l", "bleu-4", "chrf", "exact_match", "tool_call_accuracy", "stop_rate")
"""Scores that have a column, after the one that stands for all; the page has the others."""
WORST = 3
LONGEST_LINE = 160
_COLOURS = {"↑": "green", "↓": "red", "→": "dim"}


def show(folder: Path) -> None:
    """Says what the evaluation in `folder` found."""
    evaluation = read_evaluation(folder)
    best = evaluation.best(evaluation.headline)
    chosen = [name for name in SHOWN if name in evaluation.metrics and name != evaluation.headline]
    metrics = [evaluation.headline, *chosen]
    console.table(
        ["model", *(sentences.label(name) for name in metrics)],
        [_row(evaluation, target, metrics) for target in evaluation.targets],
    )
    for sentence in sentences.conclusion(evaluation, evaluation.headline):
        console.say(sentence)
    for name in metrics:
        if name in evaluation.signatures:
            console.say(f"{sentences.label(name)}: {evaluation.signatures[name]}")
    if not evaluation.num_samples:
        console.say("only the loss was measured, as in training; --generate asks for replies too")
    worst = worst_samples(folder, best, evaluation.headline)
    if worst:
        console.say(f"\nworst replies of {best.name}:")
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
        scores = [best_score(run, "loss"), best_score(run, headline_of(run))]
        rows.append([str(run.path), run.last_step, len(run.checkpoints), *scores, ", ".join(options)])  # fmt: skip
    console.table(["run", "steps", "checkpoints", "best loss", "best score", "differs in"], rows)


def headline_of(run: Run) -> str | None:
    """The generated score that a run is listed with."""
    return next((name for name in SHOWN if name != "loss" and name in run.scored), None)


def best_score(run: Run, metric: str | None) -> str:
    """`rouge-l 50.4 at 44`, or a dash."""
    found = run.best(metric) if metric else None
    if metric is None or found is None:
        return "–"
    step, value = found
    named = "" if metric == "loss" else f"{sentences.label(metric)} "
    return f"{named}{sentences.number(metric, value)} at {step}"


def worst_samples(folder: Path, target: Target, metric: str) -> list[tuple[float, dict[str, Any]]]:
    """The samples with the worst scores, worst first; none for a score that no single reply has."""

    def scored() -> Iterator[tuple[float, dict[str, Any]]]:
        with (folder / target.predictions).open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                value = row.get("scores", {}).get(metric)
                if value is not None:
                    yield value, row

    worst = heapq.nlargest if metric in LOWER_IS_BETTER else heapq.nsmallest
    return worst(WORST, scored(), key=lambda pair: pair[0])


def _row(evaluation: Evaluation, target: Target, metrics: Sequence[str]) -> list[object]:
    return [target.name, *(_cell(evaluation, target, metric) for metric in metrics)]


def _cell(evaluation: Evaluation, target: Target, metric: str) -> Text:
    from rich.text import Text

    score = target.scores.get(metric, Score())
    arrow = sentences.arrow(evaluation, target, metric)
    said = sentences.number(metric, score.value)
    if metric == evaluation.headline and (between := sentences.interval(metric, score)):
        said += f" ({between})"
    colour = _COLOURS.get(arrow, "")
    is_best = target is evaluation.best(metric) and len(evaluation.targets) > 1
    return Text.assemble((f"{arrow} " if arrow else "", colour), (said, "bold" if is_best else ""), justify="right")  # fmt: skip


def _sample(metric: str, score: float, row: dict[str, Any]) -> str:
    prompt = str(row.get("prompt", "")).removesuffix("<|assistant|>").rpartition("|>")[2]
    lines = (
        f"{row.get('where', '')}, {sentences.label(metric)} {sentences.number(metric, score)}",
        f"  prompt     {_line(prompt)}",
        f"  reference  {_line(str(row.get('reference', '')))}",
        f"  reply      {_line(str(row.get('prediction', '')))}",
    )
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
