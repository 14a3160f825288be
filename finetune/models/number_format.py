"""The number format that `model.dtype` means on this machine."""

from __future__ import annotations

import torch

from finetune.distributed import device
from finetune.errors import ModelError

KINDS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def number_format(asked: str, *, sees_images: bool = False) -> torch.dtype:
    """Return the format of `model.dtype`; what `auto` means is the device's affair.

    bfloat16 on a device that multiplies it in hardware. On one that does not (V100, T4) float16 with
    sums in float32 (`wide_residual`), or float32 for a model that sees images: its tower is not known
    to stay in float16's range. float32 on a CPU.

    Raises:
        ModelError: There is no such format.
    """
    if asked != "auto":
        if asked not in KINDS:
            raise ModelError(f"model.dtype is {asked!r}; choose auto, {', '.join(KINDS)}")
        return KINDS[asked]
    if not device.has_accelerator():
        return torch.float32
    return automatic(native_bf16=device.has_native_bf16(), sees_images=sees_images)


def automatic(*, native_bf16: bool, sees_images: bool) -> torch.dtype:
    """Return what `auto` is on an accelerator."""
    if native_bf16:
        return torch.bfloat16
    return torch.float32 if sees_images else torch.float16
