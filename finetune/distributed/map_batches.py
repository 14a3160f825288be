"""Batches dealt out to the processes: every result once, in order, on every process.

Batches are made without looking at the number of processes. One process and eight therefore compute
the very same tensors, and an evaluation does not depend on where it ran.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from finetune import console
from finetune.errors import FinetuneError

Poll = Callable[[], bool]
Result = TypeVar("Result")


class EvaluationStoppedError(FinetuneError):
    """`should_stop` said so before everything was computed; what there was is dropped."""


def in_turns(
    model: Any,
    batches: Sequence[list[int]],
    work: Callable[[list[int]], Result],
    *,
    label: str,
    should_stop: Poll | None = None,
) -> list[Result]:
    """`work(batch)` of every batch, in the order of `batches`, on every process.

    All processes call this together. A turn is one batch for each of them; batches of similar work
    should therefore stand together.

    Raises:
        EvaluationStoppedError: `should_stop` returned True on some process.
    """
    rank, world = place()
    everybody = sharded(model)
    done: list[tuple[int, Result]] = []
    with evaluating(model), console.progress(sum(map(len, batches)), label) as bar:
        for first in range(0, len(batches), world):
            turn = batches[first : first + world]
            # Every process must run every forward pass when each holds a part of the weights: one
            # without a batch in the last turn repeats another's and forgets the result.
            if rank < len(turn):
                done.append((first + rank, work(turn[rank])))
            elif everybody:
                work(turn[0])
            if anywhere(model, should_stop is not None and should_stop()):
                raise EvaluationStoppedError(
                    f"evaluation ({label}) was stopped after {first + len(turn)} of "
                    f"{len(batches)} batches"
                )
            bar.advance(sum(map(len, turn)))
    return [result for _, result in sorted(_gather(done), key=lambda pair: pair[0])]


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by falling length: little padding, and what is too large for the memory fails first."""
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sharded(model: Any) -> bool:
    """True under ZeRO-3, where a forward pass is an affair of all processes."""
    return place()[1] > 1 and any(hasattr(weight, "ds_id") for weight in model.parameters())


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; each module gets its own mode back afterwards.

    It ends dropout and activation checkpointing, and with the latter what forbids the cache.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def anywhere(model: Any, here: bool) -> bool:
    """Whether `here` is true on any process; keeps the processes within one batch of each other."""
    if place()[1] == 1:
        return here
    flag = torch.tensor(float(here), device=model.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _gather(done: list[tuple[int, Result]]) -> list[tuple[int, Result]]:
    world = place()[1]
    if world == 1:
        return done
    parts: list[list[tuple[int, Result]]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, done)
    return [pair for part in parts for pair in part]


@contextmanager
def joined_processes() -> Iterator[None]:
    """Joins the processes that torchrun started, unless they are joined already (in training)."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    yield
    # Not after an error: the others may be waiting in the middle of something.
    dist.destroy_process_group()


def from_the_first(work: Callable[[], Result] | None) -> Result:
    """What `work` returns on the first process, on every process; the others pass None."""
    box: list[Any] = [work() if work is not None else None]
    if place()[1] > 1:
        dist.broadcast_object_list(box)
    result: Result = box[0]
    return result
