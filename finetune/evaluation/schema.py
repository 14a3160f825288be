"""What an evaluation folder holds: `evaluation.json`, a file of predictions per target, and copies.

A page is made of the folder alone: whoever wrote the folder cannot make it show other files of the
machine on which the page is made. So `evaluate` and `compare` copy what the page needs into it.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from finetune.artifacts.names import EVALUATION, RUN_CONFIG, RUN_DATA, RUN_METRICS
from finetune.artifacts.plain_files import check_plain
from finetune.data.chat.image import ImageError, opened_image
from finetune.errors import DataError
from finetune.evaluation.scores.labels import LabelReport
from finetune.evaluation.scores.metrics import headline_of, metric
from finetune.storage.files import whole_binary, write_file
from finetune.storage.folders import finish_result

RUN_FILES = (RUN_CONFIG, RUN_METRICS, RUN_DATA)
PICTURE_SIDE = 384
"""Pictures are scaled down to this many pixels."""
PICTURE_BYTES = 24_000_000
"""Room for pictures; those after it are named instead of shown."""
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
    batch_size: Count | None = None
    """How many prompts were generated at once."""
    prompts_per_rank: list[Count] = []
    """How many prompts each process answered when it was last generated."""


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


class Published(_Part):
    """A figure that a model's makers published, beside which a score may stand."""

    score: str
    value: Number
    model: str


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
    published: list[Published] = []
    """Figures of the presets of `--tasks`."""
    needles: dict[str, dict[str, Number]] = {}
    """By target: `en:4096:25` (language, tokens, depth in per cent) -> 100 where it was found."""
    labels: dict[str, LabelReport] = {}
    """By target, where the references are labels."""

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


def inside(folder: Path, name: str) -> Path:
    """The regular file of that name in `folder`, links followed.

    Raises:
        DataError: It is not there, lies outside, or is a pipe, a device or the like.
    """
    try:
        path = (folder / name).resolve()
        if path.is_relative_to(folder.resolve()) and path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, links in a circle
        pass
    raise DataError(f"{folder} holds no file {name[:200]!r}; evaluate again")


def run_copy(folder: Path, run: str) -> Path | None:
    """Where `folder` keeps the records of a run; None when it keeps none."""
    copy = folder / _run(run)
    if not (copy / RUN_CONFIG).exists():
        return None
    for name in RUN_FILES:
        if (copy / name).is_symlink() or (copy / name).exists():
            inside(folder, f"{_run(run)}/{name}")
    return copy


def keep_run(folder: Path, run: str) -> None:
    """Copies a run's configuration, history and counts into `folder`; nothing when they are gone."""
    for name in RUN_FILES:
        if (Path(run) / name).is_file():
            (folder / _run(run)).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(run) / name, folder / _run(run) / name)


def keep_pictures(folder: Path, images: Iterable[str]) -> None:
    """Keeps small copies of images in `folder`, each once, while there is room."""
    room = PICTURE_BYTES
    for image in dict.fromkeys(images):
        try:
            data = _small(image)
        except ImageError:
            continue  # the page says that it has no copy
        room -= len(data)
        if room < 0:
            return
        with whole_binary(folder / _picture(image)) as file:
            file.write(data)


def picture(folder: Path, image: str) -> bytes:
    """The small copy of an image, a WebP file.

    Raises:
        DataError: The folder keeps none, or keeps something else under its name.
    """
    path = inside(folder, _picture(image))
    data = path.read_bytes() if path.stat().st_size <= PICTURE_BYTES else b""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("WEBP",)) as opened:
            if max(opened.size) <= PICTURE_SIDE:
                opened.load()
                return data
    except Exception as error:  # decoders raise anything on damaged files
        raise DataError(f"{path} is no picture: {error}; evaluate again") from error
    raise DataError(f"{path} is larger than {PICTURE_SIDE} pixels; evaluate again")


def _small(image: str) -> bytes:
    with opened_image(image) as found:
        small = found.convert("RGB")
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def _picture(image: str) -> str:
    return f"pictures/{_digest(image)}.webp"


def _run(run: str) -> str:
    return f"runs/{_digest(run)}"


def _digest(name: str) -> str:
    return sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
