"""The layers of GLM-4 in the published layout: parameter names, arithmetic and order of operations.

Legend: B rows, T tokens, D hidden size, H heads, G key/value groups, C channels per head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune.models import kernels
from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.tiled_mlp import swiglu_mlp


class RMSNorm(nn.Module):
    """Root-mean-square norm; weight multiplied in fp32, then the cast, as published."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalised [..., D] in the input's dtype."""
        return kernels.rms_norm(hidden, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """Rotation angles of the first half of each head's channels."""

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.kv_channels // 2
        self.base = 10000.0 * config.rope_ratio
        # What transformers' scaling of long contexts reads and writes.
        self.rope_type = (
            config.rope_parameters["rope_type"] if config.rope_parameters else "default"
        )
        self.original_max_seq_len = self.max_seq_len_cached = config.seq_length
        frequencies, self.attention_scaling = self.frequencies()
        # Checkpoints hold this buffer (in bf16, without rope_ratio) and nothing reads it, unless
        # positions are scaled: then it is made anew.
        self.register_buffer("inv_freq", frequencies, persistent=not config.scales_positions)
        if config.scales_positions:
            self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    def frequencies(self) -> tuple[Tensor, float]:
        """Return what a checkpoint holds as `inv_freq` [C / 4] or its scaled form, and a factor."""
        if self.config.scales_positions:
            scaled: tuple[Tensor, float] = ROPE_INIT_FUNCTIONS[self.rope_type](self.config)
            return scaled
        return 1.0 / 10000.0 ** (torch.arange(0, self.channels, 2).float() / self.channels), 1.0

    @dynamic_rope_update  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [B, T, C / 4] of positions [B, T], of the kind of `x`."""
        if self.config.scales_positions:
            frequencies = self.inv_freq.to(position_ids.device, torch.float32)
        else:
            steps = torch.arange(0, self.channels, 2, device=position_ids.device).float()
            frequencies = 1.0 / self.base ** (steps / self.channels)
        angles = position_ids[..., None].float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.attention_scaling != 1.0:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def eager_attention(
    module: SelfAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return [B, T, H, C] and the attention weights; softmax in fp32."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SelfAttention(nn.Module):
    """Grouped-query attention with one projection whose rows are [q | k | v]."""

    is_causal = True

    def __init__(self, config: ChatGLMConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer
        self.head_dim = config.kv_channels
        self.num_key_value_groups = config.num_attention_heads // config.multi_query_group_num
        self.scaling = self.head_dim**-0.5
        width = config.num_attention_heads * self.head_dim
        group = config.multi_query_group_num * self.head_dim
        self.widths = (width, group, group)
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.widths), config.add_qkv_bias)
        self.dense = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended [B, T, D] and, from eager attention, its weights."""
        shape = (*hidden.shape[:2], -1, self.head_dim)
        query, key, value = (
            part.reshape(shape).transpose(1, 2)
            for part in self.query_key_value(hidden).split(self.widths, dim=-1)
        )
        query, key = (kernels.rotate(states, *rotation) for states in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        context, weights = attend(
            self, query, key, value, attention_mask,
            scaling=self.scaling, dropout=dropout, **kwargs,
        )  # fmt: skip
        return self.dense(context.flatten(2)), weights


class MLP(nn.Module):
    """SwiGLU with one projection whose rows are [gate | up]."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [B, T, D]."""
        return swiglu_mlp(hidden, self.dense_h_to_4h, self.dense_4h_to_h)


class Block(GradientCheckpointingLayer):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ChatGLMConfig, layer: int) -> None:
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Return [B, T, D]."""
        attended, _ = self.self_attention(self.input_layernorm(hidden), **kwargs)
        hidden = hidden + F.dropout(attended, self.hidden_dropout, self.training)
        transformed = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + F.dropout(transformed, self.hidden_dropout, self.training)


class Embedding(nn.Module):
    """Holds the table under its published name."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Encoder(nn.Module):
    """The layers and the final norm, under their published names."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
