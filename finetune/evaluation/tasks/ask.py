"""Public tasks -> their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.chat.template import ChatTemplate
from finetune.evaluation.tasks import harness, plan
from finetune.evaluation.tasks.harness import Asking
from finetune.evaluation.tasks.table import TaskScore


def ask(
    model: Any, template: ChatTemplate, names: Sequence[str], how: Asking
) -> dict[str, TaskScore]:
    """What `model` scores on the tasks of these names."""
    from finetune.evaluation.tasks import calls, needle, writing

    tasks = plan.read_tasks(names)
    scores = harness.run_tasks(model, template, tasks, how)
    for task in tasks:
        if task.kind == "needle":
            scores |= needle.ask(model, template, plan.lengths_of(task))
        if task.kind == "writing":
            scores |= writing.ask(model, template, plan.lengths_of(task), how.batch_size)
        if task.kind == "calls":
            scores |= calls.ask(
                model,
                template,
                Path(task.name),
                batch_size=how.batch_size,
                max_samples=how.max_samples,
            )
    return scores
