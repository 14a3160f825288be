"""One training step, counted: forward, backward, clipping and optimizer at the true size of a model.

All layers are alike, so everything counted is linear in their number: a step of 40 layers follows
from steps of two and three. In a mixture of experts the first ones are dense, and those that follow alike.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.methods.lora_forward import LowRank
from finetune.methods.optimizers import for_counting
from finetune.models.kernels import running
from finetune.planning.counting import KINDS, Counting, counting, shapes_only
from finetune.planning.roofline import Ceilings

FEW = 2
"""Layers of the shorter of the two counted steps; the other has one more."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What one forward pass is given."""

    batch: int
    length: int
    supervised: float = 1.0
    """Share of the tokens that is learnt."""

    @property
    def tokens(self) -> int:
        """In the batch."""
        return self.batch * self.length


@dataclass(frozen=True, slots=True)
class Subject:
    """A way to train: how its model is made, what its loss is, which steps it takes."""

    build: Callable[[int], nn.Module]
    """The model of so many layers, ready to train; called where tensors have shapes only."""
    loss: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    """Of a model, input_ids and labels [B, T], and the places whose next label is learnt."""
    layers: int
    """Of the whole model."""
    dense: int = 0
    """Of these, how many come first and are of another kind than all that follow."""
    autocast: torch.dtype | None = None
    """In what float32 weights compute."""
    kernels: tuple[str, ...] = ()
    """Fused kernels that run, see `models.kernels`."""
    optimizer: str = "adamw"
    """`training.optimizer`."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step comes to."""

    kernels: int
    bytes: int
    flops: dict[str, int]
    """By `bfloat16`, `float32` and `attention`."""
    peaks: dict[str, dict[str, int]]
    """Bytes by kind at the moment of each phase when most are held."""
    working: int
    """Bytes of activations and transients at their own peak, whatever else is held then."""
    mask_bytes: int
    milliseconds: float
    """By the roofline; without Python, waiting and communication."""

    @property
    def peak(self) -> dict[str, int]:
        """Bytes by kind at the moment when most are held."""
        return max(self.peaks.values(), key=lambda held: sum(held.values()))

    @property
    def peak_bytes(self) -> int:
        """Of all kinds."""
        return sum(self.peak.values())


def count_step(subject: Subject, shape: Shape, ceilings: Ceilings | None = None) -> Cost:
    """The cost of a step, from two short models."""
    ceilings = ceilings or Ceilings()
    fewest = max(FEW, subject.dense + 1)
    few, more = (count_layers(subject, shape, ceilings, n) for n in (fewest, fewest + 1))
    further = subject.layers - fewest

    def at_depth(less: float, larger: float) -> float:
        return less + (larger - less) * further

    return Cost(
        kernels=round(at_depth(few.kernels, more.kernels)),
        bytes=round(at_depth(few.bytes, more.bytes)),
        flops={kind: round(at_depth(few.flops[kind], more.flops[kind])) for kind in few.flops},
        # Phase by phase: what is the largest moment of a short model need not be that of a deep one.
        peaks={
            phase: {kind: round(at_depth(held[kind], more.peaks[phase][kind])) for kind in KINDS}
            for phase, held in few.peaks.items()
        },
        working=round(at_depth(few.working, more.working)),
        mask_bytes=few.mask_bytes,
        milliseconds=at_depth(few.milliseconds, more.milliseconds),
    )


def count_layers(subject: Subject, shape: Shape, ceilings: Ceilings, layers: int) -> Cost:
    """The cost of a step of a model of so many layers, run whole."""
    with counted(subject, shape, ceilings, layers) as counter:
        ledger = counter.ledger
    return Cost(
        kernels=int(ledger.total("number")),
        bytes=int(ledger.total("bytes")),
        flops={
            kind: int(ledger.total("flops", dtype=kind))
            for kind in ("bfloat16", "float32", "attention")
        },
        peaks=ledger.peaks(),
        working=sum(ledger.peak(("activations", "transients")).values()),
        mask_bytes=ledger.mask_bytes,
        milliseconds=1000 * ledger.total("seconds"),
    )


@contextmanager
def counted(subject: Subject, shape: Shape, ceilings: Ceilings, layers: int) -> Iterator[Counting]:
    """The counter after one step that was not the first: the optimizer's state is there."""
    with shapes_only(), running(subject.kernels, "cpu"):
        model = subject.build(layers)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = for_counting(model, subject.optimizer)
        for weight in trained:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
        optimizer.zero_grad()
        ids = torch.empty(shape.batch, shape.length, dtype=torch.long)
        places = torch.empty(int(shape.tokens * shape.supervised), dtype=torch.long)
        batch = ids, torch.empty_like(ids), places
        gc.collect()
        with counting(ceilings) as counter:
            name_what_stays(counter, model, optimizer)
            one_step(counter, subject, model, optimizer, batch)
            yield counter


def one_step(
    counter: Counting,
    subject: Subject,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Take a step of a subject; what it makes gets its kind."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda p: counter.note(p.grad, "gradients") if p.grad is not None else None
        )
    with torch.autocast("cpu", dtype=subject.autocast, enabled=subject.autocast is not None):
        loss = subject.loss(model, *batch)
    for module in model.modules():
        if isinstance(module, LowRank) and module.kept is not None:
            counter.note(module.kept, "adapters")
    counter.name_living("activations")
    counter.phase = "backward"
    loss.backward()  # type: ignore[no-untyped-call]
    del loss
    counter.phase = "optimizer"
    torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad()


def name_what_stays(counter: Counting, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take what was there before the step into the ledger."""
    parameters = list(model.parameters())
    all_trained = all(weight.requires_grad for weight in parameters)
    for weight in parameters:
        is_adapter = weight.requires_grad and not all_trained
        counter.note(weight, "adapters" if is_adapter else "weights")
    for buffer in model.buffers():
        counter.note(buffer, "weights")
    for state in optimizer.state.values():
        for tensor in state.values():
            counter.note(tensor, "optimizer")
