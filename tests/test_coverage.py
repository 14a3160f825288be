"""The 95 % interval of every kind of score holds the truth in about 95 % of samples, drawn from known distributions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from test_uncertainty import NO_COUNTS, coverage

from finetune.evaluation.scores.embeddings import NAME as BERT
from finetune.evaluation.scores.judge import WIN
from finetune.evaluation.scores.labels import LabelReader
from finetune.evaluation.scores.statistics import Measure, ReplyTable
from finetune.evaluation.tasks.table import TaskScore
from finetune.evaluation.tasks.writing import length_score

Draw = Callable[[np.random.Generator], Measure]


def only(measure: Measure, name: str) -> Measure:
    """One score of several."""
    place = measure.names.index(name)
    return Measure((name,), measure.units, lambda sums: measure.scores(sums)[:, [place]])


def of_replies(name: str, one: Callable[[np.random.Generator], float | None]) -> Draw:
    """A score of 100 dialogues; every third has a second reply, which scores like its first."""

    def draw(chance: np.random.Generator) -> Measure:
        table = ReplyTable(extra=(name,))
        for dialogue in range(100):
            value = one(chance)
            for _ in range(1 + (dialogue % 3 == 0)):
                table.add(str(dialogue), {name: value}, NO_COUNTS)
        return only(table.measure(), name)

    return draw


def of_questions(name: str, number: int, one: Callable[[np.random.Generator], float]) -> Draw:
    """A score of a task's questions."""

    def draw(chance: np.random.Generator) -> Measure:
        values = tuple(one(chance) for _ in range(number))
        return TaskScore("", tuple(map(str, range(number))), values).measure(name)

    return draw


def labels(chance: np.random.Generator) -> Measure:
    """Two labels, the second rarer and harder."""
    reader = LabelReader()
    for number in range(150):
        wanted = "no" if chance.random() < 0.3 else "yes"
        right = chance.random() < (0.6 if wanted == "no" else 0.9)
        reader.add(wanted, wanted if right else "other", f"d:{number}")
    table = reader.table()
    assert table is not None
    return only(table.measure(), "label_accuracy")


def corpus(name: str) -> Draw:
    """Characters of replies against those of references, both of unlike length."""

    def draw(chance: np.random.Generator) -> Measure:
        table = ReplyTable()
        for dialogue in range(100):
            reference = int(chance.integers(10, 200))
            reply = int(reference * chance.uniform(0.5, 1.1))
            table.add(str(dialogue), {}, NO_COUNTS | {name: [reply, reference]})
        return only(table.measure(), name)

    return draw


def hit(share: float, applies: float = 1.0) -> Callable[[np.random.Generator], float | None]:
    """100 or 0; None where the score does not apply."""
    return lambda chance: 100.0 * (chance.random() < share) if chance.random() < applies else None


def judged(chance: np.random.Generator) -> float:
    return float(chance.choice([0.0, 50.0, 100.0], p=[0.2, 0.3, 0.5]))


def alike(chance: np.random.Generator) -> float:
    return float(100 * chance.beta(8, 2))


def written(chance: np.random.Generator) -> float:
    return length_score(1000, int(chance.choice([400, 800, 1000, 1900])))


NEAR = float(np.mean([length_score(1000, words) for words in (400, 800, 1000, 1900)]))
CASES: dict[str, tuple[Draw, float]] = {
    "json_validity": (of_replies("json_validity", hit(0.8, 0.6)), 80),
    "json_match": (of_replies("json_match", hit(0.3, 0.6)), 30),
    "json_schema_validity": (of_replies("json_schema_validity", hit(0.7)), 70),
    "tool_call_schema": (of_replies("tool_call_schema", hit(0.85, 0.7)), 85),
    "stop_rate": (of_replies("stop_rate", hit(0.9)), 90),
    "judge_win_rate": (of_replies(WIN, judged), 65),
    "bert_score": (of_replies(BERT, alike), 80),
    "label_accuracy": (labels, 100 * (0.3 * 0.6 + 0.7 * 0.9)),
    "length_ratio": (corpus("length_ratio"), 80),
    "calls/simple": (of_questions("calls/simple", 100, hit(0.8)), 80),  # type: ignore[arg-type]
    "calls/irrelevance": (of_questions("calls/irrelevance", 60, hit(0.5)), 50),  # type: ignore[arg-type]
    "mmlu/acc": (of_questions("mmlu/acc", 300, hit(0.72)), 72),  # type: ignore[arg-type]
    "needle/4096": (of_questions("needle/4096", 30, hit(0.6)), 60),  # type: ignore[arg-type]
    "writing/1000": (of_questions("writing/1000", 40, written), NEAR),
}


# 200 rounds: three standard errors of 0.95 are 0.046. An interval of half the width covers 0.67.
@pytest.mark.parametrize("name", CASES)
def test_the_interval_of_a_score_holds_the_truth(name: str) -> None:
    draw, truth = CASES[name]
    assert 0.9 <= coverage(draw, truth, rounds=200) <= 0.99
