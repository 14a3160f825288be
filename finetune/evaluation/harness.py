"""Public tasks, asked by lm-evaluation-harness with a model that is open already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune import launcher
from finetune.errors import ConfigError, DataError

PACKAGE = "lm_eval"
Scores = dict[str, dict[str, float | int | None]]
"""`task/metric` -> value, low, high, n."""


def check_harness(tasks: Sequence[str]) -> None:
    """Says before a model is opened what keeps `tasks` from being asked.

    Raises:
        ConfigError: The harness is not installed, or there are several processes.
    """
    if not tasks:
        return
    if find_spec(PACKAGE) is None:
        raise ConfigError(
            "--tasks needs lm-evaluation-harness, which is not installed: "
            "pip install 'glm4-finetune[tasks]'"
        )
    if launcher.world_size() > 1:
        raise ConfigError("--tasks runs in one process; start it without torchrun")
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise ConfigError(f"--tasks: {task} is no file (seen from {Path.cwd()})")


def run_tasks(
    model: Any, tokenizer_folder: str, tasks: Sequence[str], *, batch_size: int
) -> Scores:
    """What the harness finds, each score in the task's own scale with its 95 % interval.

    Args:
        model: an open model, PEFT or not.
        tokenizer_folder: where its tokenizer lies.
        tasks: names of tasks, or YAML files that define one.
        batch_size: requests at once.

    Raises:
        ConfigError: There is no task of that name.
        DataError: A task's data is neither on this disk nor reachable.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    names = [Path(task).stem if task.endswith((".yaml", ".yml")) else task for task in tasks]
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigError(
            f"--tasks: lm-evaluation-harness has no {', '.join(unknown)}; `lm_eval ls tasks` lists "
            "them, and the file of a task of your own is named after it"
        )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    opened = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(opened, tasks=names, task_manager=manager, log_samples=False)
    except (OSError, ValueError) as error:  # what datasets raises for data that is not there
        reason = str(error).splitlines()[0] if str(error) else ""
        raise DataError(
            f"--tasks {' '.join(tasks)}: {type(error).__name__}: {reason}; a task's data must be in "
            "the cache of datasets, reachable on the hub, or local files that its YAML names"
        ) from error
    return _scores(found)


def signature() -> str:
    """How a task's score came about."""
    try:
        return f"lm-evaluation-harness {version('lm-eval')}, in the task's own scale"
    except PackageNotFoundError:
        return "lm-evaluation-harness"


def _scores(found: Mapping[str, Any]) -> Scores:
    scores: Scores = {}
    for task, values in found["results"].items():
        number = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, _, by = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{by}")
            spread = 1.96 * error if isinstance(error, (int, float)) else None
            scores[f"{task}/{metric}"] = {
                "value": float(value),
                "low": None if spread is None else value - spread,
                "high": None if spread is None else value + spread,
                "n": int(number or 0),
            }
    return scores
