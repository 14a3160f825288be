"""The processes of a run: how they find each other, agree, and fail together.

torchrun tells each process its rank through the environment; without it a run is one process, and
everything here costs nothing. What one process finds wrong ends all of them with the same error and
exit code, well before anyone would run into a timeout.

Exit codes. `python finetune.py` and every worker end with the error's own code (128 + n after signal
n). torchrun itself always ends with 1 when a worker failed or when it was told to stop; the worker's
code stands in its summary as `exitcode  : 4`.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune import launcher
from finetune.distributed import device, position
from finetune.errors import ConfigError, FinetuneError

Result = TypeVar("Result")
_STORES = count()

PATIENCE = timedelta(hours=12)
"""How long the processes wait for one that reads or writes a disk; it gives signs of life meanwhile."""
_patient: dict[Any, Any] = {}

LOST = ("gloo", "pair closure", "closed by peer", "reset by peer")
"""How gloo words a connection that is no more; who waits on one closed already is not told by whom."""


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and the number of processes that have joined."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_rank0() -> bool:
    """True in the one process that writes files."""
    return rank_and_world()[0] == 0


def reduce_max(values: Sequence[int], group: Any = None) -> list[int]:
    """The largest of each number over all processes."""
    if rank_and_world()[1] == 1:
        return list(values)
    position.advance()
    tensor = torch.tensor(values, dtype=torch.int64, device=_collective_device(group))
    with _waiting_in(group):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return [int(value) for value in tensor.tolist()]


def reduce_sum(values: Sequence[float]) -> list[float]:
    """The sum of each number over all processes, in float64."""
    if rank_and_world()[1] == 1:
        return list(values)
    position.advance()
    tensor = torch.tensor(values, dtype=torch.float64, device=_collective_device())
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def any_rank(flag: bool, group: Any = None) -> bool:
    """Whether `flag` is true on any process."""
    return bool(reduce_max([flag], group)[0])


def gather_objects(value: Result, group: Any = None) -> list[Result]:
    """The `value` of every process, by rank, on every process."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    position.advance()
    values: list[Any] = [None] * world
    with _waiting_in(group):
        dist.all_gather_object(values, value, group=group)
    return values


def shared_store(purpose: str) -> Any:
    """A key-value store of the process group, empty and for one purpose; None for a single process.

    Every process calls it at the same points.
    """
    if rank_and_world()[1] == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"finetune/{purpose}/{next(_STORES)}", store)  # type: ignore[attr-defined]


def broadcast_from_rank0(work: Callable[[], Result], group: Any = None) -> Result:
    """What `work` returns on rank 0, on every process; nobody else calls it.

    When it raises, every process raises.
    """
    rank, world = rank_and_world()
    if world == 1:
        return work()
    box: list[Any] = [None]
    with fail_together(group):
        if rank == 0:
            box = [work()]
    with _waiting_in(group):
        dist.broadcast_object_list(box, group=group)
    result: Result = box[0]
    return result


@contextmanager
def fail_together(group: Any = None) -> Iterator[None]:
    """Leave the block with an error in every process when it fails in one of them.

    The block must not hold collective operations that a failing process would skip.
    """
    problem: BaseException | None = None
    try:
        yield
    except BaseException as error:
        problem = error
    first = _first_problem(problem, group)
    if problem is not None:
        raise problem
    if first is not None:
        raise first


def _first_problem(problem: BaseException | None, group: Any) -> FinetuneError | None:
    """What the lowest rank with a problem says; None when all is well everywhere."""
    rank, world = rank_and_world()
    if world == 1 or not any_rank(problem is not None, group):
        return None
    mine = problem
    if mine is not None and not isinstance(mine, FinetuneError):
        mine = FinetuneError(f"process {rank} failed: {type(mine).__name__}: {mine}")
    return next(error for error in gather_objects(mine, group) if error is not None)


def is_lost_connection(error: BaseException) -> bool:
    """Whether waiting for others was in vain, by what torch and gloo raise then."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in LOST)
    )


@contextmanager
def joined_processes(*, timeout_minutes: float = 30.0, deepspeed: bool = False) -> Iterator[None]:
    """Joins the processes that torchrun started, unless they are joined already (in training).

    A single process joins nobody, except for DeepSpeed, which wants a process group even so.
    """
    if dist.is_initialized():
        yield
        return
    if (said := launcher.problem()) is not None:
        raise ConfigError(said)
    launcher.forget_empty()
    if deepspeed and not launcher.is_launched():
        # Found by itself, DeepSpeed would ask for mpi4py.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    selected = device.select()
    if launcher.is_launched():
        # In training before TrainingArguments, which would not pass the timeout on to gloo.
        dist.init_process_group(
            device.backend(),
            timeout=timedelta(minutes=timeout_minutes),
            device_id=selected,
        )
    yield
    # Not after an error: the others may be waiting in the middle of something.
    if dist.is_initialized():
        deepspeed_comm = sys.modules.get("deepspeed.comm")
        if deepspeed_comm is not None and deepspeed_comm.is_initialized():
            deepspeed_comm.destroy_process_group()  # what it remembers of the group goes too
        else:
            dist.destroy_process_group()


def patient_group() -> Any:
    """A group of all processes on gloo whose waits may take PATIENCE; every process asks for it at once.

    For waiting while one of them reads or writes a disk: in NCCL that would hold the GPUs and end
    after `training.process_timeout_minutes`.
    """
    if rank_and_world()[1] == 1:
        return None
    world = dist.group.WORLD
    if world not in _patient:
        # Making a group waits as long for a process that is gone: all meet first, within the usual time.
        any_rank(False)
        _patient.clear()  # those of a world that is no more
        _patient[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _patient[world]


def _waiting_in(group: Any) -> AbstractContextManager[None]:
    return position.waiting_patiently() if group is not None else nullcontext()


def is_sharded(model: nn.Module) -> bool:
    """True under ZeRO-3 while weights lie apart: every process must take part in a forward pass."""
    return rank_and_world()[1] > 1 and any(map(is_apart, model.parameters()))


def is_apart(weight: Tensor) -> bool:
    """Whether ZeRO-3 has left this process only a part of a weight."""
    status = getattr(weight, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def gather_to_rank0(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors `names` of the model's state, whole on rank 0; empty in other processes.

    Every process must call it with the same names. Weights that ZeRO-3 holds in parts are gathered
    one at a time: no process but rank 0 ever holds more than one of them, and rank 0 those that were
    asked for. Weights that are whole already are not copied.
    """
    parameters = dict(model.named_parameters())
    state = model.state_dict() if is_rank0() else {}
    gathered = {}
    for name in names:
        parameter = parameters.get(name)
        if parameter is not None and hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                if is_rank0():
                    gathered[name] = parameter.detach().cpu().clone()
        elif is_rank0():
            gathered[name] = state[name].detach()
    return gathered


def _collective_device(group: Any = None) -> torch.device:
    """Where numbers must lie for the process group to reduce them: beside NCCL runs gloo, on the CPU."""
    alone = dist.get_backend(group) in ("nccl", "hccl", "xccl")
    return device.local_device() if alone else torch.device("cpu")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
