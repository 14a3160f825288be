"""The processes of a run: how they find each other, agree, and fail together.

torchrun tells each process its place through RANK, LOCAL_RANK and WORLD_SIZE; without it a run is
one process. What one process finds wrong ends all of them with the same error and exit code, well
before anyone would run into a timeout.

Exit codes. `python finetune.py` and every worker end with the error's own code (143 and 130 after a
signal). torchrun itself always ends with 1 when a worker failed or when it was told to stop; the
worker's code stands in its summary as `exitcode  : 4`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from finetune.errors import ConfigError, FinetuneError


@dataclass(frozen=True, slots=True)
class Processes:
    """This process's place among the processes of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_leader(self) -> bool:
        """True in the one process that writes and talks."""
        return self.rank == 0

    def largest(self, values: list[int]) -> list[int]:
        """The maximum of each number over all processes."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [int(value) for value in tensor.tolist()]

    def sums(self, values: list[float]) -> list[float]:
        """The sum of each number over all processes, in float64."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def worst(self, here: int) -> int:
        """The largest outcome of all processes."""
        return self.largest([here])[0]

    def together(self, work: Callable[[], None]) -> None:
        """Do `work` in every process; when it fails in one, all raise that error."""
        with self.failing_together():
            work()

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Leave the block with an error in every process when it fails in one of them.

        The block must not hold collective operations that a failing process would skip.
        """
        problem: BaseException | None = None
        try:
            yield
        except BaseException as error:
            problem = error
        others = self._first_problem(problem)
        if problem is not None:
            raise problem
        if others is not None:
            raise others

    def _first_problem(self, problem: BaseException | None) -> FinetuneError | None:
        if not self.worst(problem is not None):
            return None
        said: list[FinetuneError | None] = [None] * self.world
        mine = problem
        if mine is not None and not isinstance(mine, FinetuneError):
            mine = FinetuneError(f"process {self.rank} failed: {type(mine).__name__}: {mine}")
        if self.world == 1:
            return mine
        dist.all_gather_object(said, mine)
        return next(error for error in said if error is not None)


def start(timeout_minutes: float, *, deepspeed: bool) -> Processes:
    """Join the other processes; every one must call it.

    A single process joins nobody, except for DeepSpeed, which wants a process group even so.
    """
    has_gpu = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ and deepspeed:
        # Found by itself, DeepSpeed would ask for mpi4py.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        _check_gpu_count(local_rank)
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # Before TrainingArguments, which would not pass the timeout on to gloo.
        dist.init_process_group(
            "nccl" if has_gpu else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            device_id=device if has_gpu else None,
        )
    return Processes(rank, world, device)


def end() -> None:
    """Leave the process group after a run that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_gpu_count(local_rank: int) -> None:
    if local_rank >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"torchrun started at least {local_rank + 1} processes on this machine, which has "
            f"{count} GPUs; use --nproc_per_node={count}"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
