"""Accelerators that this machine shows, whatever the installed torch can do with them. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

FORCED = "FINETUNE_DEVICE"
"""Set to `cpu` in the environment: compute on the CPU whatever else there is."""


@dataclass(frozen=True, slots=True)
class Maker:
    """How a maker's cards show, and what makes torch see them."""

    name: str
    files: tuple[str, ...]
    """Patterns under /; one that is there means a card."""
    kind: str
    """The device type of torch."""
    hidden_by: tuple[str, ...]
    """Environment variables that name the cards to be seen; empty or -1 for none."""
    remedy: str


MAKERS = (
    Maker(
        "an NVIDIA GPU",
        ("dev/nvidia[0-9]*", "proc/driver/nvidia/version", "usr/lib/wsl/lib/libcuda.so*"),
        "cuda",
        ("CUDA_VISIBLE_DEVICES",),
        "install a torch with CUDA (https://pytorch.org/get-started/locally), and see nvidia-smi",
    ),
    Maker(
        "an AMD GPU",
        ("dev/kfd",),
        "cuda",
        ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        "install a torch with ROCm (https://pytorch.org/get-started/locally)",
    ),
    Maker(
        "an Ascend NPU",
        ("dev/davinci[0-9]*",),
        "npu",
        ("ASCEND_RT_VISIBLE_DEVICES",),
        "install torch_npu of the version of torch, and see npu-smi info",
    ),
    Maker(
        "an Intel Gaudi",
        ("dev/hl[0-9]*", "sys/class/accel/accel*/device/driver/module/drivers/pci:habanalabs"),
        "hpu",
        ("HABANA_VISIBLE_DEVICES",),
        "Gaudi is not supported",
    ),
    Maker(
        "a Cambricon MLU",
        ("dev/cambricon_dev[0-9]*",),
        "mlu",
        ("MLU_VISIBLE_DEVICES",),
        "MLUs are not supported",
    ),
    Maker(
        "a Moore Threads GPU",
        ("dev/mtgpu.[0-9]*",),
        "musa",
        ("MUSA_VISIBLE_DEVICES",),
        "MUSA is not supported",
    ),
)
"""Intel's GPUs are not listed: an integrated one, which nobody trains on, shows like a large one."""


def wants_cpu() -> bool:
    """Whether the user has said that nothing but the CPU is to compute."""
    return os.environ.get(FORCED, "").lower() == "cpu"


def shown(root: Path = Path("/")) -> list[Maker]:
    """The makers whose cards this machine shows, without those whose cards the user has hidden."""
    if wants_cpu():
        return []
    return [
        maker
        for maker in MAKERS
        if not any(os.environ.get(name) in ("", "-1") for name in maker.hidden_by)
        and any(next(root.glob(pattern), None) is not None for pattern in maker.files)
    ]


def likely_kind(root: Path = Path("/")) -> str:
    """The device type on which models will compute, told without importing torch; `cpu` for none."""
    makers = shown(root)
    return makers[0].kind if makers else "cpu"
