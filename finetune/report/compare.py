"""Runs side by side by what they were asked while they were trained; no model is opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError, DataError
from finetune.evaluation.compared import rows
from finetune.evaluation.evaluate import Options
from finetune.evaluation.folder import write
from finetune.evaluation.targets import Target
from finetune.methods import METHODS
from finetune.report.runs import Run


def compare(runs: Sequence[Run], output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes an evaluation folder of the predictions that the runs left at their evaluations.

    Raises:
        ConfigError: A run left none.
        DataError: They were asked other questions.
    """
    empty = [str(run.path) for run in runs if not run.predictions]
    if empty:
        raise ConfigError(
            f"{', '.join(empty)}: no predictions-STEP.jsonl, for nothing was generated while it was "
            "trained; `finetune evaluate RUN RUN --include-base --data FILE` asks its checkpoints now"
        )
    targets = targets_of(runs)
    if len(targets) < 2:
        raise ConfigError(
            "name two or more runs to compare, or one that was evaluated more than once "
            "(evaluation.every_steps, evaluation.at_start); `finetune runs` lists them"
        )
    asked = {target.name: _asked(Path(target.path)) for target in targets}
    first = targets[0].name
    odd = [name for name, questions in asked.items() if questions != asked[first]]
    if odd:
        raise DataError(
            f"{', '.join(odd)}: asked other questions than {first} (data.validation or "
            "evaluation.max_samples differ); `finetune evaluate RUN RUN --data FILE` asks all the same"
        )
    return write(output, targets, [], Options(overwrite=overwrite))


def targets_of(runs: Sequence[Run]) -> list[Target]:
    """The base once per model, if it was asked before the first step, then every evaluated step."""
    bases: dict[str, Target] = {}
    steps = []
    for run in runs:
        for step, file in run.predictions.items():
            if step == 0:
                model = str(run.config.get("model.path"))
                name = "base" if not bases else f"base-{Path(model).name}"
                bases.setdefault(model, Target(name, str(file), "base"))
            else:
                method = METHODS.get(str(run.config.get("method.kind")), METHODS["full"])
                steps.append(Target(f"{_name(run, runs)}-{step}", str(file), method.result, step, str(run.path)))  # fmt: skip
    return [*bases.values(), *steps]


def _name(run: Run, runs: Sequence[Run]) -> str:
    """The run's folder, with the folders above it when two have the same."""
    path = run.path.absolute()
    same = [other for other in runs if other.path.absolute().name == path.name]
    return path.name if len(same) == 1 else "-".join(path.parts[-2:])


def _asked(file: Path) -> list[tuple[Any, Any]]:
    return [(row["where"], row["reference"]) for row in rows(file)]
