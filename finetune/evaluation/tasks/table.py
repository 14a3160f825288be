"""What every question of the tasks scored -> scores with intervals, and measures to compare by.

U questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from finetune.evaluation.scores.statistics import Measure, Score, described, intervals
from finetune.evaluation.scores.texts import Numbers


@dataclass(frozen=True)
class TaskScore:
    """One score of one task."""

    signature: str
    """How it came about."""
    ids: tuple[str, ...] = ()
    """Names of the questions [U]; none when the score is no mean over them."""
    values: tuple[float, ...] = ()
    """What each scored [U]."""
    value: float | None = None
    """The score, where it is no mean."""
    error: float | None = None
    """Its standard error, where it is no mean."""
    n: int = 0

    def measure(self, name: str) -> Measure:
        """What the score is made of."""
        values = np.array(self.values)
        return Measure((name,), np.stack([values, np.ones_like(values)], axis=1), _mean)

    def described(self, name: str) -> Score:
        """The score with its interval: of resampled questions, else from the standard error."""
        if self.ids:
            measure = self.measure(name)
            mean = np.array([np.mean(self.values)])
            return described((name,), mean, intervals(measure), [len(self.ids)])[name]
        value, spread = self.value, None if self.error is None else 1.96 * self.error
        if value is None or spread is None:
            return {"value": value, "low": None, "high": None, "n": self.n}
        return {"value": value, "low": value - spread, "high": value + spread, "n": self.n}


class TaskTable:
    """The scores of the tasks that one model was asked."""

    def __init__(self, scores: Mapping[str, TaskScore] | None = None) -> None:
        self.scores = dict(scores or {})

    @classmethod
    def of(cls, note: Mapping[str, Any] | None) -> TaskTable:
        """What `note` kept."""
        rows = (note or {}).items()
        return cls({name: TaskScore(**row | {"ids": tuple(row["ids"]), "values": tuple(row["values"])}) for name, row in rows})  # fmt: skip

    @property
    def note(self) -> dict[str, Any]:
        """The form in which it is kept."""
        return {name: asdict(score) for name, score in self.scores.items()}

    @property
    def signatures(self) -> dict[str, str]:
        """How each score came about."""
        return {name: score.signature for name, score in self.scores.items()}

    @property
    def needles(self) -> dict[str, float | None]:
        """What every hidden sentence scored."""
        hidden = (one for name, one in self.scores.items() if name.startswith("needle/"))
        return {id: value for one in hidden for id, value in zip(one.ids, one.values, strict=True)}

    def described(self) -> dict[str, Score]:
        """Every score with its interval."""
        return {name: score.described(name) for name, score in self.scores.items()}

    def measures(self) -> Iterator[tuple[str, tuple[str, ...], Measure]]:
        """Name, questions and measure of every score that is a mean over questions."""
        for name, score in self.scores.items():
            if score.ids:
                yield name, score.ids, score.measure(name)


def _mean(sums: Numbers) -> Numbers:
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: Numbers = sums[:, :1] / sums[:, 1:]
    return mean
