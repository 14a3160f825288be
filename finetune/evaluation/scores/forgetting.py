"""A tuned model beside the untuned one -> whether it gained something, and lost nothing that matters.

Gain is the paired permutation test of every comparison. "Not worse" is a non-inferiority test: that the
score is worse by the margin or more is refuted when hardly any paired resample of the dialogues says so.
A checkpoint has to pass all its tests, so its p is the largest of them; the p of several checkpoints are
corrected with Holm's method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.evaluation.scores.metrics import metric
from finetune.evaluation.scores.statistics import CHANCE, LEVEL, Measure, compare, holm, resampled

RESAMPLES = 4999


@dataclass(frozen=True)
class Criterion:
    """One test of a checkpoint against the untuned model."""

    metric: str
    difference: float
    """The checkpoint's score minus the untuned model's."""
    p: float
    margin: float | None = None
    """Of a score that must not be worse by so much; None for the one that must be better."""
    low: float | None = None
    """95 % interval of the difference."""
    high: float | None = None

    @property
    def passes(self) -> bool:
        """Whether it holds by itself."""
        return self.p < CHANCE

    def __str__(self) -> str:
        name, digits = metric(self.metric).label, metric(self.metric).digits
        by = f"{self.difference:+.{digits}f}, p = {self.p:.3f}"
        if self.margin is None:
            return f"{name} is {'really' if self.passes else 'not really'} better ({by})"
        margin = f"{self.margin:g}"
        if self.passes:
            return f"{name} is not worse by {margin} ({by})"
        return f"{name} may be worse by {margin} or more ({by})"


def gain(tuned: Measure, untuned: Measure, name: str) -> Criterion:
    """Whether a score is really better; a p of 1 where it is not better at all."""
    found = {one.metric: one for one in compare([untuned, tuned])}
    one = found.get(name)
    if one is None:
        return Criterion(name, 0.0, 1.0)
    is_better = (one.difference < 0) == metric(name).lower_is_better and one.difference != 0
    return Criterion(name, one.difference, one.p if is_better else 1.0, None, one.low, one.high)


def not_worse(tuned: Measure, untuned: Measure, name: str, margin: float) -> Criterion:
    """Whether a score is not worse by the margin or more."""
    place = tuned.names.index(name)
    at_once = [one.scores(one.units.sum(axis=0, keepdims=True))[0][place] for one in (tuned, untuned)]  # fmt: skip
    drawn = [one[:, place] for one in resampled([tuned, untuned], 0, RESAMPLES)]
    sign = -1.0 if metric(name).lower_is_better else 1.0
    gains = sign * (drawn[0] - drawn[1])
    # A resample that leaves a score undefined does not speak for the checkpoint.
    against = int((~(gains > -margin)).sum())
    low, high = np.nanpercentile(sign * gains, [50 * (1 - LEVEL), 100 - 50 * (1 - LEVEL)])
    p = (1 + against) / (1 + RESAMPLES)
    return Criterion(name, float(at_once[0] - at_once[1]), p, margin, float(low), float(high))


def p_of(criteria: Sequence[Criterion]) -> float:
    """The p of "it gained, and lost nothing": all tests must hold."""
    return max(one.p for one in criteria)


def qualifies(criteria: Sequence[Criterion], earlier: Sequence[float]) -> bool:
    """Whether a checkpoint passes, beside the p of those before it, after Holm's correction."""
    return holm([*earlier, p_of(criteria)])[-1] < CHANCE


def criteria_of(
    tuned: Mapping[str, Measure], untuned: Mapping[str, Measure], margins: Mapping[str, float]
) -> list[Criterion]:
    """The tests of one checkpoint: the first score must be better, the others not worse by their margins."""
    domain, *others = tuned
    return [
        gain(tuned[domain], untuned[domain], domain),
        *(not_worse(tuned[name], untuned[name], name, margins[name]) for name in others),
    ]


def as_mean(name: str, values: Sequence[float | None], dialogues: Sequence[str]) -> Measure | None:
    """The mean of one number of replies, dialogue by dialogue; None when no reply has it."""
    rows: dict[str, tuple[float, int]] = {}
    for value, dialogue in zip(values, dialogues, strict=True):
        if value is not None:
            total, number = rows.get(dialogue, (0.0, 0))
            rows[dialogue] = (total + value, number + 1)
    if not rows:
        return None
    return Measure((name,), np.array([*rows.values()], dtype=float), lambda sums: sums[:, :1] / sums[:, 1:])  # fmt: skip
