"""Which checkpoint is the best: the newest that learned without forgetting, by tests against the untuned model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from finetune import console
from finetune.artifacts.names import UNTUNED
from finetune.evaluation.scores import forgetting
from finetune.evaluation.scores.forgetting import Criterion
from finetune.evaluation.scores.statistics import Measure
from finetune.storage import journal
from finetune.storage.disk import BestEffort
from finetune.storage.files import whole_binary
from finetune.training.measuring.keeping import KeptData

CHOICES = "choices.jsonl"
"""In the run directory: the tests of every evaluation."""
CHOSEN = "chosen"
"""1 at an evaluation whose checkpoint becomes the best, 0 at others."""


class Chooser:
    """Compares each evaluation with the untuned model, in the run directory over interruptions."""

    def __init__(self, run_dir: Path, kept: KeptData) -> None:
        self._run_dir, self._kept = run_dir, kept
        self._writing = BestEffort(CHOICES, "the choice itself is kept in the checkpoint")
        self._untuned = _read_units(run_dir / UNTUNED)
        self._known = {row["step"]: row["p"] for row in journal.rows(run_dir / CHOICES)}

    def chosen(self, step: int, measures: Mapping[str, Measure]) -> bool:
        """Whether this step's checkpoint is the best now; says why.

        Args:
            step: 0 is the untuned model, which is kept to compare with.
            measures: the domain's score first, then what must not be lost.
        """
        if step == 0:
            self._keep_untuned({name: one.units for name, one in measures.items()})
            return False
        lost = [name for name in measures if not self._is_there(name, measures[name])]
        if lost:
            console.warn(
                f"step {step}: the untuned model's {', '.join(lost)} is not known or was of other data, "
                "so nothing is chosen; a run from its beginning measures it"
            )
            return False
        untuned = {name: Measure(one.names, self._untuned[name], one.scores) for name, one in measures.items()}  # fmt: skip
        margins = {name: self._kept.margin(name) for name in measures}
        criteria = forgetting.criteria_of(measures, untuned, margins)
        earlier = [p for at, p in sorted(self._known.items()) if at < step]
        is_chosen = forgetting.qualifies(criteria, earlier)
        self._note(step, criteria, is_chosen)
        console.say(_in_words(step, criteria, is_chosen))
        return is_chosen

    def _is_there(self, name: str, measure: Measure) -> bool:
        return name in self._untuned and self._untuned[name].shape == measure.units.shape

    def _keep_untuned(self, units: dict[str, Any]) -> None:
        self._untuned, self._known = units, {}
        if console.is_rank0():
            with self._writing():
                with whole_binary(self._run_dir / UNTUNED) as file:
                    np.savez(file, **{_key(name): rows for name, rows in units.items()})
                (self._run_dir / CHOICES).unlink(missing_ok=True)

    def _note(self, step: int, criteria: Sequence[Criterion], is_chosen: bool) -> None:
        self._known[step] = forgetting.p_of(criteria)
        if console.is_rank0():
            row = {"step": step, "p": self._known[step], "chosen": is_chosen, "criteria": [asdict(one) for one in criteria]}  # fmt: skip
            with self._writing():
                journal.append(self._run_dir / CHOICES, [row], durable=False)


def conclusion(run_dir: Path) -> str:
    """What was chosen of a whole run, in words; empty where nothing was compared."""
    rows = list(journal.rows(run_dir / CHOICES))
    if not rows:
        return ""
    chosen = [row for row in rows if row["chosen"]]
    row = chosen[-1] if chosen else rows[-1]
    criteria = [Criterion(**one) for one in row["criteria"]]
    if chosen:
        return (
            f"checkpoint-{row['step']} is the newest that learned without forgetting: "
            f"{'; '.join(map(str, criteria))}"
        )
    failed = [str(one) for one in criteria if not one.passes] or ["too many checkpoints were tried for its p"]  # fmt: skip
    return (
        f"no checkpoint of {len(rows)} learned without forgetting, so none is the best; the newest "
        f"(step {row['step']}): {'; '.join(failed)}"
    )


def _in_words(step: int, criteria: Sequence[Criterion], is_chosen: bool) -> str:
    told = "the best so far" if is_chosen else "not chosen"
    return f"step {step}  beside the untuned model: {'; '.join(map(str, criteria))}: {told}"


def _key(name: str) -> str:
    """A score's name as that of an array in a file."""
    return json.dumps(name)[1:-1].replace("/", "|")


def _read_units(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    with np.load(file, allow_pickle=False) as found:
        return {json.loads(f'"{key}"').replace("|", "/"): found[key] for key in found.files}
