"""What an evaluation folder holds: `evaluation.json` and a file of predictions per target."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from finetune.artifacts.names import EVALUATION
from finetune.artifacts.plain_files import check_plain
from finetune.errors import DataError
from finetune.evaluation.copies import inside
from finetune.evaluation.metrics import headline_of, metric
from finetune.storage.files import write_file
from finetune.storage.folders import finish_result

LARGEST = 1e100
"""Numbers beyond it are none that anything measured."""
Count = Annotated[int, Field(ge=0, lt=10**15)]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not abs(value) < LARGEST else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Score(_Part):
    """A mean with its 95 % interval over `n` samples; None where the question does not arise."""

    value: Number = None
    low: Number = None
    high: Number = None
    n: Count = 0


class TargetScores(_Part):
    """One model, or one file of predictions, that was scored."""

    name: str
    path: str
    kind: str
    step: Count | None = None
    run: str | None = None
    predictions: str
    scores: dict[str, Score]
    seconds: Number = None


class Comparison(_Part):
    """Whether `a` scores otherwise than `b`; the difference is a's score minus b's."""

    a: str
    b: str
    metric: str
    difference: Number
    low: Number = None
    high: Number = None
    p: Number = None
    p_holm: Number = None
    verdict: Literal["better", "worse", "no real difference"]


class DataFile(_Part):
    """Held-out data that was asked."""

    path: str
    fingerprint: str = ""
    samples: Count = 0


Slices = dict[str, dict[str, dict[str, dict[str, Score]]]]
"""Slice -> value -> target -> metric -> score."""


class Evaluation(_Part):
    """What `evaluation.json` says."""

    format: Literal[1]
    data: list[DataFile] = []
    settings: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    signatures: dict[str, str] = {}
    targets: list[TargetScores]
    slices: Slices = {}
    comparisons: list[Comparison] = []

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that some target has, in their order there."""
        names = (name for one in self.targets for name, score in one.scores.items() if score.n)
        return list(dict.fromkeys(names))

    @property
    def headline(self) -> str:
        """The metric that stands for all of them."""
        return headline_of(self.metrics)

    @property
    def base(self) -> TargetScores | None:
        """The untuned model, when it was asked too."""
        return next((target for target in self.targets if target.kind == "base"), None)

    @property
    def num_samples(self) -> int:
        """Replies that every target was asked for."""
        return sum(file.samples for file in self.data)

    def best(self, name: str) -> TargetScores:
        """The tuned target with the best score, or the base when there is no other."""
        tuned = [one for one in self.targets if one.kind != "base"] or self.targets
        return max(tuned, key=lambda target: goodness(name, target.scores.get(name)))

    def comparison(self, a: str, b: str, name: str) -> Comparison | None:
        """How `a` compares with `b`, whichever of the two was written first."""
        for one in self.comparisons:
            if one.metric == name and (one.a, one.b) == (a, b):
                return one
            if one.metric == name and (one.a, one.b) == (b, a):
                return _turned(one)
        return None


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with what every target replied."""

    row: Mapping[str, Any]
    """The first target's row: prompt, reference, where, slices, images."""
    replies: Sequence[str]
    """Target by target."""
    scores: Sequence[Mapping[str, float | None]]
    """Target by target."""


def read_evaluation(folder: Path) -> Evaluation:
    """What lies in `folder`; DataError when it is no whole evaluation."""
    file = folder / EVALUATION
    if folder.is_dir() and (problems := finish_result(folder)):
        raise DataError(
            f"{folder} is no whole evaluation: {'; '.join(problems)}; evaluate again (what was "
            "generated is kept), or delete manifest.json if you changed it yourself"
        )
    if not file.is_file():
        raise DataError(
            f"{folder} holds no {EVALUATION}; `finetune evaluate … --output {folder}` writes one"
        )
    check_plain(file)
    try:
        evaluation = Evaluation.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:10]]
        raise DataError(f"{file} is not as `finetune evaluate` writes it:\n  " + "\n  ".join(lines)) from error  # fmt: skip
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{file} cannot be read ({error}); evaluate again") from error
    if not evaluation.targets or not evaluation.metrics:
        raise DataError(f"{file} holds no scores; evaluate again with at least one reply")
    return evaluation


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Writes `evaluation.json` into `folder`."""
    text = json.dumps(evaluation.model_dump(), ensure_ascii=False, indent=1)
    write_file(folder / EVALUATION, text + "\n")


def predictions_of(folder: Path, target: TargetScores) -> Path:
    """The target's file of predictions; DataError when it is no file in the folder."""
    return inside(folder, target.predictions)


def common_rows(folder: Path, evaluation: Evaluation) -> set[tuple[Any, Any]]:
    """Place and message of the replies that every target was asked for."""
    files = dict.fromkeys(predictions_of(folder, target) for target in evaluation.targets)
    return set.intersection(*({_place(row) for row in _rows(file)} for file in files))


def samples(
    folder: Path, evaluation: Evaluation, common: Container[tuple[Any, Any]]
) -> Iterator[Sample]:
    """The `common` samples in their order, never all in memory.

    Raises:
        DataError: A file is missing, torn, or not in the order of the others.
    """
    files = [predictions_of(folder, target) for target in evaluation.targets]
    streams = [(row for row in _rows(file) if _place(row) in common) for file in files]
    for rows in zip(*streams, strict=True):
        first = rows[0]
        for file, row in zip(files, rows, strict=True):
            if _place(row) != _place(first):
                raise DataError(f"{file} has {_place(row)} where {files[0]} has {_place(first)}; evaluate again")  # fmt: skip
        yield Sample(
            first,
            [str(row.get("prediction", "")) for row in rows],
            [_scores(row.get("scores")) for row in rows],
        )


def goodness(name: str, score: Score | None) -> float:
    """A number that is higher the better the score is; minus infinity without one."""
    return metric(name).goodness(score.value if score else None)


def _turned(one: Comparison) -> Comparison:
    """The same comparison seen from the other side."""
    other = {"better": "worse", "worse": "better"}

    def minus(value: float | None) -> float | None:
        return None if value is None else -value

    return one.model_copy(
        update={
            "a": one.b,
            "b": one.a,
            "difference": minus(one.difference),
            "low": minus(one.high),
            "high": minus(one.low),
            "verdict": other.get(one.verdict, one.verdict),
        }
    )


def _scores(found: Any) -> dict[str, float | None]:
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {
        name: _finite(float(value))
        for name, value in pairs
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _place(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row.get("where"), row.get("message")


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8") as opened:
            for number, line in enumerate(opened, 1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{file}:{number}: not a JSON object; evaluate again")
                yield row
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); evaluate again") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: {error}; evaluate again") from error
