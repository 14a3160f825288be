"""Saves of real runs: what they read back, what waits for them, what is there after a crash in one.

    python tests/save_runs.py FOLDER

Prints one JSON object. Processes are forks that talk over gloo; a slow disk is a pause in every write.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts" / "bench"))

import cells

LORA, FULL = {"kind": "lora", "rank": 4}, {"kind": "full"}


class Bench:
    """A tiny model and its data."""

    def __init__(self, folder: Path) -> None:
        import runs
        import tiny

        self.folder = folder
        self.model = tiny.save_model(folder / "model", "glm")
        self.data = runs.write_dialogues(folder / "train.jsonl", 9)
        cells.warm_up(self.model)

    def run(
        self,
        name: str,
        method: dict[str, Any],
        processes: int = 1,
        stage: int | None = None,
        before: Callable[[int], object] | None = None,
        **changes: Any,
    ) -> tuple[list[int], str]:
        """Exit codes, and what all processes said."""
        import runs

        settings = runs.config(
            self.model, self.data, self.folder / name, training__max_steps=4,
            **{"training__save_every_steps": 1, "training__keep_checkpoints": 1} | changes,
        ) | {"method": method}  # fmt: skip
        if stage is not None:
            settings["deepspeed"] = {"zero_stage": stage}
        cell = cells.Cell(name, settings, processes, before=before)
        codes = cells.exit_codes(cell, self.folder, grace=30)
        logs = [self.folder / f"{name}.{rank}.log" for rank in range(processes)]
        return codes, "\n".join(log.read_text("utf-8", "replace") for log in logs)

    def left(self, name: str) -> list[str]:
        """What lies in the run directory, whole folders of checkpoints only."""
        from finetune.storage.folders import verify

        return sorted(
            path.name
            for path in (self.folder / name).iterdir()
            if path.is_dir() and not path.name.startswith(".") and not verify(path)
        )

    def weights(self, name: str, step: int = 4) -> str:
        """A digest of what was trained."""
        folder = self.folder / name / f"checkpoint-{step}"
        file = next(folder.glob("*model.safetensors"))
        return str(json.loads((folder / "manifest.json").read_text())["files"][file.name]["sha256"])


def reads_noted(folder: Path) -> Callable[[int], object]:
    """Notes every file below `folder` that is opened for reading while a save runs."""

    def before(rank: int) -> None:
        from finetune.training.checkpointing import Saver

        inside = [False]
        original = Saver._save

        def saving(self: Saver, *arguments: Any) -> None:
            inside[0] = True
            original(self, *arguments)
            inside[0] = False

        Saver._save = saving  # type: ignore[method-assign]
        log = os.open(folder / f"read.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def heard(event: str, arguments: tuple[Any, ...]) -> None:
            if event != "open" or not inside[0] or not isinstance(arguments[0], str | bytes):
                return
            path, mode, flags = os.fsdecode(arguments[0]), arguments[1], arguments[2]
            reads = "r" in mode if mode else not flags & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY)
            if reads and "checkpoint-" in path and not Path(path).is_dir():
                os.write(log, f"{path}\n".encode())

        sys.addaudithook(heard)

    return before


def slow_disk(seconds: float) -> Callable[[int], object]:
    """Every file that process 0 writes for a checkpoint takes so long."""

    def before(rank: int) -> None:
        from finetune.storage.hashed import HashedFile

        stop = HashedFile.stop

        def slowly(self: HashedFile) -> None:
            time.sleep(seconds)
            stop(self)

        if rank == 0:
            HashedFile.stop = slowly  # type: ignore[method-assign]

    return before


def timed_steps(file: Path, then: Callable[[int], object]) -> Callable[[int], object]:
    """Notes in `file` when saves begin and end, and when steps do."""

    def before(rank: int) -> None:
        from finetune.training.checkpointing import Saver
        from finetune.training.trainer import FineTuner

        then(rank)
        if rank:
            return
        log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def noted(owner: Any, method: str) -> None:
            original = getattr(owner, method)

            def timed(self: Any, *arguments: Any, **options: Any) -> Any:
                begun = time.monotonic()
                result = original(self, *arguments, **options)
                line = json.dumps([method, begun, time.monotonic()])
                os.write(log, f"{line}\n".encode())
                return result

            setattr(owner, method, timed)

        noted(Saver, "_save")
        noted(Saver, "_begin")
        noted(FineTuner, "training_step")

    return before


def dies_in_the_save(rank: int, files: int) -> Callable[[int], object]:
    """A process ends in the middle of the second save, after so many of its files."""

    def before(here: int) -> None:
        from finetune.storage.hashed import HashedFile
        from finetune.training.checkpointing import Saver

        if here != rank:
            return
        saves, written = [0], [0]
        save, stop = Saver._save, HashedFile.stop

        def counted(self: Saver, *arguments: Any) -> None:
            saves[0] += 1
            save(self, *arguments)

        def dying(self: HashedFile) -> None:
            written[0] += saves[0] == 2
            if written[0] > files:
                os._exit(9)
            stop(self)

        Saver._save, HashedFile.stop = counted, dying  # type: ignore[method-assign]

    return before


def main() -> None:
    """All runs, one after another."""
    bench = Bench(Path(sys.argv[1]))
    found: dict[str, Any] = {}
    for name, method, processes, stage in (
        ("run lora", LORA, 1, None),
        ("run full on 2", FULL, 2, None),
        ("run full on 2, ZeRO-2", FULL, 2, 2),
        ("run lora on 2, ZeRO-3", LORA, 2, 3),
    ):
        folder = bench.folder / f"notes {name}"
        folder.mkdir()
        codes, said = bench.run(name, method, processes, stage, reads_noted(folder))
        reads = "".join(file.read_text() for file in folder.iterdir()).splitlines()
        found[name] = {"codes": codes, "read": reads, "left": bench.left(name), "weights": bench.weights(name)}  # fmt: skip
        if any(codes):
            found[name]["said"] = said[-1500:]
    # A save of 4 s where processes wait 2 s for each other.
    codes, said = bench.run(
        "slow", FULL, 2, None, slow_disk(0.5), training__process_timeout_minutes=2 / 60,
        training__save_every_steps=4,
    )  # fmt: skip
    found["slow"] = {"codes": codes, "left": bench.left("slow"), "said": said[-1500:]}
    for name, method, processes, stage in (
        ("beside on 2", FULL, 2, None),
        ("beside on 2, ZeRO-2", FULL, 2, 2),
    ):
        times = bench.folder / f"{name} times"
        before = timed_steps(times, slow_disk(0.3))
        codes, said = bench.run(name, method, processes, stage, before, training__async_save=True)
        found[name] = {
            "codes": codes, "left": bench.left(name), "weights": bench.weights(name),
            "times": [json.loads(line) for line in times.read_text().splitlines()],
        }  # fmt: skip
        if any(codes):
            found[name]["said"] = said[-1500:]
    for rank, files in ((0, 2), (1, 0)):
        name = f"dies {rank} {files}"
        codes, said = bench.run(
            name, FULL, 2, None, dies_in_the_save(rank, files), training__async_save=True
        )
        after = bench.left(name)
        again, _ = bench.run(name, FULL, 2, None, None, training__async_save=True)
        found[name] = {
            "codes": codes, "after": after, "again": again, "left": bench.left(name),
            "weights": bench.weights(name), "said": said[-800:],
        }  # fmt: skip
    for name, changes in {
        "both": {"training__save_every_steps": 3, "training__save_weights_every_steps": 2},
        "weights": {"training__save": "weights", "training__save_every_steps": 2},
    }.items():
        codes, said = bench.run(name, LORA, 1, None, None, **changes, training__keep_checkpoints=9)
        found[name] = {"codes": codes, "left": bench.left(name)}
    codes, said = bench.run("weights", LORA, 1, None, None, training__save="weights")
    found["again"] = {"codes": codes, "said": said[-500:]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
