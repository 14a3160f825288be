"""Public tasks, asked by lm-evaluation-harness with a model that is open already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console, launcher
from finetune.errors import ConfigError, DataError
from finetune.evaluation.tasks import plan
from finetune.evaluation.tasks.plan import Task, read_tasks
from finetune.evaluation.tasks.table import TaskScore

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate

PACKAGE = "lm_eval"


@dataclass(frozen=True, slots=True)
class Asking:
    """How tasks are asked."""

    batch_size: int
    """Questions at once."""
    max_samples: int | None = None
    """Of every task at most its first so many questions."""
    data: str | None = None
    """A folder that holds data sets as `OWNER/NAME`, in which they are looked for first."""


def harness_version() -> str:
    """Of the harness that is installed; nothing without one."""
    return version("lm-eval") if find_spec(PACKAGE) is not None else ""


def check_harness(names: Sequence[str]) -> None:
    """Says before a model is opened what keeps the tasks of `--tasks` from being asked.

    Raises:
        ConfigError: The harness is not installed, or there are several processes.
    """
    if not names:
        return
    if launcher.world_size() > 1:
        raise ConfigError("--tasks runs in one process; start it without torchrun")
    for task in read_tasks(names):
        if task.name.endswith((".yaml", ".yml")) and not Path(task.name).is_file():
            raise ConfigError(
                f"--tasks: {task.name} is no file (seen from {Path.cwd()}); correct the path"
            )
        if task.kind in ("needle", "writing"):
            plan.lengths_of(task)
        if task.kind in ("chat", "text") and find_spec(PACKAGE) is None:
            raise ConfigError(
                f"--tasks {task.name} needs lm-evaluation-harness, which is not installed: "
                "pip install 'glm4-finetune[tasks]'"
            )
    if out := plan.left_out(names):
        console.warn(
            f"{', '.join(out)}: left out, because it runs programs that the model writes; set "
            "HF_ALLOW_CODE_EVAL=1 where you would let them run"
        )


def run_tasks(
    model: Any, template: ChatTemplate, tasks: Sequence[Task], asking: Asking
) -> dict[str, TaskScore]:
    """What every question scores, by `task/metric`; shares of right answers in per cent.

    Raises:
        ConfigError: There is no task of that name.
        DataError: A task's data is neither on this disk nor reachable.
    """
    found: dict[str, TaskScore] = {}
    for kind in ("chat", "text"):
        if chosen := [task for task in tasks if task.kind == kind]:
            found |= _asked(model, template, chosen, asking)
    return found


def _asked(
    model: Any, template: ChatTemplate, tasks: Sequence[Task], asking: Asking
) -> dict[str, TaskScore]:
    """The scores of tasks of one kind."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from finetune.evaluation.tasks.language_model import OpenLanguageModel

    files = [Path(task.name) for task in tasks if task.name.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    names = [task.label for task in tasks]
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigError(
            f"--tasks: lm-evaluation-harness has no {', '.join(unknown)}; `lm_eval ls tasks` lists "
            "them, and the file of a task of your own is named after it"
        )
    opened = OpenLanguageModel(model, template, batch_size=asking.batch_size)
    is_chat = tasks[0].kind == "chat"
    try:
        with _local_data(asking.data):
            found: Any = simple_evaluate(
                opened,
                tasks=names,
                task_manager=manager,
                limit=asking.max_samples,
                apply_chat_template=is_chat,
                bootstrap_iters=0,  # our own intervals
                confirm_run_unsafe_code=plan.runs_code(),
            )
    except (OSError, ValueError) as error:  # what datasets raises for data that is not there
        reason = str(error).splitlines()[0] if str(error) else ""
        raise DataError(
            f"--tasks {','.join(names)}: {type(error).__name__}: {reason}; a task's data must be in "
            "the cache of datasets, reachable on the hub, under --tasks-data, or local files that "
            "its YAML names"
        ) from error
    found["group_subtasks"] |= {name: _tagged(manager, name) for name in names if name in manager.all_tags}  # fmt: skip
    how = f"lm-evaluation-harness {harness_version()}, " + ("chat template" if is_chat else "plain text")  # fmt: skip
    return {name: score for task in names for name, score in _scores(found, task, how)}


def _tagged(manager: Any, tag: str) -> list[str]:
    """The tasks that carry a tag, such as those of all languages."""
    return [name for name, entry in manager.task_index.items() if tag in entry.tags]


@contextmanager
def _local_data(folder: str | None) -> Iterator[None]:
    """Data sets that lie under `folder` as OWNER/NAME are read from there."""
    if folder is None:
        yield
        return
    import datasets

    load = datasets.load_dataset

    def local(path: str, *args: Any, **options: Any) -> Any:
        here = Path(folder) / path
        return load(str(here) if here.is_dir() else path, *args, **options)

    datasets.load_dataset = local
    try:
        yield
    finally:
        datasets.load_dataset = load


def _scores(found: Mapping[str, Any], task: str, how: str) -> Iterator[tuple[str, TaskScore]]:
    """Every score of one task or group of tasks."""
    results = found["results"].get(task, {})
    leaves = _leaves(found, task)
    shots = found.get("n-shot", {}).get(leaves[0], 0) if leaves else 0
    keys = list(results) or [key for leaf in leaves[:1] for key in found["results"][leaf]]
    for key in keys:
        metric, _, by = key.partition(",")
        if metric.endswith("_stderr") or not by:
            continue
        name = f"{task}/{metric}" + (f":{by}" if by != "none" else "")
        said = f"{how}, {shots}-shot"
        items = [one for leaf in leaves for one in _items(found, leaf, metric, by)]
        if items:
            share = all(0 <= value <= 1 for _, value in items)
            values = tuple(value * 100 if share else value for _, value in items)
            said += ", mean over questions" + (" in per cent" if share else "")
            yield name, TaskScore(said, tuple(id for id, _ in items), values)
        elif isinstance(value := results.get(key), (int, float)):
            error = results.get(f"{metric}_stderr,{by}")
            number = found.get("n-samples", {}).get(task, {}).get("effective")
            yield (
                name,
                TaskScore(
                    f"{said}, in the task's own scale",
                    value=float(value),
                    error=float(error) if isinstance(error, (int, float)) else None,
                    n=int(number or 0),
                ),
            )


def _leaves(found: Mapping[str, Any], task: str) -> list[str]:
    """The tasks that were asked in a group of tasks, or the task itself."""
    inner = found.get("group_subtasks", {}).get(task) or []
    return [leaf for one in inner for leaf in _leaves(found, one)] if inner else [task]


def _items(found: Mapping[str, Any], task: str, metric: str, by: str) -> list[tuple[str, float]]:
    """What every question scored; none when some question's score is no number."""
    rows = [row for row in found.get("samples", {}).get(task, []) if row.get("filter", "none") == by]  # fmt: skip
    values = [row.get(metric) for row in rows]
    if not all(isinstance(value, (bool, int, float)) for value in values):
        return []
    return [(f"{task}:{row['doc_id']}", float(row[metric])) for row in rows]
