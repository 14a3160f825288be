"""The product's own ways to train, for counting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from finetune import methods
from finetune.config.schema import Method
from finetune.models.kernels import NAMES
from finetune.models.load import num_layers, shape_of
from finetune.planning.step import Subject


def own(
    folder: Path,
    method: Method,
    *,
    checkpointing: bool,
    dtype: torch.dtype = torch.bfloat16,
    sharded: bool = False,
    kernels: tuple[str, ...] = NAMES,
) -> Subject:
    """What this project does with the model of `folder`.

    Args:
        folder: Needs no more than a config.json.
        method: What is trained.
        checkpointing: Whether activations are recomputed.
        dtype: In what it computes.
        sharded: Whether DeepSpeed keeps the float32 originals of a model that is trained whole.
        kernels: The fused ones that run; () for `model.kernels: torch`.
    """
    is_wide = methods.METHODS[method.kind].trains_the_model and not sharded
    weights = torch.float32 if is_wide else dtype
    autocast = dtype if dtype != weights else None

    def build(layers: int) -> nn.Module:
        with made_in(weights):
            model = shape_of(folder, layers)
        with nothing_moves():
            model = methods.attach(model, method)
        return ready(model, checkpointing=checkpointing)

    return Subject(build, own_loss, num_layers(folder), autocast, kernels)


def own_loss(model: nn.Module, ids: Tensor, labels: Tensor, supervised: Tensor) -> Tensor:
    """Without padding, or packed: no mask, and the places of the loss come with the batch."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    given = {"input_ids": ids}
    if (
        getattr(inner.config, "vision_config", None) is not None
    ):  # it would look for images in the ids
        given = {"inputs_embeds": inner.get_input_embeddings()(ids)}
    loss: Tensor = model(
        **given, labels=labels, supervised=supervised, num_items_in_batch=1.0, use_cache=False
    ).loss
    return loss


def ready(model: nn.Module, *, checkpointing: bool) -> nn.Module:
    """The model in training mode, its layers recomputed where that is asked for."""
    model.train()
    if checkpointing:
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        inner.activation_checkpointing_enable({"use_reentrant": False})
    return model


@contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """Weights that are made inside have this number format."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def nothing_moves() -> Iterator[None]:
    """Modules stay where they were made and as they are: shapes cannot be moved, and need not be."""
    before = nn.Module.to
    nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = before  # type: ignore[method-assign]
