"""Replies to be one of a few labels -> accuracy, F1 of every label, and what was taken for what.

A label's hits, its number among the references and its number among the replies are summed over
dialogues, so that the intervals resample these sums, and a macro F1 has one too.

N replies, C labels, R resamples.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from finetune.evaluation.scores.metrics import of_source
from finetune.evaluation.scores.statistics import Measure, Score, described, intervals
from finetune.evaluation.scores.texts import Numbers

MOST = 50
"""Labels of a set; more are answers of another kind."""
LONGEST = 64
"""Characters of a label."""
FEWEST = 10
"""References that tell a set of labels from a few texts that happen to be alike."""
TIMES = 3
"""How often a label stands for a reference, on average."""
OTHER = "(none of them)"
"""What a reply counts as that is no label."""


class LabelReader:
    """Takes replies one by one, and gives up at the first reference that is no label."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str]] | None = []
        self._numbers: Counter[str] = Counter()

    def add(self, reference: str, reply: str, dialogue: str) -> None:
        """One more reply; those of one dialogue come one after another."""
        if self._rows is None:
            return
        label = _plain(reference)
        self._numbers[label] += 1
        if not label or len(label) > LONGEST or "\n" in label or len(self._numbers) > MOST:
            self._rows = None
        else:
            self._rows.append((reference.strip(), _plain(reply)[: LONGEST + 1], dialogue))

    def table(self) -> LabelTable | None:
        """The labels that the replies gave; None when the references are texts."""
        rows = self._rows or []
        if len(self._numbers) < 2 or len(rows) < max(FEWEST, TIMES * len(self._numbers)):
            return None
        place = {label: number for number, (label, _) in enumerate(self._numbers.most_common())}
        written = {place[_plain(one)]: one for one, _, _ in reversed(rows)}
        begins = [a[2] != b[2] for a, b in zip(rows, [("", "", "\0"), *rows], strict=False)]
        return LabelTable(
            tuple(written[number] for number in range(len(place))),
            np.array([place[_plain(one)] for one, _, _ in rows]),
            np.array([place.get(one, len(place)) for _, one, _ in rows]),
            np.cumsum(begins) - 1,
        )


def _plain(text: str) -> str:
    """A label without what people do not mean by it: case, white space and a full stop around it."""
    return text.strip().rstrip(".。!！").strip().casefold()


@dataclass(frozen=True)
class LabelTable:
    """The labels that one model gave, beside the right ones."""

    labels: tuple[str, ...]
    right: npt.NDArray[np.int64]
    """Number of the label of every reference [N]."""
    given: npt.NDArray[np.int64]
    """Number of the label of every reply, C where it is none [N]."""
    units: npt.NDArray[np.int64]
    """Number of the dialogue of every reply, rising [N]."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its scores."""
        return tuple(one.name for one in of_source("labels"))

    @cached_property
    def confusion(self) -> npt.NDArray[np.int64]:
        """Replies by right label (row) and given one (column, the last for none of them) [C, C + 1]."""
        found = np.zeros((len(self.labels), len(self.labels) + 1), dtype=np.int64)
        np.add.at(found, (self.right, self.given), 1)
        return found

    def measure(self) -> Measure:
        """Hits, references and replies of every label, dialogue by dialogue."""
        size = len(self.labels)
        units = np.zeros((int(self.units[-1]) + 1, 3 * size))
        hit, known = self.right == self.given, self.given < size
        np.add.at(units, (self.units[hit], self.right[hit]), 1)
        np.add.at(units, (self.units, size + self.right), 1)
        np.add.at(units, (self.units[known], 2 * size + self.given[known]), 1)
        return Measure(self.names, units, self._of_sums)

    def described(self) -> dict[str, Score]:
        """The scores with their intervals."""
        measure = self.measure()
        values = self._of_sums(measure.units.sum(axis=0, keepdims=True))[0]
        return described(
            self.names, values, intervals(measure), [len(self.right)] * len(self.names)
        )

    def report(self) -> LabelReport:
        """Every label's own scores, and the confusion."""
        size = len(self.labels)
        hits, wanted = np.diag(self.confusion[:, :size]), self.confusion.sum(axis=1)
        given = self.confusion[:, :size].sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = (100.0 * hits / given, 100.0 * hits / wanted, 200.0 * hits / (wanted + given))
        precision, recall, f1 = (np.nan_to_num(one).tolist() for one in columns)
        return LabelReport(
            labels=[*self.labels],
            precision=precision,
            recall=recall,
            f1=f1,
            confusion=self.confusion.tolist(),
        )

    def _of_sums(self, sums: Numbers) -> Numbers:
        hits, wanted, given = np.split(sums, 3, axis=1)  # each [R, C]
        scores = [one.of_labels(hits, wanted, given) for one in of_source("labels") if one.of_labels]  # fmt: skip
        return np.stack(scores, axis=1)


class LabelReport(BaseModel):
    """What `evaluation.json` says of the labels that a model gave; label by label, 0 to 100."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    labels: Annotated[list[str], Field(max_length=MOST)]
    precision: list[FiniteFloat]
    recall: list[FiniteFloat]
    f1: list[FiniteFloat]
    confusion: list[list[Annotated[int, Field(ge=0, lt=10**15)]]]
    """Replies by right label and given one; the last column is `OTHER`."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        size = len(self.labels)
        columns = (self.precision, self.recall, self.f1, self.confusion)
        if any(len(column) != size for column in columns):
            raise ValueError(
                "every label has a precision, a recall, an F1 and a row of the confusion"
            )
        if any(len(row) != size + 1 for row in self.confusion):
            raise ValueError("a row of the confusion has a number for every label and one more")
        return self
