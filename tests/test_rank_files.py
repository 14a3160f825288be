"""Which process writes what: a run directory has one writer, whatever a run keeps in it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import runs
from forks import in_ranks

WRITES = os.O_WRONLY | os.O_RDWR


def written_below(folder: Path, found: set[str]) -> None:
    """Notes all that this process opens for writing, renames or removes below a folder from now on."""

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not (set(mode or "") & set("wax+") or (mode is None and flags & WRITES)):
                return
        elif event in ("os.rename", "os.remove", "os.truncate"):
            path = arguments[0]
        else:
            return
        if isinstance(path, str | bytes) and os.fsdecode(path).startswith(str(folder)):
            found.add(f"{event} {os.path.relpath(os.fsdecode(path), folder)}")

    sys.addaudithook(heard)


def test_of_two_processes_one_writes_and_the_other_adds_its_random_streams(
    tiny_glm: Path, tmp_path: Path
) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 8)
    held_out = runs.write_dialogues(tmp_path / "held-out.jsonl", 4, seed=1)
    run_dir = tmp_path / "run"
    settings = runs.config(
        tiny_glm, data, run_dir, training__max_steps=3, training__save_every_steps=1,
        training__keep_checkpoints=1, training__save_weights_every_steps=2, training__profile=1,
        training__report_to=["tensorboard"], data__validation=str(held_out),
        evaluation__every_steps=1, evaluation__at_start=True, evaluation__max_new_tokens=2,
        evaluation__keep={"data": str(held_out)}, evaluation__choose="domain_without_forgetting",
    )  # fmt: skip

    def run(rank: int) -> Any:
        found: set[str] = set()
        written_below(run_dir, found)
        summary = runs.run_here(settings)
        return summary["steps"], sorted(found)

    (steps, first), (steps_of_other, second) = in_ranks(2, run, joined=False)
    assert (steps, steps_of_other) == (3, 3)
    assert {line.rpartition("/")[2] for line in second} == {"rng_state_1.pth"}, second
    lies = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}
    expected = (
        "config.yaml", "data.json", "metrics.jsonl", "untuned.npz", "choices.jsonl", "predictions-3.jsonl",
        "profile/kernels.txt", "checkpoint-3/optimizer.pt", "checkpoint-3/rng_state_0.pth",
        "checkpoint-3/rng_state_1.pth",
    )  # fmt: skip
    assert lies >= set(expected), sorted(lies)
    assert any(name.startswith("logs/events") for name in lies)
    assert any("weights-" in line for line in first)
