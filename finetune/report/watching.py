"""An evaluation that is made anew whenever its runs have new checkpoints, until they are over.

It stands beside training, on a device of its own; what was generated before is not generated again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from finetune import console
from finetune.artifacts.checkpoint import checkpoints
from finetune.artifacts.resolve import models_in
from finetune.errors import ConfigError, FinetuneError
from finetune.report.status import read_status
from finetune.storage.manifest import verify

EVERY_SECONDS = 15.0
"""Between two looks."""
Found = TypeVar("Found")


def until_over(runs: Sequence[str], evaluate: Callable[[list[str]], Found]) -> Found:
    """What `evaluate` made of the last checkpoints.

    Args:
        runs: run directories.
        evaluate: takes all good checkpoints of all runs.

    Raises:
        ConfigError: One is no run, or none of them trains and there is no checkpoint.
    """
    if not runs:
        raise ConfigError("--watch looks at runs: name one, such as runs/lora")
    seen: list[str] = []
    found: list[Found] = []
    while True:
        # Asked first: what comes between the two questions is seen by the next look.
        running = any(read_status(Path(run)).state == "running" for run in runs)
        there = _good(runs)
        if there and there != seen:
            if (made := _made(evaluate, there)) is not None:
                found, seen = [made], there
            continue
        if not running:
            break
        time.sleep(EVERY_SECONDS)
    if not found:
        raise ConfigError(
            f"--watch: {', '.join(runs)} has no checkpoint, and nobody trains it; start the training first"
        )
    return found[0]


def _good(runs: Sequence[str]) -> list[str]:
    """Checkpoints that are whole; one that is being written is not."""
    trained = [run for run in runs if any(not verify(one) for one in checkpoints(Path(run)))]
    return models_in(trained)


def _made(evaluate: Callable[[list[str]], Found], models: list[str]) -> Found | None:
    """None when a checkpoint was rotated away meanwhile: the next look has others."""
    try:
        return evaluate(models)
    except FinetuneError:
        if all(Path(model).is_dir() for model in models):
            raise
        console.say("a checkpoint was removed while it was evaluated; looking again")
        return None
