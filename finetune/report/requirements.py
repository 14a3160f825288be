"""`finetune evaluate --require`: what a model must reach, and whether it does; for a user's CI.

rouge-l >= 45                      the best tuned model's score
bleu-4 >= 40 surely                the lower end of its interval
not worse than base on rouge-l     no real difference from the base, or better
better than base on rouge-l        really better than the base
not worse than base on mmlu        of a public task, where it has one score; else `gsm8k/exact_match:…`
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from finetune.errors import ConfigError, RequirementError
from finetune.evaluation.schema import Evaluation, Score
from finetune.evaluation.scores.metrics import METRICS, metric
from finetune.report import sentences

_LIMIT = re.compile(r"(?P<metric>\S+)\s*(?P<sign>>=|<=|>|<)\s*(?P<value>[-+.\deE]+)(?P<surely>\s+surely)?")  # fmt: skip
_BASE = re.compile(r"(?P<kind>not worse|better) than base on (?P<metric>\S+)")
_SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Requirement:
    """One line of `--require`."""

    text: str
    metric: str
    sign: str = ""
    value: float = 0.0
    surely: bool = False
    """The whole interval must lie on the right side."""
    verdicts: tuple[str, ...] = ()
    """Of the model beside its base, those that will do."""


def read_requirements(texts: Sequence[str]) -> list[Requirement]:
    """What the lines ask for; ConfigError names those that ask for nothing."""
    found, problems = [], []
    for text in texts:
        try:
            found.append(_read(text))
        except ValueError:
            problems.append(
                f"--require {text!r}: write `rouge-l >= 45`, `bleu-4 >= 40 surely`, "
                "`not worse than base on rouge-l` or `better than base on rouge-l`"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _read(text: str) -> Requirement:
    if limit := _LIMIT.fullmatch(text.strip()):
        value = float(limit["value"])
        return Requirement(text, limit["metric"], limit["sign"], value, bool(limit["surely"]))
    if base := _BASE.fullmatch(text.strip()):
        level = ("no real difference",) if base["kind"] == "not worse" else ()
        return Requirement(text, base["metric"], verdicts=("better", *level))
    raise ValueError(text)


def check_names(requirements: Sequence[Requirement], own: Collection[str]) -> None:
    """ConfigError for scores that no evaluation has, found before hours of generation.

    Args:
        requirements: what is asked for; of public tasks, whose scores the harness names, only scores of ours.
        own: names of the user's metrics.
    """
    known = [*(one.name for one in METRICS), *own]
    problems = []
    for one in requirements:
        if one.metric not in known and "/" not in one.metric:
            meant = get_close_matches(one.metric.lower(), known, n=1)
            said = f"did you mean {meant[0]}?" if meant else f"there are {', '.join(known)}"
            problems.append(f"--require {one.text!r}: there is no score {one.metric!r}; {said}")
    if problems:
        raise ConfigError("\n".join(problems))


def check_requirements(evaluation: Evaluation, requirements: Sequence[Requirement]) -> list[str]:
    """How every requirement is met, in words, by the best tuned model in its own score.

    Raises:
        RequirementError: One is not met, or cannot be told; names all of these.
    """
    said = [_check(evaluation, one) for one in requirements]
    if missed := [line for is_met, line in said if not is_met]:
        raise RequirementError("\n".join(missed))
    return [line for _, line in said]


def _check(evaluation: Evaluation, one: Requirement) -> tuple[bool, str]:
    one = replace(one, metric=_named(evaluation, one.metric))
    best = evaluation.best(one.metric)
    score = best.scores.get(one.metric, Score())
    if score.value is None:
        known = ", ".join(evaluation.metrics)
        return False, f"{one.text}: there is no score {one.metric!r}; there are {known}"
    if one.sign:
        return _check_limit(one, best.name, score)
    base = evaluation.base
    if base is None:
        return False, f"{one.text}: the base was not evaluated; add --include-base"
    if base is best:
        return False, f"{one.text}: no tuned model was evaluated"
    found = evaluation.comparison(best.name, base.name, one.metric)
    if found is None:
        return False, f"{one.text}: {best.name} and {base.name} cannot be compared in it"
    return found.verdict in one.verdicts, f"{one.text}: {sentences.verdict(found)}"


def _named(evaluation: Evaluation, name: str) -> str:
    """The score that is meant: `mmlu` is `mmlu/acc` where that is the task's only score."""
    of_task = [score for score in evaluation.metrics if score.startswith(f"{name}/")]
    return of_task[0] if name not in evaluation.metrics and len(of_task) == 1 else name


def _check_limit(one: Requirement, name: str, score: Score) -> tuple[bool, str]:
    measured = score.low if one.sign.startswith(">") else score.high
    value = measured if one.surely else score.value
    is_met = value is not None and _SIGNS[one.sign](value, one.value)
    between = sentences.interval(one.metric, score)
    told = f"{sentences.number(one.metric, score.value)}{f' ({between})' if between else ''}"
    return is_met, f"{one.text}: {name} has {metric(one.metric).label} {told}"
