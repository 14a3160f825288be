"""Weights -> groups of an optimizer; the rates that a schedule says; the guard before a step of DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from finetune.methods.optimizers import MUON, MuonWithAdamW, matrices
from finetune.training.arguments import Rates

__all__ = ["MUON", "groups_of", "guard_engine", "muon", "set_rates", "warm_up"]


def groups_of(
    model: Any, rates: Rates, weight_decay: float, decayed: Collection[str], *, for_muon: bool
) -> list[dict[str, Any]]:
    """The trained weights, those alike in learning rate, decay and, `for_muon`, its matrices together."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rates.check(trained)
    chosen = matrices(model) if for_muon else set()
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        key = rates.of(name), name in decayed, name in chosen
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rate,
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        | ({"muon": of_muon} if for_muon else {})
        for (rate, is_decayed, of_muon), parameters in groups.items()
    ]


def muon(groups: list[dict[str, Any]], options: Mapping[str, Any]) -> MuonWithAdamW:
    """Muon for its matrices, AdamW for the others."""
    return MuonWithAdamW(groups, betas=options["betas"], eps=options["eps"])


def guard_engine(accelerator: Any, guard: Callable[[Any], None]) -> None:
    """`guard` is called before every optimizer step of DeepSpeed's engine."""
    from finetune.training.deepspeed.sharded_engine import GuardedEngine

    engine = accelerator.deepspeed_engine_wrapped.engine
    accelerator.deepspeed_engine_wrapped = GuardedEngine(engine, guard)


def warm_up(scheduler: Any, steps: int) -> None:
    """The first `steps` steps rise to the peak as `warmed_up` says."""
    if steps and isinstance(scheduler, LambdaLR):
        plain = scheduler.lr_lambdas
        scheduler.lr_lambdas = [partial(warmed_up, share, steps) for share in plain]


def warmed_up(plain: Callable[[int], float], warmup: int, step: int) -> float:
    """The share of the peak rate at `step` (from 0): `plain`'s but for the warm-up.

    transformers' warm-up of 3 steps begins at 0, where a step learns nothing: 0, 1/3, 2/3, 1. Ours
    is 1/4, 2/4, 3/4, 1.
    """
    return (step + 1) / (warmup + 1) if step < warmup else plain(step)


def set_rates(scheduler: Any) -> None:
    """The optimizer's rates are what the schedule says of the step that it has come to."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    if not isinstance(scheduler, LambdaLR):
        return
    rates = [
        base * share(scheduler.last_epoch)
        for base, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):  # torchao's optimizers
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates
