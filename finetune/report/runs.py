"""Run directories, read: configuration, history, best checkpoint, counts of the data. No torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    FiniteFloat,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from finetune.artifacts import checkpoint
from finetune.artifacts.names import EVALUATION, RUN_CONFIG, RUN_DATA, RUN_METRICS
from finetune.artifacts.plain_files import LARGEST_JSON, check_plain
from finetune.config.yaml_text import parse_file
from finetune.errors import ConfigError
from finetune.evaluation.schema import LARGEST
from finetune.evaluation.scores.metrics import metric

DEEPEST = 4
"""Folders below the one asked for in which runs are looked for."""


class _Lengths(BaseModel):
    edges: list[FiniteFloat]
    numbers: list[NonNegativeInt]

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if sorted(set(self.edges)) != self.edges or len(self.edges) < 2:
            raise ValueError("edges of lengths must rise")
        return self


class _Counts(BaseModel):
    model_config = ConfigDict(extra="allow")
    fingerprint: str = ""
    lengths: _Lengths | None = None


_COUNTS = TypeAdapter(dict[str, _Counts])
ALWAYS_OTHER = ("training.output_dir",)
"""Keys whose difference says nothing."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a run directory says about itself."""

    path: Path
    config: Mapping[str, Any]
    """Every option as `section.key`."""
    history: Sequence[Mapping[str, Any]]
    """The records of metrics.jsonl in order."""
    data: Mapping[str, Any]
    """Counts by kind (train, validation); empty for a run that wrote none."""
    checkpoints: Sequence[int]
    """Steps of the checkpoints that are there."""
    best_step: int | None
    """Step of the checkpoint that the run itself held to be best."""

    predictions: Mapping[int, Path]
    """By step, what it replied to the held-out prompts."""

    @property
    def last_step(self) -> int:
        """How far it came."""
        return max((int(record["step"]) for record in self.history), default=0)

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of one number of the history, such as `loss` or `eval_rouge-l`."""
        return [
            (float(record["step"]), float(record[key]))
            for record in self.history
            if _is_number(record.get(key))
        ]

    def best(self, name: str) -> tuple[int, float] | None:
        """The step with the best score in training, and the score."""
        found = [(int(step), value) for step, value in self.curve(f"eval_{name}")]
        goodness = metric(name).goodness
        return max(found, key=lambda pair: (goodness(pair[1]), -pair[0])) if found else None

    @property
    def scored(self) -> list[str]:
        """Names of the scores that it wrote during training."""
        names = (key for record in self.history for key in record if key.startswith("eval_"))
        return list(dict.fromkeys(name.removeprefix("eval_") for name in names))

    @property
    def summary(self) -> dict[str, Any]:
        """What `finetune runs --json` says of it."""
        best = {name: self.best(name) for name in self.scored}
        return {
            "path": str(self.path),
            "steps": self.last_step,
            "checkpoints": list(self.checkpoints),
            "best": {name: {"step": found[0], "value": found[1]} for name, found in best.items() if found},
            "config": dict(self.config),
        }  # fmt: skip


def read_run(folder: Path) -> Run:
    """The run in `folder`; ConfigError when there is none."""
    file = folder / RUN_CONFIG
    if not file.is_file():
        raise ConfigError(
            f"{folder} is not a run directory: it holds no {RUN_CONFIG}; give the folder of a run"
        )
    document = parse_file(file)
    if document.problems:
        raise ConfigError("\n".join(map(str, document.problems)))
    best = checkpoint.best(folder)
    steps = dict.fromkeys(map(checkpoint.step_of, checkpoint.checkpoints(folder)))
    return Run(
        path=folder,
        config=dict(_flat(document.value)),
        history=list(_history(folder / RUN_METRICS)),
        data=_data(folder / RUN_DATA),
        checkpoints=[step for step in steps if step is not None],
        best_step=checkpoint.step_of(best) if best else None,
        predictions=_predictions(folder),
    )


def find_runs(folder: Path) -> list[Run]:
    """The runs in and below `folder`, oldest first; checkpoints of a run are no runs."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder (seen from {Path.cwd()}); correct the path")
    found = []
    for place, names, files in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        names[:] = sorted(
            name
            for name in names
            if depth < DEEPEST
            and EVALUATION not in files  # it keeps copies of the runs' records
            and not name.startswith((".", "checkpoint-", "weights-"))
        )  # fmt: skip
        is_run = (Path(place) / RUN_CONFIG).is_file()  # no link to nothing
        if is_run and (RUN_METRICS in files or checkpoint.checkpoints(Path(place))):
            found.append(Path(place))
    return [
        read_run(path) for path in sorted(found, key=lambda p: (p / RUN_CONFIG).stat().st_mtime)
    ]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Options that are not the same in all runs, each with its value run by run; None where unset."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [(key, [run.config.get(key) for run in runs]) for key in keys]
    return [
        (key, values)
        for key, values in rows
        if key not in ALWAYS_OTHER and any(value != values[0] for value in values)
    ]


def _predictions(folder: Path) -> dict[int, Path]:
    found = [
        (re.fullmatch(r"predictions-(\d+)\.jsonl", file.name), file) for file in folder.iterdir()
    ]
    named = dict(sorted((int(n[1]), file) for n, file in found if n and not file.is_dir()))
    for file in named.values():
        check_plain(file)
    return named


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key` and value of every option; a list stays one value."""
    if not isinstance(value, dict) or not value:
        yield key, value
        return
    for name, inner in value.items():
        yield from _flat(inner, f"{key}.{name}" if key else str(name))


def _history(file: Path) -> Iterator[dict[str, Any]]:
    check_plain(file, largest=LARGEST_JSON)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); delete it") from error
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the torn last line of a run that was killed, or is writing just now
        if isinstance(record, dict) and _is_number(record.get("step")):
            yield record


def _is_number(value: Any) -> bool:
    """Whether it can be drawn."""
    return isinstance(value, (int, float)) and abs(value) < LARGEST


def _data(file: Path) -> dict[str, Any]:
    check_plain(file, largest=LARGEST_JSON)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); delete it") from error
    try:
        _COUNTS.validate_python(found)
    except ValidationError as error:
        raise ConfigError(f"{file} is not as training writes it ({error.errors()[0]['msg']}); leave this run out") from error  # fmt: skip
    return dict(found)
