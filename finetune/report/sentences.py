"""What the scores mean, in words: the same on the page, in the terminal and in the tests."""

from __future__ import annotations

from finetune.evaluation.schema import Comparison, Evaluation, Score, TargetScores, goodness
from finetune.evaluation.scores.metrics import metric

MINUS = "−"
FEWEST = 10
"""Replies of a slice that is worth a sentence."""


def number(name: str, value: float | None, *, signed: bool = False) -> str:
    """A score with one place, a loss with three; a dash where there is none."""
    if value is None:
        return "–"
    text = f"{value:{'+' if signed else ''}.{metric(name).digits}f}"
    return text.replace("-", MINUS)


def interval(name: str, score: Score | Comparison) -> str:
    """`46.1 to 54.8`, or nothing."""
    if score.low is None or score.high is None:
        return ""
    return f"{number(name, score.low)} to {number(name, score.high)}"


def chance(value: float | None) -> str:
    """A p-value as one says it."""
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"  # fmt: skip


def arrow(evaluation: Evaluation, target: TargetScores, name: str) -> str:
    """`↑` really better than the base, `↓` worse, `→` no real difference; empty without an answer."""
    base = evaluation.base
    if base is None or base is target:
        return ""
    found = evaluation.comparison(target.name, base.name, name)
    return {"better": "↑", "worse": "↓", "no real difference": "→"}[found.verdict] if found else ""


def verdict(one: Comparison) -> str:
    """One comparison as a sentence."""
    name = metric(one.metric).label
    location = f"{interval(one.metric, one)}"
    p = chance(one.p_holm if one.p_holm is not None else one.p)
    inside = "; ".join(part for part in (location, p) if part)
    told = f" ({inside})" if inside else ""
    by = number(one.metric, one.difference, signed=True)
    if one.verdict == "no real difference":
        return f"No real difference between {one.a} and {one.b} in {name}: {by}{told}."
    if one.verdict == "better":
        return f"{one.a} is better than {one.b} in {name}: {by}{told}."
    return f"{one.a} is worse than {one.b} in {name}: {by}{told}."


def verdicts(evaluation: Evaluation, name: str) -> list[tuple[str, str]]:
    """(kind, sentence): the best against all others, then the others against the base."""
    best, base = evaluation.best(name), evaluation.base
    pairs = [(best.name, one.name) for one in evaluation.targets if one is not best]
    if base is not None and best is not base:
        pairs.sort(key=lambda pair: pair[1] != base.name)
        pairs += [(one.name, base.name) for one in evaluation.targets if one not in (best, base)]
    found = [evaluation.comparison(a, b, name) for a, b in pairs]
    return [(css(one), verdict(one)) for one in found if one is not None]


def by_metric(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(kind, sentence): the best against the base, metric by metric."""
    base, best = evaluation.base, evaluation.best(evaluation.headline)
    if base is None:
        return []
    found = [evaluation.comparison(best.name, base.name, name) for name in evaluation.metrics]
    return [(css(one), verdict(one)) for one in found if one is not None]


def css(one: Comparison) -> str:
    """A verdict as a class of the style sheet."""
    return one.verdict.replace(" ", "-")


def conclusion(evaluation: Evaluation, name: str) -> list[str]:
    """The answer to "which one, is it really better, and on what does it fail?", in a few sentences."""
    best = evaluation.best(name)
    score = best.scores.get(name, Score())
    between = interval(name, score)
    value = f"{number(name, score.value)}{f' ({between})' if between else ''}"
    if len(evaluation.targets) == 1:
        return [
            f"{best.name} reaches {value} in {metric(name).label}.",
            *weakness(evaluation, name),
        ]
    asked = number_of(evaluation, tuned=True)
    if metric(name).lower_is_better:
        lines = [f"{best.name} has the lowest {metric(name).label} of {asked}: {value}."]
    else:
        lines = [f"{best.name} has the highest {metric(name).label} of {asked}: {value}."]
    base = evaluation.base
    if base is not None and best is not base:
        found = evaluation.comparison(best.name, base.name, name)
        if found is not None:
            lines.append(verdict(found))
    others = [one for one in evaluation.targets if one not in (best, base)]
    found_by = {one.name: evaluation.comparison(best.name, one.name, name) for one in others}
    verdicts_of = {other: found.verdict for other, found in found_by.items() if found}
    level = [other for other, said in verdicts_of.items() if said == "no real difference"]
    if level:
        lines.append(f"Between it and {listed(level)} there is no real difference.")
    if base is None and (
        worse := [other for other, said in verdicts_of.items() if said == "better"]
    ):
        lines.append(f"It is really better than {listed(worse)}.")
    return [*lines, *forgotten(evaluation, name), *weakness(evaluation, name)]


def forgotten(evaluation: Evaluation, name: str) -> list[str]:
    """Whether the best target lost something of the base's on public tasks and general data."""
    best, base = evaluation.best(name), evaluation.base
    if base is None or best is base:
        return []
    asked = [one for one in evaluation.metrics if "/" in one or one == "general_loss"]
    found = [evaluation.comparison(best.name, base.name, one) for one in asked]
    told = [one for one in found if one is not None]
    worse = [verdict(one) for one in told if one.verdict == "worse"]
    if not told or worse:
        return worse
    return [
        f"{best.name} forgot nothing that can be told: of {len(told)} scores on public tasks and general "
        "data none is really worse than the base's."
    ]


def beside_published(evaluation: Evaluation) -> list[str]:
    """Scores of public tasks beside the figures that the model's makers published."""
    lines = []
    for figure in evaluation.published:
        given = [
            f"{target.name} {number(figure.score, score.value)} ({interval(figure.score, score)})"
            for target in evaluation.targets
            if (score := target.scores.get(figure.score)) is not None
        ]
        if given:
            said = number(figure.score, figure.value)
            lines.append(f"{figure.score}: {', '.join(given)}; {figure.model} is published with {said}.")  # fmt: skip
    return lines


def weakness(evaluation: Evaluation, name: str) -> list[str]:
    """The slice on which the best target is weakest; nothing unless its interval lies below the whole."""
    best = evaluation.best(name)
    whole = best.scores.get(name, Score()).value
    if whole is None or metric(name).better == "neither":
        return []

    def lies_below(score: Score) -> bool:
        near = score.low if metric(name).lower_is_better else score.high
        return near is not None and (near > whole if metric(name).lower_is_better else near < whole)

    found = [
        (score, f"{slice_name.replace('_', ' ')} {value}")
        for slice_name, values in evaluation.slices.items()
        for value, targets in values.items()
        for score in [targets.get(best.name, {}).get(name, Score())]
        if score.n >= FEWEST and lies_below(score)
    ]
    if not found:
        return []
    score, location = min(found, key=lambda pair: goodness(name, pair[0]))
    told = f"{number(name, score.value)} ({interval(name, score)}), {score.n} replies"
    return [f"{best.name} is weakest on {location}: {told}."]


def number_of(evaluation: Evaluation, *, tuned: bool = False) -> str:
    """`3 checkpoints`, or `3 models` when they are of several kinds."""
    targets = [one for one in evaluation.targets if not (tuned and one.kind == "base")]
    targets = targets or evaluation.targets
    one_kind = all(target.step is not None for target in targets)
    if len(targets) == 1:
        return "1 checkpoint" if one_kind else "1 model"
    return f"{len(targets)} checkpoints" if one_kind else f"{len(targets)} models"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
