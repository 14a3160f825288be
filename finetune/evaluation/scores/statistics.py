"""Numbers of replies -> scores, their intervals, and whether two models differ by more than chance.

Everything works on sums: a score is a function of numbers that are summed over units, such as hits
and tries, or n-gram counts. A unit is a dialogue, because replies of one dialogue are no independent
samples. A resample is a row of weights, a block of resamples one matrix product.

U units, K numbers per unit, R resamples, M scores. Memory: about 400 bytes per reply.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import fsum
from typing import Literal

import numpy as np
import numpy.typing as npt

from finetune.evaluation.predictions import Scores
from finetune.evaluation.scores.metrics import METRICS, Source, metric, of_source
from finetune.evaluation.scores.texts import Numbers

Score = dict[str, float | int | None]
"""value, low, high, n."""
Verdict = Literal["better", "worse", "no real difference"]

RESAMPLES = 1000
PERMUTATIONS = 9999
LEVEL = 0.95
CHANCE = 0.05
"""What chance makes less often than this is real; `1 - LEVEL` would be a little more, and take in 0.05 itself."""
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
class PairTest:
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


class ReplyTable:
    """The numbers of all replies of one model, in the order of the data."""

    def __init__(self, extra: Sequence[str] = ()) -> None:
        self.means = (*(one.name for one in METRICS if one.per_reply), *extra)
        """Scores that are means over replies; `extra` are the user's own."""
        self._counts = [(one.name, one.counts) for one in METRICS if one.counts]
        self.names = (*self.means, *(name for name, _ in self._counts))
        self._width = len(self.means) + sum(counts.width for _, counts in self._counts)
        self._numbers = array("d")
        self._units = array("q")
        self._dialogue: str | None = None

    def __len__(self) -> int:
        return len(self._units)

    def add(
        self,
        location: str,
        scores: Mapping[str, float | None],
        counts: Mapping[str, Sequence[float]],
    ) -> None:
        """One more reply; those of one dialogue come one after another."""
        first = self._dialogue is None
        begins = first or location != self._dialogue
        self._units.append((-1 if first else self._units[-1]) + begins)
        self._dialogue = location
        values = (scores.get(name) for name in self.means)
        self._numbers.extend(np.nan if value is None else value for value in values)
        for name, _ in self._counts:
            self._numbers.extend(counts[name])

    def scores(self) -> Scores:
        """The scores alone, by name; None where the question does not arise."""
        rows = self._rows()
        values = [_mean(rows[:, column]) for column in range(len(self.means))]
        if len(rows):
            sums = rows[:, len(self.means) :].sum(axis=0, keepdims=True)
            values += [_or_none(float(value)) for value in self._corpus_scores(sums)[0]]
        else:
            values += [None] * len(self._counts)
        return dict(zip(self.names, values, strict=True))

    def measure(self, chosen: npt.NDArray[np.bool_] | None = None) -> Measure:
        """What the scores are made of, dialogue by dialogue; of the `chosen` replies only."""
        rows, units = self._rows(), np.frombuffer(self._units, dtype=np.int64)
        if chosen is not None:
            rows, units = rows[chosen], units[chosen]
        values, counts = rows[:, : len(self.means)], rows[:, len(self.means) :]
        there = ~np.isnan(values)
        numbers = np.hstack([np.where(there, values, 0.0), there, counts])
        begins = np.flatnonzero(np.diff(units, prepend=-1))
        summed = np.add.reduceat(numbers, begins, axis=0) if len(rows) else numbers
        return Measure(self.names, summed, self._of_sums)

    def described(self, chosen: npt.NDArray[np.bool_] | None = None) -> dict[str, Score]:
        """Every score that exists, with its interval and the number of replies it is over."""
        rows = self._rows() if chosen is None else self._rows()[chosen]
        if not len(rows):
            return {}
        measure = self.measure(chosen)
        over = [int((~np.isnan(rows[:, column])).sum()) for column in range(len(self.means))]
        over += [len(rows)] * len(self._counts)
        exact = self.scores() if chosen is None else {}
        values = self._of_sums(measure.units.sum(axis=0, keepdims=True))[0]
        found = described(self.names, values, intervals(measure), over)
        for name, score in found.items():
            score["value"] = exact.get(name, score["value"])
        return found

    def _rows(self) -> Numbers:
        return np.frombuffer(self._numbers, dtype=np.float64).reshape(-1, self._width)

    def _of_sums(self, sums: Numbers) -> Numbers:
        means = len(self.means)
        with np.errstate(divide="ignore", invalid="ignore"):
            averages = sums[:, :means] / sums[:, means : 2 * means]
        return np.hstack([averages, self._corpus_scores(sums[:, 2 * means :])])

    def _corpus_scores(self, sums: Numbers) -> Numbers:
        """Scores [R, number of them] of summed counts."""
        found, begin = [], 0
        for _, counts in self._counts:
            found.append(counts.of_sums(sums[:, begin : begin + counts.width]))
            begin += counts.width
        return np.stack(found, axis=1)


class LossTable:
    """The loss of every held-out example of one model."""

    def __init__(self, losses: Numbers, weights: Numbers, *, source: Source = "loss") -> None:
        self._metrics = [(one.name, one.of_loss) for one in of_source(source) if one.of_loss]
        self.names = tuple(name for name, _ in self._metrics)
        self.losses, self.weights = losses, weights

    @property
    def loss(self) -> float:
        """The mean over all supervised tokens, as training logs it."""
        return fsum(self.losses) / (self.weight or 1.0)

    @property
    def weight(self) -> float:
        """Supervised tokens, each with its weight."""
        return fsum(self.weights)

    @property
    def scores(self) -> dict[str, float]:
        """The scores alone, by name."""
        values = self._of_sums(np.array([[self.loss, 1.0]]))[0]
        return dict(zip(self.names, map(float, values), strict=True))

    def measure(self) -> Measure:
        """What the scores are made of, example by example."""
        return Measure(self.names, np.stack([self.losses, self.weights], axis=1), self._of_sums)

    def described(self) -> dict[str, Score]:
        """The scores with their intervals."""
        values = np.array(list(self.scores.values()))
        over = [len(self.losses)] * len(self.names)
        return described(self.names, values, intervals(self.measure()), over)

    def _of_sums(self, sums: Numbers) -> Numbers:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            loss = sums[:, 0] / sums[:, 1]
            return np.stack([of_loss(loss) for _, of_loss in self._metrics], axis=1)


def described(
    names: Sequence[str],
    values: Numbers,
    limits: Sequence[tuple[float, float]],
    over: Sequence[int],
) -> dict[str, Score]:
    """`{"value", "low", "high", "n"}` of every score that exists."""
    return {
        name: {"value": float(value), "low": _or_none(low), "high": _or_none(high), "n": number}
        for name, value, (low, high), number in zip(names, values, limits, over, strict=True)
        if number and not np.isnan(value)
    }


def _mean(values: Numbers) -> float | None:
    there = values[~np.isnan(values)]
    return float(np.mean(there)) if len(there) else None


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None


def intervals(measure: Measure, *, seed: int = 0, resamples: int = RESAMPLES) -> list[tuple[float, float]]:  # fmt: skip
    """The 95 % interval of every score [M], by percentiles; NaN where a score does not exist."""
    [drawn] = resampled([measure], seed, resamples)
    return _percentiles(drawn)


def compare(
    measures: Sequence[Measure],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
) -> list[PairTest]:
    """Every two of the models, the later one as `a`, score by score.

    The measures hold the same units in the same order.
    """
    if len(measures) < 2:
        return []
    names = measures[0].names
    observed = [one.scores(one.units.sum(axis=0, keepdims=True))[0] for one in measures]
    drawn = resampled(measures, seed, resamples)
    chances = _chances(measures, observed, seed, permutations)
    found = []
    for column, name in enumerate(names):
        pairs = [
            (a, b)
            for b, a in combinations(range(len(measures)), 2)
            if metric(name).better != "neither"
            and np.isfinite(observed[a][column] - observed[b][column])
        ]
        plain = [float(chances[pair][column]) for pair in pairs]
        for (a, b), p, corrected in zip(pairs, plain, holm(plain), strict=True):
            difference = float(observed[a][column] - observed[b][column])
            [(low, high)] = _percentiles((drawn[a] - drawn[b])[:, [column]])
            verdict = _verdict(name, difference, corrected)
            found.append(PairTest(a, b, name, difference, low, high, p, corrected, verdict))
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


def _verdict(name: str, difference: float, p: float) -> Verdict:
    if p >= CHANCE:
        return "no real difference"
    return "better" if (difference < 0) == metric(name).lower_is_better else "worse"


def resampled(measures: Sequence[Measure], seed: int, resamples: int) -> list[Numbers]:
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
    """P values [M] of every two models: how often a random swap of their replies differs at least as much.

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
