"""What a save of several gigabytes costs in processes over gloo: beside writing alone, and beside training.

    python scripts/bench/saves.py [--gigabytes 4] [--processes 2] [--folder /some/disk]

Each process holds its part of a made-up optimizer's state. Measured in alternation: the parts written
and synced by torch.save alone; a whole save of ours (hashed on the way, sealed, renamed, the older one
rotated away); and with `training.async_save` what the next step waits for, beside the copy to memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cells

ROUNDS = 3


class Bench:
    """One of the processes."""

    def __init__(self, options: argparse.Namespace, folder: Path, rank: int) -> None:
        import torch

        from finetune.distributed.processes import patient_group

        self.folder, self.rank = folder, rank
        self.run = folder / "run"
        self.group = patient_group()
        number = int(options.gigabytes * 1e9 / options.processes / 4 / 8)
        self.state = {f"state {i}": torch.randn(number) for i in range(8)}
        self.saves = 0
        self.rotating = 0.0
        """Seconds that the older checkpoint took to go in the last save."""
        self.cpu = 0.0
        """Seconds of this process's threads in the last measurement."""
        if rank == 0:
            self.run.mkdir()

    def seconds(self, work: Callable[[], object]) -> float:
        """Of all processes together."""
        import torch.distributed as dist

        dist.barrier()
        begun, cpu = time.monotonic(), time.process_time()
        work()
        self.cpu = time.process_time() - cpu
        dist.barrier()
        return time.monotonic() - begun

    def alone(self) -> None:
        """This process's part, written and synced."""
        import torch

        with (self.folder / f"alone.{self.rank}").open("wb") as file:
            torch.save(self.state, file)
            file.flush()
            os.fsync(file.fileno())

    def save(self, held: dict[str, Any]) -> None:
        """A checkpoint, and the rotation after it."""
        from finetune.artifacts import checkpoint
        from finetune.distributed.processes import gather_objects, reduce_max
        from finetune.storage import folders
        from finetune.storage.hashed import hashing
        from finetune.training.snapshot import save_state

        self.saves += 1
        final = self.run / checkpoint.folder_name(self.saves)
        known: dict[str, tuple[int, str]] = {}

        def agreed(outcome: int) -> int:
            return reduce_max([outcome], self.group)[0]

        with folders.staged(
            final, is_rank0=self.rank == 0, reduce_max=agreed, replace=True, known=known
        ) as stage:
            with hashing(stage) as written:
                save_state(held, stage / f"part-{self.rank}")
            for part in gather_objects(written, self.group):
                known |= part
        begun = time.monotonic()
        if self.rank == 0:
            checkpoint.rotate(self.run, 1, whole=final)
        self.rotating = time.monotonic() - begun

    def round(self) -> dict[str, float]:
        """Each of them once."""
        from finetune.distributed.background import Background
        from finetune.training.snapshot import host_copy

        found = {"writing alone": self.seconds(self.alone), "its CPU": self.cpu}
        (self.folder / f"alone.{self.rank}").unlink()
        before = read_bytes()
        found["save"] = self.seconds(partial(self.save, self.state))
        found["CPU of a save"] = self.cpu
        found["of it the older one going"] = self.rotating
        found["bytes read"] = read_bytes() - before
        found["copy to memory"] = self.seconds(partial(host_copy, self.state, {}))
        beside = Background("save")
        begun = time.monotonic()
        beside.start(partial(self.save, host_copy(self.state, {})))
        found["held up"] = time.monotonic() - begun  # the next step begins here
        beside.wait()
        return found


def read_bytes() -> int:
    """That this process has read of files and sockets so far."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def process(options: argparse.Namespace, folder: Path, rank: int, port: int) -> None:
    """The life of a forked process."""
    import torch.distributed as dist

    code = 1
    try:
        place = {"RANK": rank, "WORLD_SIZE": options.processes, "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1")
        dist.init_process_group("gloo")
        bench = Bench(options, folder, rank)
        rounds = [bench.round() for _ in range(options.rounds)]
        if rank == 0:
            found = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
            found["save / writing alone"] = found["save"] / found["writing alone"]
            found["held up / copy to memory"] = found["held up"] / found["copy to memory"]
            asked = {"gigabytes": options.gigabytes, "processes": options.processes}
            print(json.dumps(asked | {n: round(v, 3) for n, v in found.items()}), flush=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    """One line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, help="On the disk that is to be measured.")
    options = parser.parse_args()
    sys.path.insert(0, str(cells.ROOT / "tests"))
    import runs

    folder = Path(tempfile.mkdtemp(dir=options.folder))
    port, children = runs.free_port(), []
    for rank in range(options.processes):
        if (child := os.fork()) == 0:
            process(options, folder, rank, port)
        children.append(child)
    bad = [child for child in children if os.waitpid(child, 0)[1]]
    shutil.rmtree(folder)
    return len(bad)


if __name__ == "__main__":
    raise SystemExit(main())
