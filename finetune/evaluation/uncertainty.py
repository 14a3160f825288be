"""How sure a score is: bootstrap intervals, and whether two models differ by more than chance.

Everything works on sums: a score is a function of numbers that are summed over units, such as hits
and tries, or n-gram counts. A unit is a dialogue, because replies of one dialogue are no independent
samples. A resample is a row of weights, a block of resamples one matrix product.

U units, K numbers per unit, R resamples, M scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Numbers: TypeAlias = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "no real difference"]

RESAMPLES = 1000
PERMUTATIONS = 9999
LEVEL = 0.95
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "repetition_rate", "general_loss"})
NO_BETTER = frozenset({"length_ratio"})
"""Scores of which neither more nor less is better; they are not compared."""
_BLOCK = 500_000  # weights held at once, 4 MB


@dataclass(frozen=True)
class Measure:
    """What one model's scores are made of."""

    names: tuple[str, ...]
    """[M]."""
    units: Numbers
    """[U, K]."""
    scores: Callable[[Numbers], Numbers]
    """Sums [R, K] -> scores [R, M]; NaN where a score does not exist."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One score of two models on the same units."""

    a: int
    b: int
    """Numbers of the models."""
    metric: str
    difference: float
    """The score of `a` minus that of `b`."""
    low: float
    high: float
    """95 % interval of the difference, of paired resamples."""
    p: float
    """Of the permutation test: how often models that differ by chance alone differ that much."""
    p_holm: float
    """The same, corrected for the number of pairs that this metric compares."""
    verdict: Verdict
    """Of `a` beside `b`."""


def intervals(measure: Measure, *, seed: int = 0, resamples: int = RESAMPLES) -> list[tuple[float, float]]:  # fmt: skip
    """The 95 % interval of every score [M], by percentiles; NaN where a score does not exist."""
    [drawn] = _drawn([measure], seed, resamples)
    return _percentiles(drawn)


def compare(
    measures: Sequence[Measure],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
) -> list[Comparison]:
    """Every two of the models, the later one as `a`, score by score.

    The measures hold the same units in the same order.
    """
    if len(measures) < 2:
        return []
    names = measures[0].names
    observed = [one.scores(one.units.sum(axis=0, keepdims=True))[0] for one in measures]
    drawn = _drawn(measures, seed, resamples)
    chances = _chances(measures, observed, seed, permutations)
    found = []
    for column, metric in enumerate(names):
        pairs = [
            (a, b)
            for b, a in combinations(range(len(measures)), 2)
            if metric not in NO_BETTER and np.isfinite(observed[a][column] - observed[b][column])
        ]
        plain = [float(chances[pair][column]) for pair in pairs]
        for (a, b), p, corrected in zip(pairs, plain, holm(plain), strict=True):
            difference = float(observed[a][column] - observed[b][column])
            [(low, high)] = _percentiles((drawn[a] - drawn[b])[:, [column]])
            verdict = _verdict(metric, difference, corrected)
            found.append(Comparison(a, b, metric, difference, low, high, p, corrected, verdict))
    return found


def holm(chances: Sequence[float]) -> list[float]:
    """P values corrected for their number after Holm (1979), in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(chances)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=lambda i: chances[i])):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[place]))
        corrected[place] = highest
    return corrected


def _verdict(metric: str, difference: float, p: float) -> Verdict:
    if p >= 1 - LEVEL:
        return "no real difference"
    return "better" if (difference < 0) == (metric in LOWER_IS_BETTER) else "worse"


def _drawn(measures: Sequence[Measure], seed: int, resamples: int) -> list[Numbers]:
    """Scores [R, M] of every model on the same resamples of its units, drawn with replacement."""
    chance = np.random.default_rng(seed)
    units = len(measures[0].units)

    def draw(rows: int) -> Numbers:
        chosen = chance.integers(units, size=(rows, units)) + units * np.arange(rows)[:, None]
        return np.bincount(chosen.ravel(), minlength=rows * units).reshape(rows, units).astype(float)  # fmt: skip

    found: list[list[Numbers]] = [[] for _ in measures]
    for weights in _blocks(draw, units, resamples):
        for scores, one in zip(found, measures, strict=True):
            scores.append(one.scores(weights @ one.units))
    return [np.concatenate(scores) for scores in found]


def _chances(
    measures: Sequence[Measure], observed: Sequence[Numbers], seed: int, permutations: int
) -> dict[tuple[int, int], Numbers]:
    """P values [M] of every two models: how often swapping them, unit by unit, tells them apart as well.

    The sums of a swapped pair follow from each model's sums over the units that are swapped, so one
    product per model serves all pairs.
    """
    chance = np.random.default_rng(seed + 1)
    units = len(measures[0].units)
    totals = [one.units.sum(axis=0) for one in measures]
    pairs = [(a, b) for b, a in combinations(range(len(measures)), 2)]
    as_large = {
        pair: np.ones(len(measures[0].names)) for pair in pairs
    }  # the one that was observed

    def draw(rows: int) -> Numbers:
        return chance.integers(2, size=(rows, units), dtype=np.int8).astype(float)

    for swapped in _blocks(draw, units, permutations):
        moved = [swapped @ one.units for one in measures]
        for a, b in pairs:
            one = measures[a].scores(totals[a] - moved[a] + moved[b])
            other = measures[b].scores(totals[b] - moved[b] + moved[a])
            limit = np.abs(observed[a] - observed[b]) * (1 - 1e-9)  # equal but for rounding
            # A score that a swap leaves undefined says nothing against chance.
            as_large[a, b] += (~(np.abs(one - other) < limit)).sum(axis=0)
    return {pair: count / (permutations + 1) for pair, count in as_large.items()}


def _blocks(draw: Callable[[int], Numbers], units: int, rows: int) -> Iterator[Numbers]:
    """`rows` rows of weights, as many at once as fit into `_BLOCK`."""
    size = max(1, _BLOCK // max(units, 1))
    for first in range(0, rows, size):
        yield draw(min(size, rows - first))


def _percentiles(drawn: Numbers) -> list[tuple[float, float]]:
    tail = 100 * (1 - LEVEL) / 2
    found = []
    for column in drawn.T:
        there = column[np.isfinite(column)]
        low, high = np.percentile(there, [tail, 100 - tail]) if len(there) else (np.nan, np.nan)
        found.append((float(low), float(high)))
    return found
