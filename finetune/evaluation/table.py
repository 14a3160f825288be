"""Rows of predictions -> the numbers that scores are made of, and the scores with their intervals.

Memory: about 400 bytes per reply.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import fsum, isnan

import numpy as np
import numpy.typing as npt

from finetune.evaluation import corpus, uncertainty
from finetune.evaluation.metrics import METRICS, Pair, Scores, text
from finetune.evaluation.uncertainty import Measure, Numbers

COUNTS = {
    "corpus_bleu": corpus.BLEU_COUNTS,
    "chrf": corpus.CHRF_COUNTS,
    "length_ratio": 2,
}
"""Numbers per reply of the scores that are no means over replies."""
Score = dict[str, float | int | None]
"""value, low, high, n."""


def counts_of(pair: Pair) -> dict[str, list[float]]:
    """What one reply adds to the scores in `COUNTS`."""
    from finetune.evaluation.metrics import language_words

    reply, reference = text(pair.reply), text(pair.reference)
    return {
        "corpus_bleu": [*corpus.bleu_counts(language_words(reply), language_words(reference))],
        "chrf": [*corpus.chrf_counts(reply, reference)],
        "length_ratio": [len(reply), len(reference)],
    }


class ReplyTable:
    """The numbers of all replies of one model, in the order of the data."""

    def __init__(self, extra: Sequence[str] = ()) -> None:
        self.means = (*METRICS, *extra)
        """Scores that are means over replies; `extra` are the user's own."""
        self.names = (*self.means, *COUNTS)
        self._width = len(self.means) + sum(COUNTS.values())
        self._numbers = array("d")
        self._units = array("q")
        self._dialogue: str | None = None

    def __len__(self) -> int:
        return len(self._units)

    def add(
        self, where: str, scores: Mapping[str, float | None], counts: Mapping[str, Sequence[float]]
    ) -> None:
        """One more reply; those of one dialogue come one after another."""
        first = self._dialogue is None
        begins = first or where != self._dialogue
        self._units.append((-1 if first else self._units[-1]) + begins)
        self._dialogue = where
        values = (scores.get(name) for name in self.means)
        self._numbers.extend(np.nan if value is None else value for value in values)
        for name in COUNTS:
            self._numbers.extend(counts[name])

    def scores(self) -> Scores:
        """The scores alone, by name; None where the question does not arise."""
        rows = self._rows()
        values = [_mean(rows[:, column]) for column in range(len(self.means))]
        if len(rows):
            sums = rows[:, len(self.means) :].sum(axis=0, keepdims=True)
            values += [_or_none(float(value)) for value in _corpus_scores(sums)[0]]
        else:
            values += [None] * len(COUNTS)
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
        over += [len(rows)] * len(COUNTS)
        exact = self.scores() if chosen is None else {}
        values = self._of_sums(measure.units.sum(axis=0, keepdims=True))[0]
        found = described(self.names, values, uncertainty.intervals(measure), over)
        for name, score in found.items():
            score["value"] = exact.get(name, score["value"])
        return found

    def _rows(self) -> Numbers:
        return np.frombuffer(self._numbers, dtype=np.float64).reshape(-1, self._width)

    def _of_sums(self, sums: Numbers) -> Numbers:
        means = len(self.means)
        with np.errstate(divide="ignore", invalid="ignore"):
            averages = sums[:, :means] / sums[:, means : 2 * means]
        return np.hstack([averages, _corpus_scores(sums[:, 2 * means :])])


class LossTable:
    """The loss of every held-out example of one model."""

    def __init__(self, losses: Numbers, weights: Numbers, *, names: tuple[str, ...]) -> None:
        self.names = names
        self.losses, self.weights = losses, weights

    @property
    def loss(self) -> float:
        """The mean over all supervised tokens, as training logs it."""
        return fsum(self.losses) / (self.weight or 1.0)

    @property
    def weight(self) -> float:
        """Supervised tokens, each with its weight."""
        return fsum(self.weights)

    def measure(self) -> Measure:
        """What the scores are made of, example by example."""
        return Measure(self.names, np.stack([self.losses, self.weights], axis=1), self._of_sums)

    def described(self) -> dict[str, Score]:
        """The scores with their intervals."""
        measure = self.measure()
        values = self._of_sums(np.array([[self.loss, 1.0]]))[0]
        over = [len(self.losses)] * len(self.names)
        return described(self.names, values, uncertainty.intervals(measure), over)

    def _of_sums(self, sums: Numbers) -> Numbers:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            loss = sums[:, 0] / sums[:, 1]
            return np.stack([np.exp(loss) if name == "perplexity" else loss for name in self.names], axis=1)  # fmt: skip


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
        if number and not isnan(value)
    }


def _corpus_scores(sums: Numbers) -> Numbers:
    """Corpus BLEU, chrF and length ratio [R, 3] of summed counts."""
    borders = np.cumsum([0, *COUNTS.values()])
    bleu, chrf, lengths = (sums[:, first:last] for first, last in pairwise(borders))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 100.0 * lengths[:, 0] / lengths[:, 1]
    return np.stack([corpus.bleu_of(bleu), corpus.chrf_of(chrf), ratio], axis=1)


def _mean(values: Numbers) -> float | None:
    there = values[~np.isnan(values)]
    return float(np.mean(there)) if len(there) else None


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None


def signatures() -> dict[str, str]:
    """For every score in `COUNTS` one line that says how it came about."""
    return {
        **corpus.signatures(),
        "length_ratio": "characters of all replies in per cent of those of all references",
    }
