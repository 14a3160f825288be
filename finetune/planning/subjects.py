"""The product's own ways to train, for counting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from finetune import methods
from finetune.config.schema import Method
from finetune.models.kernels import NAMES
from finetune.models.load import shape_of, text_config
from finetune.models.moe.modeling import first_dense
from finetune.models.packed_attention import whole_rows
from finetune.models.quantization import FourBits, know_checkpoints
from finetune.models.sequence_parallel import Split
from finetune.planning.step import Subject


def own(
    folder: Path,
    method: Method,
    *,
    checkpointing: bool,
    dtype: torch.dtype = torch.bfloat16,
    sharded: bool = False,
    kernels: tuple[str, ...] = NAMES,
    four_bits: bool = False,
) -> Subject:
    """What this project does with the model of `folder`.

    Args:
        folder: Needs no more than a config.json.
        method: What is trained.
        checkpointing: Whether activations are recomputed.
        dtype: In what it computes.
        sharded: Whether DeepSpeed keeps the float32 originals of a model that is trained whole.
        kernels: The fused ones that run; () for `model.kernels: torch`.
        four_bits: Whether the text's frozen layers are held so.
    """
    is_wide = methods.METHODS[method.kind].trains_the_model and not sharded
    weights = torch.float32 if is_wide else dtype
    autocast = dtype if dtype != weights else None

    def build(layers: int) -> nn.Module:
        with made_in(weights):
            model = shape_of(folder, layers)
        with nothing_moves():
            model = methods.attach(model, method)
        if four_bits:
            narrow(model)
            know_checkpoints(model)
        return ready(model, checkpointing=checkpointing)

    text = text_config(folder)
    dense = first_dense(text)
    return Subject(build, own_loss, text.num_hidden_layers, dense, autocast, kernels)


class PackedLayer(FourBits):
    """The shapes of a layer in 4 bits with double quantisation, as bitsandbytes holds it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.shape, self.dtype = layer.weight.shape, layer.weight.dtype
        number = layer.weight.numel()
        sizes = {"weight": (number // 2, torch.uint8), "scales": (number // 64, torch.uint8), "scales_of_scales": (number // (64 * 256), torch.float32)}  # fmt: skip
        for name, (size, dtype) in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=dtype))
        self.bias = layer.bias

    @property
    def wide_dtype(self) -> torch.dtype:
        """See `FourBits`."""
        return self.dtype

    def wide(self) -> Tensor:
        """See `FourBits`; three kernels: scales made wide, moved, and the weight with them."""
        scales: Any = self.scales
        found: Tensor = _made_wide(self.weight, scales.float().add_(1.0), list(self.shape), self.dtype)  # fmt: skip
        return found


@torch.library.custom_op("finetune_planning::made_wide", mutates_args=())
def _made_wide(packed: Tensor, scales: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    raise RuntimeError("it only has shapes")


@_made_wide.register_fake
def _(packed: Tensor, scales: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def narrow(model: nn.Module, kind: Callable[[nn.Linear], nn.Module] = PackedLayer) -> None:
    """Put layers in 4 bits, or their shapes, in the place of the text's frozen linear layers."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and ".layers." in name and ".lora_" not in name:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, kind(module))


def own_loss(
    model: nn.Module, ids: Tensor, labels: Tensor, supervised: Tensor, **more: Any
) -> Tensor:
    """Without padding, or packed: no mask, and the places of the loss come with the batch."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    given = {"input_ids": ids}
    if (
        getattr(inner.config, "vision_config", None) is not None
    ):  # it would look for images in the ids
        given = {"inputs_embeds": inner.get_input_embeddings()(ids)}
    loss: Tensor = model(
        **given,
        labels=labels,
        supervised=supervised,
        num_items_in_batch=1.0,
        use_cache=False,
        **more,
    ).loss
    return loss


def shared_out(subject: Subject, parts: int) -> Subject:
    """The subject in one of so many processes that share rows, given its part of them."""
    split = Split(parts, 0, torch.empty_like)  # what comes has the shape of what goes

    def loss(model: nn.Module, ids: Tensor, labels: Tensor, supervised: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])[None]
        shared = {"position_ids": places, "documents": whole_rows(ids.device, split)}
        return own_loss(model, ids, labels, supervised, **shared)

    return replace(subject, loss=loss)


def states_per_token(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of what all layers are recomputed from; float16 adds up its layers in float32."""
    text = text_config(folder)
    size = 4 if dtype is torch.float16 else dtype.itemsize
    return int(text.num_hidden_layers * text.hidden_size * size)


def on_the_host(subject: Subject) -> Subject:
    """The subject with what its layers are recomputed from on the host, which is not counted."""

    def pack(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.shape, tensor.dtype, tensor.requires_grad

    def unpack(kept: tuple[Any, ...]) -> Tensor:
        return torch.empty(kept[0], dtype=kept[1], requires_grad=kept[2])

    def away(checkpoint: Any, *given: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return checkpoint(*given)

    def build(layers: int) -> nn.Module:
        model = subject.build(layers)
        module: Any
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = partial(away, module._gradient_checkpointing_func)  # fmt: skip
        return model

    return replace(subject, build=build)


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
