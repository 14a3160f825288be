"""What torchrun tells each process through its environment; without it a run is one process.

Known before torch is imported, and before the processes have found each other: that is
`finetune.distributed.processes`.
"""

from __future__ import annotations

import os

NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def problem() -> str | None:
    """What is wrong with the variables, which others than torchrun may have set; None when nothing is."""
    said = {name: os.environ[name] for name in NUMBERS if os.environ.get(name)}
    remedy = "start with torchrun or finetune launch, or unset RANK, LOCAL_RANK and WORLD_SIZE"
    for name, value in said.items():
        if not value.isdecimal() or (name.endswith("SIZE") and int(value) == 0):
            return f"the variable {name} is {value!r}, which is no number of processes; {remedy}"
    name, others = "WORLD_SIZE", ["RANK", "MASTER_ADDR", "MASTER_PORT"]
    if name not in said:
        name, others = "RANK", ["WORLD_SIZE"] if rank() else []
    if missing := [other for other in others if not os.environ.get(other)]:
        return f"the variable {name} is set without {' and '.join(missing)}; {remedy}"
    if "WORLD_SIZE" in said and rank() >= world_size():
        return (
            f"the variable RANK is {rank()} of {world_size()} processes, counted from 0; {remedy}"
        )
    return None


def forget_empty() -> None:
    """Take variables without a value out of the environment: libraries would read a number in them."""
    for name in NUMBERS:
        if os.environ.get(name) == "":
            del os.environ[name]


def _number(name: str, default: int) -> int:
    """The number in a variable; the default where it is none, which `problem` says."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def rank() -> int:
    """This process's number among all processes of the run."""
    return _number("RANK", 0)


def local_rank() -> int:
    """This process's number on its machine, which is also that of its GPU."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """How many processes were started on this machine."""
    return _number("LOCAL_WORLD_SIZE", world_size())


def world_size() -> int:
    """How many processes were started, on all machines together."""
    return _number("WORLD_SIZE", 1)


def is_launched() -> bool:
    """Whether torchrun (or another launcher that speaks its variables) started this process."""
    return "WORLD_SIZE" in os.environ
