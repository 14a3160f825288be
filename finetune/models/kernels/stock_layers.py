"""transformers' GLM layers that ask for kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.glm import modeling_glm
from transformers.models.glm.modeling_glm import GlmMLP, GlmRMSNorm
from transformers.models.glm4 import modeling_glm4
from transformers.models.glm4.modeling_glm4 import Glm4MLP, Glm4RMSNorm
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import Glm4MoeLiteRMSNorm

from finetune.models import kernels
from finetune.models.kernels import products
from finetune.models.tiled_mlp import swiglu_mlp


class _RoundingNorm(nn.Module):
    """transformers' norm of GLM."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [..., D]."""
        return kernels.rms_norm(
            hidden_states, self.weight, self.variance_epsilon, rounds_first=True
        )


class _Norm(_RoundingNorm, GlmRMSNorm):
    pass


class _Norm4(_RoundingNorm, Glm4RMSNorm):
    pass


class _MoeNorm(_RoundingNorm, Glm4MoeRMSNorm):
    pass


class _MoeLiteNorm(_RoundingNorm, Glm4MoeLiteRMSNorm):
    pass


class _JoinedMLP(nn.Module):
    """transformers' MLP of GLM."""

    gate_up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [..., D]."""
        return swiglu_mlp(hidden_states, self.gate_up_proj, self.down_proj)


class _MLP(_JoinedMLP, GlmMLP):
    pass


class _MLP4(_JoinedMLP, Glm4MLP):
    pass


use_products_in = products.use_in
_OURS: dict[type, type] = {
    GlmRMSNorm: _Norm, Glm4RMSNorm: _Norm4, Glm4MoeRMSNorm: _MoeNorm,
    Glm4MoeLiteRMSNorm: _MoeLiteNorm, GlmMLP: _MLP, Glm4MLP: _MLP4,
}  # fmt: skip


def use_in(model: nn.Module) -> None:
    """Let transformers' GLM classes ask for kernels; GLM-4's own layers do anyway."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "hidden_act", "silu") != "silu":
            continue
        if (ours := _OURS.get(type(module))) is not None:
            module.__class__ = ours


def _rotating(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Transformers' rotation of queries and keys, or the kernel where it runs."""

    @wraps(theirs)
    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        replies = (
            q.dtype is torch.float32 and q.device.type == "cpu" and not torch.is_grad_enabled()
        )
        if not (kernels.runs("rotate", q) or replies) or unsqueeze_dim != 1:
            turned: tuple[Tensor, Tensor] = theirs(q, k, cos, sin, unsqueeze_dim)
            return turned
        pairs = cos.shape[-1] // 2  # each angle stands there twice
        angles = cos[:, None, :, :pairs], sin[:, None, :, :pairs]
        return kernels.rotate(q, *angles), kernels.rotate(k, *angles)

    return rotate


for _module in (modeling_glm, modeling_glm4):
    _module.apply_rotary_pos_emb = _rotating(_module.apply_rotary_pos_emb)
