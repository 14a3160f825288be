"""Votes between models, as the endpoint's page saves them -> win rates with intervals, pair by pair.

A unit is a dialogue, because votes of one dialogue are no independent samples: its votes on a pair count
as their mean, 1 for a win, 0.5 for a tie. A winner among several models has won against each of them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, sqrt
from pathlib import Path
from typing import Any

from finetune.errors import DataError
from finetune.evaluation.scores.statistics import CHANCE, holm
from finetune.storage.given import read_given

Z = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True, slots=True)
class Duel:
    """Two models against each other."""

    a: str
    b: str
    wins: int
    """Votes for `a`."""
    losses: int
    ties: int
    dialogues: int
    win_rate: float
    """Of `a` in %, a tie as half a win, the mean over dialogues; 50 is level."""
    low: float
    high: float
    """Its 95 % interval, Wilson's."""
    p: float
    """Of the sign test over dialogues, corrected after Holm for the number of pairs."""
    verdict: str
    """Of `a` beside `b`: better, worse, or no real difference."""


def score_votes(paths: Sequence[Path]) -> list[Duel]:
    """Every two models that were voted on, the more frequent pairs first.

    Raises:
        DataError: a file cannot be read, or holds no votes.
    """
    scores: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        for dialogue, models, winner in _votes(path):
            for pair in combinations(sorted(models), 2):
                if winner is None or winner in pair:
                    score = 0.5 if winner is None else float(winner == pair[0])
                    scores[pair][dialogue].append(score)
    if not scores:
        raise DataError(f"{', '.join(map(str, paths))}: no votes; give the file that `serve --page --save-to FOLDER` wrote")  # fmt: skip
    plain = [_sign_test([_mean(votes) for votes in units.values()]) for units in scores.values()]
    duels = [
        _duel(pair, list(units.values()), p)
        for (pair, units), p in zip(scores.items(), holm(plain), strict=True)
    ]
    return sorted(duels, key=lambda duel: (-duel.dialogues, duel.a, duel.b))


def _duel(pair: tuple[str, str], units: Sequence[Sequence[float]], p: float) -> Duel:
    votes = [vote for unit in units for vote in unit]
    rate = _mean([_mean(unit) for unit in units])
    low, high = wilson(rate, len(units))
    verdict = "no real difference"
    if p < CHANCE:
        verdict = "better" if rate > 0.5 else "worse"
    return Duel(
        *pair,
        wins=votes.count(1.0),
        losses=votes.count(0.0),
        ties=votes.count(0.5),
        dialogues=len(units),
        win_rate=100 * rate,
        low=100 * low,
        high=100 * high,
        p=p,
        verdict=verdict,
    )


def wilson(rate: float, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate over a number of units.

    >>> [round(limit, 4) for limit in wilson(0.9, 10)]
    [0.5958, 0.9821]
    """
    shift = Z * Z / number
    middle = (rate + shift / 2) / (1 + shift)
    half = Z * sqrt(rate * (1 - rate) / number + shift / (4 * number)) / (1 + shift)
    return max(0.0, middle - half), min(1.0, middle + half)


def _sign_test(scores: Sequence[float]) -> float:
    """How often a fair coin decides as one-sidedly as those dialogues that are decided.

    >>> _sign_test([1, 1, 1, 1, 1, 0.5])
    0.0625
    """
    wins, losses = sum(score > 0.5 for score in scores), sum(score < 0.5 for score in scores)
    tail = sum(comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2 ** (wins + losses)))


def _votes(path: Path) -> Iterator[tuple[str, list[str], str | None]]:
    """Dialogue, models and winner of every vote of a file."""
    for number, line in enumerate(read_given(path, str(path), DataError).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place}: is no JSON: {error}; correct the line or remove it"
            ) from error
        yield _vote(row, place)


def _vote(row: Any, place: str) -> tuple[str, list[str], str | None]:
    row = row if isinstance(row, Mapping) else {}
    models, winner = row.get("models"), row.get("winner")
    if (
        not isinstance(models, list)
        or len(set(map(str, models))) != len(models)
        or len(models) < 2
        or not all(isinstance(name, str) for name in models)
    ):
        raise DataError(
            f"{place}: `models` must name two or more different models; correct the line or remove it"
        )
    if winner is not None and winner not in models:
        raise DataError(f"{place}: `winner` is {winner!r}, which is none of the models; correct it, null is a tie")  # fmt: skip
    return str(row.get("dialogue") or place), models, winner


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
