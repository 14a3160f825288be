"""A save of two processes: both write, both fail, they wait in the group for disks, and nothing is read back."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forks import in_ranks
from transformers.trainer_callback import TrainerControl, TrainerState

from finetune.config.schema import TrainingSection
from finetune.distributed import processes
from finetune.storage import folders, manifest
from finetune.storage.hashed import hashed_text
from finetune.training import checkpointing
from finetune.training.checkpointing import Saver
from finetune.training.snapshot import Snapshot


def read_back(*_: Any, **__: Any) -> None:
    raise AssertionError("a file was read back")


def take(trainer: Any, texts: Any, **_: Any) -> Snapshot:
    return Snapshot(TrainerState(**vars(trainer.state)), False, None, dict, {}, texts)  # type: ignore[arg-type]


def written_by(rank: int, fails: str) -> None:
    """Saves of this process write two small files, or meet a full disk behind one of them."""

    def write(stage: Path, what: str, name: str) -> None:
        hashed_text(stage / name, "x" * 100)
        if fails == f"{what} {rank}":
            raise OSError(errno.ENOSPC, "No space left on device")

    checkpointing.take = take
    Saver.save_weights = lambda self, snapshot, stage: write(stage, "weights", f"weights_{rank}")  # type: ignore[method-assign]
    Snapshot.write_states = lambda self, stage: write(stage, "states", f"rng_state_{rank}")  # type: ignore[method-assign]
    manifest._hash = read_back  # type: ignore[assignment]


def groups_noted() -> list[tuple[str, Any]]:
    """Each wait for the others from now on: what, and in which group."""
    groups: list[tuple[str, Any]] = []
    for name in ("reduce_max", "gather_objects", "fail_together"):

        def noted(*given: Any, name: str = name) -> Any:
            groups.append((name, given[-1]))
            return getattr(processes, name)(*given)

        setattr(checkpointing, name, noted)
    return groups


def saving(folder: Path, rank: int, fails: str) -> dict[str, Any]:
    """Two saves of this process: what is raised in words, and where was waited."""
    written_by(rank, fails)
    base: Any = None
    section = TrainingSection(output_dir=str(folder), keep_checkpoints=1, on_full_disk="stop")
    saver = Saver(folder, "config", {"format": 1}, base, "loss", section)
    groups, said = groups_noted(), "saved"
    trainer = SimpleNamespace(
        state=TrainerState(max_steps=9), control=TrainerControl(), trained_weights=[],
        callback_handler=SimpleNamespace(callbacks=[]), data=SimpleNamespace(feed=None),
    )  # fmt: skip
    try:
        for trainer.state.global_step in (2, 4):
            saver.save(trainer)
    except Exception as error:
        said = type(error).__name__
    own = [name for name, group in groups if group is not saver.group]
    return {"said": said, "elsewhere": own, "waited": sorted({name for name, _ in groups})}


@pytest.mark.parametrize("fails", ["", "weights 0", "weights 1", "states 0", "states 1"])
def test_processes_save_together_or_not_at_all(fails: str, tmp_path: Path) -> None:
    found = in_ranks(2, lambda rank: saving(tmp_path, rank, fails), seconds=30)
    said = "SpaceError" if fails else "saved"
    for one in found:
        assert one["said"] == said, found
        assert one["elsewhere"] == []
    left = sorted(path.name for path in tmp_path.iterdir())
    if fails:
        assert left == []
        return
    assert found[0]["waited"] == ["fail_together", "gather_objects", "reduce_max"]
    assert left == ["checkpoint-4"]
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"weights_0", "weights_1", "rng_state_0", "rng_state_1"} < names
    assert folders.verify(tmp_path / "checkpoint-4") == []
