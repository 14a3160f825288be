"""Kernels that do in one pass over memory what torch does in several, where they have been shown right.

Nothing runs that has not been compared on this machine: when a model is loaded on a GPU, every kernel
computes a small case forward and backward in the run's number format beside its torch form; one that
does not compile or differs stays out, and is named once. `model.kernels: torch` leaves all out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from finetune.models.kernels import torch_forms
from finetune.models.kernels.products import ReplyingLinear as ReplyingLinear
from finetune.models.kernels.products import linear as linear

NAMES = ("rms_norm", "swiglu", "rotate", "cross_entropy", "varlen_attention")

_running: dict[str, str] = {}
"""Names of kernels that run, and on what type of device."""


def runs(name: str, tensor: Tensor) -> bool:
    """Whether the kernel of this name is used for this tensor."""
    return _running.get(name) == tensor.device.type


def run(names: dict[str, str]) -> None:
    """Use these kernels from now on, each on its type of device, and no others."""
    _running.clear()
    _running.update(names)


@contextmanager
def running(names: tuple[str, ...], device: str) -> Iterator[None]:
    """Use these kernels inside, without a check: for counting and for tests."""
    before = dict(_running)
    run(dict.fromkeys(names, device))
    try:
        yield
    finally:
        run(before)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, *, rounds_first: bool = False) -> Tensor:
    """See `torch_forms.rms_norm`; a float32 row and a float16 weight make a float16 row."""
    if weight.dtype is torch.float16 and hidden.dtype is torch.float32:
        return torch_forms.rms_norm(hidden, weight, eps, rounds_first).half()
    if not runs("rms_norm", hidden):
        return torch_forms.rms_norm(hidden, weight, eps, rounds_first)
    from finetune.models.kernels.operations import RmsNorm

    out: Tensor = RmsNorm.apply(hidden, weight, eps, rounds_first)  # type: ignore[no-untyped-call]
    return out


def swiglu(both: Tensor) -> Tensor:
    """See `torch_forms.swiglu`."""
    if not runs("swiglu", both):
        return torch_forms.swiglu(both)
    from finetune.models.kernels.operations import Swiglu

    out: Tensor = Swiglu.apply(both)  # type: ignore[no-untyped-call]
    return out


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `torch_forms.rotate`."""
    if not runs("rotate", states):
        return torch_forms.rotate(states, cos, sin)
    from finetune.models.kernels.operations import Rotate

    out: Tensor = Rotate.apply(states, cos, sin)  # type: ignore[no-untyped-call]
    return out


def cross_entropy_(logits: Tensor, target: Tensor) -> Tensor:
    """Return the loss of each row [N]; the logits [N, V] become softmax - one-hot, their gradient."""
    loss: Tensor = torch.ops.glm4_finetune.cross_entropy_(logits, target)
    return loss
