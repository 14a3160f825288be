"""Several processes of a run as forks of the test: they meet over gloo, and torch is imported once."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from runs import free_port


def in_ranks(
    world: int, work: Callable[[int], Any], *, joined: bool = True, seconds: float = 120.0
) -> list[Any]:
    """What `work(rank)` returns in each of so many processes; what one raises in words, `Kind: text`.

    They see what torchrun would tell them. Without `joined` whatever `work` calls is to join them.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_one, args=(rank, world, port, work, joined, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    found = []
    for pipe, process in zip(pipes, processes, strict=True):
        try:
            found.append(pipe.recv() if pipe.poll(seconds) else "no end")
        except EOFError:
            process.join(60)
            found.append(f"ended with {process.exitcode}")
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    return found


def _one(
    rank: int, world: int, port: int, work: Callable[[int], Any], joined: bool, to: Connection
) -> None:
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)  # of a run in the test's own process
    try:
        if joined:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        found = work(rank)
        if joined:
            dist.barrier()
    except BaseException as error:
        traceback.print_exc()
        found = f"{type(error).__name__}: {error}"
    to.send(found)
