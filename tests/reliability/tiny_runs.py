"""Runs of four steps to break: of every method and sharding, or of plain transformers.Trainer.

A run without a fault is made once per kind, with a checkpoint after every step. A case begins with
some of these checkpoints, lets a process meet its fault, starts again as a user would, and compares
what the second start ends with.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 4
LORA = {"kind": "lora", "rank": 4, "dropout": 0.1}
PREFIX = {"kind": "ptuning_v2", "num_virtual_tokens": 4}
FULL = {"kind": "full"}
Before = Callable[[int], object]


@dataclass(frozen=True)
class Kind:
    """A kind of run."""

    name: str
    method: dict[str, Any]
    processes: int = 1
    zero_stage: int | None = None
    stock: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the config, as `section__key`."""


KINDS = {
    kind.name: kind
    for kind in (
        Kind("lora", LORA),
        Kind("prefix", PREFIX),
        Kind("full", FULL),
        Kind("full beside training", FULL, changes={"training__async_save": True}),
        Kind("lora on 2", LORA, 2),
        Kind("full on 2, ZeRO-2", FULL, 2, 2),
        Kind("lora on 2, ZeRO-3", LORA, 2, 3),
        Kind("full on 2, ZeRO-3", FULL, 2, 3),
    )
}
STOCK = {name: Kind(f"{name}, plain Trainer", KINDS[name].method, stock=True) for name in ("lora", "full")}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a start ended."""

    codes: list[int]
    said: str
    """By all its processes."""

    @property
    def well(self) -> bool:
        """Every process ended with 0."""
        return not any(self.codes)


class Bench:
    """A tiny model, its data, and the runs without a fault."""

    def __init__(self, folder: Path) -> None:
        os.environ["FINETUNE_CACHE"] = str(folder / "cache")
        import cells
        import runs
        import tiny

        self.folder = folder
        self.model = tiny.save_model(folder / "model", "glm")
        self.data = runs.write_dialogues(folder / "train.jsonl", 9)
        cells.warm_up(self.model)
        import finetune.cli.commands  # noqa: F401

    def settings(self, kind: Kind, run_dir: Path, **changes: Any) -> dict[str, Any]:
        """The config of a run; `changes` are `section__key=value`."""
        import runs

        changes = {"training__save_every_steps": 1} | kind.changes | changes
        settings = runs.config(self.model, self.data, run_dir, training__max_steps=STEPS)
        settings["method"] = dict(kind.method)
        if kind.zero_stage is not None and "deepspeed__config" not in changes:
            settings["deepspeed"] = {"zero_stage": kind.zero_stage}
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if key == "method__kind":
                settings["method"] = {}
            settings.setdefault(section, {})[name] = value
        return settings

    def start(
        self,
        kind: Kind,
        folder: Path,
        before: Before | None = None,
        *,
        environment: dict[str, str] | None = None,
        grace: float = 10.0,
        **changes: Any,
    ) -> Ended:
        """Start the run in `folder/run`; `before` is called in each of its processes."""
        import cells

        from tests.reliability import stock

        cell = cells.Cell(
            "run",
            self.settings(kind, folder / "run", **changes),
            kind.processes,
            environment or {},
            before=lambda rank: (mutate(), before(rank) if before else None),
            program=stock.train if kind.stock else None,
        )
        codes = cells.exit_codes(cell, folder, grace=grace)
        logs = [folder / f"run.{rank}.log" for rank in range(kind.processes)]
        return Ended(codes, "\n".join(log.read_text("utf-8", "replace") for log in logs))

    def whole(self, kind: Kind) -> Path:
        """The run without a fault."""
        folder = self.folder / kind.name.replace(" ", "-")
        if not folder.exists():
            folder.mkdir()
            ended = self.start(kind, folder, training__save_every_steps=1)
            assert ended.well, f"{kind.name}: {ended.codes} {ended.said[-2000:]}"
        return folder / "run"

    def begin(self, kind: Kind, folder: Path, steps: Iterable[int]) -> Path:
        """A run directory with the checkpoints of `steps`."""
        (folder / "run").mkdir()
        for step in steps:
            saved = f"checkpoint-{step}"
            shutil.copytree(self.whole(kind) / saved, folder / "run" / saved)
        return folder / "run"

    def differs(self, kind: Kind, folder: Path) -> str:
        """What is not as in the run without a fault, or an empty text."""
        whole, part = self.whole(kind), folder / "run"
        last = f"checkpoint-{STEPS}"
        if not (part / last).is_dir():
            return f"there is no {last}"
        names = sorted(file.name for file in (whole / last).glob("*.safetensors"))
        for name in names:
            theirs = part / last / name
            if not theirs.exists() or theirs.read_bytes() != (whole / last / name).read_bytes():
                return f"{name} has other weights"
        if history(whole / last) != history(part / last):
            return "other losses were logged"
        return ""


def half_written(kind: Kind, run_dir: Path) -> str:
    """A checkpoint that shows itself must be whole; at least one must be there."""
    from finetune.artifacts import checkpoint
    from finetune.storage import folders

    if kind.stock:
        return ""  # has no means to tell
    found = checkpoint.checkpoints(run_dir)
    problems = [f"{path.name}: {why}" for path in found for why in folders.verify(path)]
    in_between = any(run_dir.glob(f"{folders.REPLACED}*"))
    return "; ".join(problems) or ("" if found or in_between else "no checkpoint is left")


def goes_on(bench: Bench, kind: Kind, folder: Path, *said: str, **changes: Any) -> str:
    """Why the next start does not end as the run without a fault, saying what it should say.

    It must go on from the newest good checkpoint: to begin anew would end in the same weights too.
    """
    newest = 0 if kind.stock else newest_good_step(folder / "run")
    ended = bench.start(kind, folder, **changes)
    if not ended.well:
        return f"the next start ended with {ended.codes}: {ended.said[-300:]}"
    begun = re.search(r"resuming from .*checkpoint-(\d+)", ended.said)
    if newest > (int(begun[1]) if begun else 0):
        return f"it did not go on from checkpoint-{newest}: {ended.said[-500:]}"
    missing = [text for text in said if text not in ended.said and not kind.stock]
    if missing:
        return f"the next start did not say {missing}: {ended.said[-500:]}"
    return bench.differs(kind, folder)


def newest_good_step(run_dir: Path) -> int:
    """Of the newest checkpoint that verifies; 0 without one."""
    from finetune.artifacts import checkpoint

    newest, _ = checkpoint.newest_good(run_dir)
    return (checkpoint.step_of(newest) if newest else None) or 0


def history(checkpoint: Path) -> list[Any]:
    """Step, loss, gradient norm and scores of everything logged up to a checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    kept = ("step", "loss", "grad_norm", "learning_rate")
    return [
        {key: value for key, value in entry.items() if key in kept or key.startswith("eval_")}
        for entry in state["log_history"]
        if "loss" in entry or "eval_loss" in entry
    ]


def mutate() -> None:
    """Take out the safeguard that the command was asked to take out."""
    if name := os.environ.get("RELIABILITY_MUTATION"):
        from tests.reliability.mutations import MUTATIONS

        MUTATIONS[name].remove()
