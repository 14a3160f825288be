"""What others do with the same model, for `count.py`: plain PEFT + Trainer, and the same with Liger.

peft_trainer  transformers' own GLM class of the same sizes, PEFT's LoRA on the same matrices with
              float32 adapters under `Trainer(bf16=True)`'s autocast, logits of every token, the loss
              in float32: what the model cards show. In 4 bits bitsandbytes' products, each of which makes
              its weight wide anew. For `full` the weights are float32 under autocast;
              for `ptuning_v2` it is PEFT's prefix tuning.
peft_liger    the same with what liger-kernel 0.8.5 patches into GLM-4 (`apply_liger_kernel_to_glm4`):
              RMSNorm, SwiGLU and the fused linear cross-entropy; it refuses to touch GLM's rotation.
              Each is a single operation here: it reads its inputs once and writes its outputs once,
              which is the best that the real kernel can do. The loss is Liger's algorithm: chunks of
              the tokens, each with logits, gradient of hidden states, none of the frozen head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config.schema import FullMethod, LoraMethod, Method, PTuningV2Method
from finetune.planning.step import Subject
from finetune.planning.subjects import PackedLayer, made_in, narrow, nothing_moves, ready

LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


def glm_config(folder: Path) -> Any:
    """Transformers' config of the model of `folder`; of the first publication the same sizes."""
    import transformers

    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if given["model_type"] != "chatglm":
        kinds = {"glm": transformers.GlmConfig, "glm4": transformers.Glm4Config}
        return kinds[given["model_type"]].from_pretrained(folder)
    return transformers.GlmConfig(
        vocab_size=given["padded_vocab_size"],
        hidden_size=given["hidden_size"],
        intermediate_size=given["ffn_hidden_size"],
        num_hidden_layers=given["num_layers"],
        num_attention_heads=given["num_attention_heads"],
        num_key_value_heads=given["multi_query_group_num"],
        head_dim=given["kv_channels"],
        attention_bias=given["add_qkv_bias"],
        rms_norm_eps=given["layernorm_epsilon"],
        max_position_embeddings=given["seq_length"],
        tie_word_embeddings=False,
        pad_token_id=given["pad_token_id"],
    )


def peer(
    folder: Path, method: Method, *, checkpointing: bool, liger: bool, four_bits: bool = False
) -> Subject:
    """A peer's way to train the model of `folder`."""
    import transformers
    from transformers import initialization

    whole = glm_config(folder)
    kind = {"glm": transformers.GlmForCausalLM, "glm4": transformers.Glm4ForCausalLM}
    is_full = isinstance(method, FullMethod)

    def build(layers: int) -> nn.Module:
        config = type(whole).from_dict(whole.to_dict() | {"num_hidden_layers": layers})
        config._attn_implementation = "sdpa"
        with (
            made_in(torch.float32 if is_full else torch.bfloat16),
            initialization.no_init_weights(),
        ):
            model = kind[config.model_type](config)
        if liger:
            for module in model.modules():
                _patch(module)
        model = _adapted(model, method)
        if four_bits:
            narrow(model, _WideEachTime)
        return ready(model, checkpointing=checkpointing)

    loss = _fused_loss if liger else _plain_loss
    return Subject(build, loss, whole.num_hidden_layers, autocast=torch.bfloat16)


def can(name: str, method: Method, *, checkpointing: bool) -> bool:
    """Whether a peer trains so: with checkpointing transformers drops PEFT's prefix without an error."""
    return not isinstance(method, PTuningV2Method) or (name == "peft_trainer" and not checkpointing)


def _adapted(model: Any, method: Method) -> Any:
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    if isinstance(method, FullMethod):
        return model
    if isinstance(method, LoraMethod):
        config: Any = LoraConfig(
            task_type="CAUSAL_LM", r=method.rank, lora_alpha=int(method.alpha),
            lora_dropout=method.dropout, target_modules=LORA_LAYERS,
        )  # fmt: skip
    else:
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=method.num_virtual_tokens
        )
    with nothing_moves():
        return get_peft_model(model, config)


class _WideEachTime(PackedLayer):
    """bitsandbytes' own layer: wide in every product, forward, recomputed and backward."""


@contextmanager
def _without_padding() -> Iterator[None]:
    """Transformers looks at a mask of ones, and at positions, to find that no mask is needed.

    It cannot where there are only shapes, so it is told.
    """
    from transformers import masking_utils

    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def _plain_loss(model: Any, ids: Tensor, labels: Tensor, places: Tensor) -> Any:
    with _without_padding():
        return model(input_ids=ids, labels=labels, use_cache=False).loss


# --- Liger's operations as single kernels ---------------------------------------------------------


class _Single(torch.autograd.Function):
    """One kernel forward and one backward; what it saves are its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, width: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.bench_peers.one(x, weight, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        return torch.ops.bench_peers.one_backward(grad, x, weight), None, None


@torch.library.custom_op("bench_peers::one", mutates_args=())
def _one(x: Tensor, weight: Tensor | None, width: int) -> Tensor:
    raise RuntimeError("it only has shapes")


@_one.register_fake
def _(x: Tensor, weight: Tensor | None, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


@torch.library.custom_op("bench_peers::one_backward", mutates_args=())
def _one_backward(grad: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    raise RuntimeError("it only has shapes")


@_one_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    return torch.empty_like(x)


def _patch(module: Any) -> None:
    name = type(module).__name__
    if name.endswith("RMSNorm"):
        module.forward = lambda x: _Single.apply(x, module.weight, x.shape[-1])
    elif name.endswith("MLP"):
        half = module.down_proj.in_features
        module.forward = lambda x: module.down_proj(
            _Single.apply(module.gate_up_proj(x), None, half)
        )


def _fused_loss(model: Any, ids: Tensor, labels: Tensor, places: Tensor) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with _without_padding():
        hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state
    return _LinearCrossEntropy.apply(hidden.flatten(0, 1), inner.lm_head.weight, labels.flatten())


class _LinearCrossEntropy(torch.autograd.Function):
    """Liger's: chunks as many as the vocabulary is wider than the hidden state; gradients at once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        tokens, width = hidden.shape
        matrix = weight.to(torch.bfloat16)  # under autocast
        size = max(1, -(-tokens // max(1, -(-weight.shape[0] // width))))
        size = 1 << (size - 1).bit_length()
        gradient = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, tokens, size):
            rows = hidden[start : start + size]
            logits = F.linear(rows, matrix)
            slope = torch.ops.bench_peers.one(logits, None, logits.shape[-1])  # in place there
            gradient[start : start + size] = slope @ matrix
            if of_weight is not None:
                of_weight += slope.T @ rows
        ctx.save_for_backward(gradient, of_weight)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        return hidden * 1.0, None if weight is None else weight * 1.0, None
