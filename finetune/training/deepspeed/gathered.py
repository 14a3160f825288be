"""The weights of a ZeRO-3 model whole in every process, gathered once for a whole evaluation.

By itself DeepSpeed gathers each layer in every forward pass: for every token of a reply all weights go
over the network again. Here they are gathered once and its hooks stay out meanwhile, so that processes
need not even run in step. Afterwards each holds its part again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed

from finetune import console
from finetune.distributed import device
from finetune.distributed.processes import any_rank

RESERVE = 5 << 30
"""Bytes that replies take beside the weights: keys and values of a batch, and what a pass holds."""


@contextmanager
def whole_weights(engine: Any) -> Iterator[None]:
    """In here every process holds the whole model, if that fits into its memory beside the rest.

    Every process takes part. Weights must not be changed inside.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:  # a stage below 3
        yield
        return
    weights = [weight for weight in engine.module.parameters() if hasattr(weight, "ds_id")]
    needed = sum(weight.ds_numel * weight.element_size() for weight in weights)
    free = device.free_bytes()
    if any_rank(needed + RESERVE > free):
        console.warn_once(
            f"the whole model ({needed / 1e9:.1f} GB) does not fit beside the rest of this run "
            f"({free / 1e9:.1f} GB are free): every forward pass of an evaluation gathers its weights "
            "layer by layer, which is slow. Evaluate a saved checkpoint with finetune evaluate instead "
            "and set evaluation.generate: false"
        )
        yield
        return
    with deepspeed.zero.GatheredParameters(weights), _without_hooks(offload):
        yield


@contextmanager
def _without_hooks(offload: Any) -> Iterator[None]:
    """DeepSpeed's hooks neither gather nor release weights inside."""
    taken = []
    for handle in [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]:
        hooks = handle.hooks_dict_ref()
        if hooks is not None and handle.id in hooks:
            taken.append((hooks, handle.id, hooks.pop(handle.id)))
    try:
        yield
    finally:
        for hooks, number, hook in taken:
            hooks[number] = hook
