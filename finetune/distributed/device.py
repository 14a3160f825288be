"""The device of this process: the one place that asks torch which accelerator there is.

`cuda` (NVIDIA, and AMD through ROCm), `npu` (Ascend, through torch_npu), `xpu` (Intel) and `mps` (Apple)
are used; what else torch may know is not, and said to be there. `FINETUNE_DEVICE=cpu` leaves all out.
"""

from __future__ import annotations

import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune import launcher
from finetune.distributed import hardware, position
from finetune.errors import ConfigError

BACKENDS = {"cuda": "nccl", "npu": "hccl", "xpu": "xccl", "mps": "gloo", "cpu": "gloo"}
"""What exchanges tensors between the processes of each kind of device."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of this process's device."""

    free: int
    total: int
    allocated: int
    """In tensors, now."""
    reserved: int
    """Held by torch, now."""
    most_allocated: int
    most_reserved: int


@dataclass(frozen=True, slots=True)
class Card:
    """One accelerator as `finetune doctor` and the plan want to know it."""

    name: str
    bytes: int
    capability: str
    """CUDA's compute capability; empty elsewhere."""
    native_bf16: bool


def kind() -> str:
    """The device type of this process: `cuda`, `npu`, `xpu`, `mps` or `cpu`."""
    if hardware.wants_cpu():
        return "cpu"
    found = torch.accelerator.current_accelerator()
    if found is None or found.type not in BACKENDS:
        return "cpu"
    module = getattr(torch, found.type, None)  # a backend's package brings it
    return found.type if module is not None and module.is_available() else "cpu"


def local_device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    found = kind()
    if found in ("cpu", "mps"):
        return torch.device(found)
    return torch.device(found, launcher.local_rank())


def has_accelerator() -> bool:
    """Whether this process computes on anything but its CPU."""
    return kind() != "cpu"


def backend() -> str:
    """The process group's backends: gloo for what lies on the CPU, and the device's own."""
    found = BACKENDS[kind()]
    return "gloo" if found == "gloo" else f"cpu:gloo,{kind()}:{found}"


def device_backend() -> str:
    """The backend of tensors on the device."""
    return BACKENDS[kind()]


def count() -> int:
    """Accelerators that this process sees."""
    return 0 if not has_accelerator() else int(_module(kind()).device_count())


def select() -> torch.device | None:
    """Make this process's accelerator torch's current one; None where there is no choice.

    Raises:
        ConfigError: The launcher started more processes here than there are accelerators.
    """
    device = local_device()
    if device.type in ("cpu", "mps"):
        return None
    if launcher.local_rank() >= (number := count()):
        raise ConfigError(
            f"torchrun started at least {launcher.local_rank() + 1} processes on this machine, which "
            f"has {number} {'GPU' if device.type in ('cuda', 'xpu') else device.type}s; "
            f"use --nproc_per_node={number}"
        )
    _module(device.type).set_device(device)
    return device


def unused(root: Path = Path("/")) -> str:
    """What is said of an accelerator that shows and that this process cannot use; empty for none."""
    if has_accelerator():
        return ""
    makers = hardware.shown(root)
    if not makers:
        return ""
    maker = makers[0]
    return (
        f"this machine has {maker.name}, which the installed torch ({torch.__version__}) cannot use: "
        f"{maker.remedy}. To compute on the CPU all the same, set {hardware.FORCED}=cpu"
    )


def refuse_unused(root: Path = Path("/")) -> None:
    """ConfigError rather than training on the CPU of a machine that has an accelerator."""
    if said := unused(root):
        raise ConfigError(said)


# --- number formats ---------------------------------------------------------------------------------


def has_native_bf16() -> bool:
    """Whether the device multiplies bfloat16 in hardware; torch's own check counts emulation."""
    found = kind()
    if found == "cpu":
        return False
    if found == "cuda":
        return bool(_module(found).is_bf16_supported(including_emulation=False))
    if found == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    check: Callable[[], bool] | None = getattr(_module(found), "is_bf16_supported", None)
    return check is None or bool(check())


def cards() -> list[Card]:
    """Every accelerator that this process sees."""
    return [_card(number) for number in range(count())]


def card() -> Card | None:
    """This process's accelerator."""
    return _card(local_device().index or 0) if has_accelerator() else None


def _card(number: int) -> Card:
    if kind() == "mps":
        size = int(torch.mps.recommended_max_memory())
        return Card("Apple GPU", size, "", has_native_bf16())
    said = _module(kind()).get_device_properties(number)
    major, minor = getattr(said, "major", None), getattr(said, "minor", 0)
    is_cuda = kind() == "cuda" and torch.version.hip is None
    return Card(
        str(said.name),
        int(said.total_memory),
        f"{major}.{minor}" if is_cuda else "",
        major >= 8 if is_cuda and major is not None else has_native_bf16(),
    )


# --- memory -----------------------------------------------------------------------------------------


def memory() -> Memory | None:
    """Of the accelerator; None on a CPU."""
    found = kind()
    if found == "cpu":
        return None
    if found == "mps":
        total, held = int(torch.mps.recommended_max_memory()), torch.mps.driver_allocated_memory()
        now = torch.mps.current_allocated_memory()
        return Memory(total - held, total, now, held, now, held)
    module = _module(found)
    free, total = module.mem_get_info()
    return Memory(
        int(free),
        int(total),
        int(module.memory_allocated()),
        int(module.memory_reserved()),
        int(module.max_memory_allocated()),
        int(module.max_memory_reserved()),
    )


def free_bytes() -> int:
    """What this process can still take: of its accelerator, or its share of the machine's memory."""
    if (held := memory()) is not None:
        return held.free + held.reserved - held.allocated
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = 1024 * int(
            next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
        )
    except (OSError, StopIteration):  # no Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return free // launcher.local_world_size()


def memory_gb() -> float:
    """Peak memory of this process: on its accelerator if there is one, else resident."""
    if (held := memory()) is not None:
        return held.most_allocated / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# --- work -------------------------------------------------------------------------------------------


def numbers(tensor: torch.Tensor) -> list[Any]:
    """The tensor's numbers; the accelerator is waited for, and with it what other processes send."""
    with position.waiting_for_device():
        found: list[Any] = tensor.tolist()
    return found


def synchronize() -> None:
    """Wait until the accelerator has done what it was asked for."""
    if has_accelerator():
        _module(kind()).synchronize()


def give_back_unused() -> None:
    """Return what this process's allocator holds and does not use to the accelerator."""
    if has_accelerator():
        _module(kind()).empty_cache()


def prepare_determinism() -> None:
    """What cuBLAS must be told before it is first used, for `deterministic`."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic() -> Iterator[None]:
    """Sums in one order inside; RuntimeError where torch has no way of computing one so."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def random_state() -> torch.Tensor | None:
    """The state of the accelerator's random stream; None on a CPU."""
    return _module(kind()).get_rng_state() if has_accelerator() else None


def random_states(*, everywhere: bool) -> dict[str, Any]:
    """The streams as a checkpoint holds them, by the kind of device; nothing on a CPU.

    With `everywhere` those of all accelerators of the machine, as transformers reads them in a run
    of several processes.
    """
    if not has_accelerator():
        return {}
    module = _module(kind())
    several = everywhere and hasattr(module, "get_rng_state_all")
    return {kind(): module.get_rng_state_all() if several else module.get_rng_state()}


def set_random_state(state: torch.Tensor | None) -> None:
    """Put back what `random_state` gave."""
    if state is not None:
        _module(kind()).set_rng_state(state)


def pins_memory() -> bool:
    """Whether host memory can be pinned for copies to the accelerator."""
    return kind() not in ("cpu", "mps")


def collective_version() -> str | None:
    """NCCL's version on NVIDIA GPUs; None elsewhere or where torch has none."""
    if kind() != "cuda" or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _module(found: str) -> Any:
    """torch.cuda, torch.npu, torch.xpu or torch.mps."""
    return getattr(torch, found)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Random streams go on afterwards as if nothing had happened.

    So a run learns the same whether or not it is evaluated on the way.
    """
    python, numpy, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_device = random_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_cpu)
        set_random_state(on_device)
