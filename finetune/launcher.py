"""What torchrun tells each process through its environment; without it a run is one process.

Known before torch is imported, and before the processes have found each other: that is
`finetune.distributed.processes`.
"""

from __future__ import annotations

import os


def rank() -> int:
    """This process's number among all processes of the run."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes were started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def world_size() -> int:
    """How many processes were started, on all machines together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether torchrun (or another launcher that speaks its variables) started this process."""
    return "WORLD_SIZE" in os.environ
