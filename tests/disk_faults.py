"""A process that dies at a certain change of the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import safetensors.torch  # noqa: F401 - once here, and not in every process that is killed

from tests.reliability import faults


def ended_at(last: int, act: Callable[[], object]) -> int:
    """How a process ends that does `act` and is killed in place of change number `last`."""
    if (child := os.fork()) == 0:
        work = SimpleNamespace(act=act)
        faults.during(work, "act", faults.exit_at(last))
        work.act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
