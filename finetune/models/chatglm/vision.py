"""GLM-4V's vision encoder: pixels to rows that take the place of an image's span in the text.

EVA2-CLIP-E with its norms on the sub-layers' outputs, a convolution that makes one row of four
patches, and a gated adapter; names, shapes and order of operations as published.

Legend: N images, P patches per image as the text sees them (1600), S patches of the tower with its
class token (6401), W width of the tower, D hidden size of the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

if TYPE_CHECKING:
    from finetune.models.chatglm.configuration import ChatGLMConfig, ChatGLMVisionConfig


class PatchEmbedding(nn.Module):
    """Pixels to patches, with a class token in front and learned positions."""

    def __init__(self, vision: ChatGLMVisionConfig) -> None:
        super().__init__()
        width, patch = vision.hidden_size, vision.patch_size
        self.proj = nn.Conv2d(vision.in_channels, width, kernel_size=patch, stride=patch)
        self.cls_embedding = nn.Parameter(torch.zeros(1, width))
        self.position_embedding = nn.Embedding(vision.num_positions, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return [N, S, W] for pixels [N, 3, H, W]."""
        patches = self.proj(pixel_values).flatten(2).transpose(1, 2)
        first = self.cls_embedding.expand(patches.shape[0], -1, -1)
        patches = torch.cat((first, patches), dim=1)
        places = torch.arange(patches.shape[1], device=patches.device)
        return patches + self.position_embedding(places)  # type: ignore[no-any-return]


class VisionAttention(nn.Module):
    """Every patch sees every patch; one projection whose rows are [3, heads, channels]."""

    def __init__(self, vision: ChatGLMVisionConfig) -> None:
        super().__init__()
        width = vision.hidden_size
        self.num_heads = vision.num_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)
        self.dropout = vision.dropout_prob

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [N, S, W]."""
        count, length, _ = hidden.shape
        parts = self.query_key_value(hidden).reshape(count, length, 3, self.num_heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        # Whatever the text uses: the weights of 6401 x 6401 patches would not fit into memory.
        context = F.scaled_dot_product_attention(query, key, value)
        output = self.dense(context.transpose(1, 2).flatten(2))
        return F.dropout(output, self.dropout, self.training and torch.is_grad_enabled())


class VisionMLP(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, vision: ChatGLMVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision.hidden_size, vision.intermediate_size)
        self.fc2 = nn.Linear(vision.intermediate_size, vision.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [N, S, W]."""
        return self.fc2(F.gelu(self.fc1(hidden)))  # type: ignore[no-any-return]


class VisionBlock(GradientCheckpointingLayer):
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(self, vision: ChatGLMVisionConfig) -> None:
        super().__init__()
        width, eps = vision.hidden_size, vision.layer_norm_eps
        self.input_layernorm = nn.LayerNorm(width, eps=eps)
        self.attention = VisionAttention(vision)
        self.mlp = VisionMLP(vision)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [N, S, W]."""
        hidden = hidden + self.input_layernorm(self.attention(hidden))
        return hidden + self.post_attention_layernorm(self.mlp(hidden))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """The blocks, under their published name."""

    def __init__(self, vision: ChatGLMVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionBlock(vision) for _ in range(vision.num_hidden_layers))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [N, S, W]."""
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class ImageAdapter(nn.Module):
    """From what the tower saw to what the text understands: a projection and a gated MLP."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        self.linear_proj = nn.Linear(hidden, hidden, bias=False)
        self.norm1 = nn.LayerNorm(hidden)
        self.dense_h_to_4h = nn.Linear(hidden, ffn, bias=False)
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.dense_4h_to_h = nn.Linear(ffn, hidden, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Return [N, P, D]."""
        patches = F.gelu(self.norm1(self.linear_proj(patches)))
        gated = F.silu(self.gate_proj(patches)) * self.dense_h_to_4h(patches)
        return self.dense_4h_to_h(gated)  # type: ignore[no-any-return]


class VisionModel(nn.Module):
    """Pixels to an image's rows: boi, the patches, eoi."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        vision: ChatGLMVisionConfig = config.vision_config  # type: ignore[assignment]
        self.patch_embedding = PatchEmbedding(vision)
        self.transformer = VisionTransformer(vision)
        self.conv = nn.Conv2d(vision.hidden_size, config.hidden_size, kernel_size=2, stride=2)
        self.linear_proj = ImageAdapter(config)
        self.boi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.scaling_factor = vision.scaling_factor
        self.smallest = 2 * vision.patch_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return [N, P + 2, D] for pixels [N, 3, H, W]."""
        patches = self.transformer(self.patch_embedding(pixel_values))[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        grid = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        rows = self.linear_proj(self.conv(grid).flatten(2).transpose(1, 2))
        count = rows.shape[0]
        rows = torch.cat(
            (self.boi.expand(count, -1, -1), rows, self.eoi.expand(count, -1, -1)), dim=1
        )
        return rows / self.scaling_factor

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return what `forward` does; without a graph when nothing here is trained."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trained):
            return self(pixel_values.to(next(self.parameters()).dtype))  # type: ignore[no-any-return]

    def nothing(self) -> Tensor:
        """Return a zero whose gradient reaches every weight of the encoder.

        A batch without images takes it into its graph where other processes have images: they all
        gather the same weights and reduce the same gradients. Four patches are the least that the
        convolution takes.
        """
        # Not `self.conv.weight`: naming a sharded weight outside its own forward gathers it.
        side, weight = self.smallest, next(self.parameters())
        blank = torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device)
        return self.features(blank).sum() * 0.0

    @property
    def is_trained(self) -> bool:
        """Whether any weight of the tower or the adapter is."""
        return any(weight.requires_grad for weight in self.parameters())

    @property
    def is_shared_out(self) -> bool:
        """Whether each process holds but a part of the weights (ZeRO-3)."""
        return any(hasattr(weight, "ds_id") for weight in self.parameters())
