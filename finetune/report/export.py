"""An evaluation as Markdown for a pull request, or as CSV for a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from finetune.evaluation.schema import Evaluation, Score, TargetScores
from finetune.evaluation.scores.metrics import metric
from finetune.language import sentence, word
from finetune.report import sentences

ROWS = ("target", "kind", "step", "slice", "value of slice", "metric", "score", "low", "high", "n")


def markdown(evaluation: Evaluation) -> str:
    """The answer, a table of every score with its interval, and how the headline came about."""
    headline = evaluation.headline
    names = list(dict.fromkeys([headline, *evaluation.metrics]))
    lines = [f"**{sentence(line)}**" for line in sentences.conclusion(evaluation, headline)[:1]]
    lines += map(sentence, sentences.conclusion(evaluation, headline)[1:])
    lines += map(sentence, sentences.beside_published(evaluation))
    table = [
        f"| {word('score')} | {' | '.join(_plain(one.name) for one in evaluation.targets)} |",
        "|---" * (len(evaluation.targets) + 1) + "|",
        *(_line(evaluation, name) for name in names),
    ]
    said = evaluation.signatures.get(headline, "")
    return "\n".join(
        [*lines, "", *table, "", f"{_plain(metric(headline).label)}: {_plain(said)}", ""]
    )


def _line(evaluation: Evaluation, name: str) -> str:
    cells = [_cell(evaluation, target, name) for target in evaluation.targets]
    return f"| {_plain(metric(name).label)} | {' | '.join(cells)} |"


def _cell(evaluation: Evaluation, target: TargetScores, name: str) -> str:
    score = target.scores.get(name, Score())
    between = sentences.interval(name, score)
    arrow = sentences.arrow(evaluation, target, name)
    told = f"{sentences.number(name, score.value)}{f' ({between})' if between else ''}"
    return f"{arrow} {told}".strip()


def comma_separated(evaluation: Evaluation) -> str:
    """Every score of every target, of the whole and of every slice, a line each."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(ROWS)
    for target in evaluation.targets:
        known = [target.name, target.kind, target.step]
        writer.writerows(_rows([*known, "", ""], target.scores))
        for name, values in evaluation.slices.items():
            for value, targets in values.items():
                writer.writerows(_rows([*known, name, value], targets.get(target.name, {})))
    return file.getvalue()


def _rows(begin: Sequence[object], scores: dict[str, Score]) -> list[list[object]]:
    """A line for every score; a text that a spreadsheet would take for a formula is none."""
    safe = [f"'{one}" if isinstance(one, str) and one[:1] in ("=", "+", "-", "@") else one for one in begin]  # fmt: skip
    return [[*safe, name, one.value, one.low, one.high, one.n] for name, one in scores.items()]


def _plain(text: str) -> str:
    """A text that means nothing in a table of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
