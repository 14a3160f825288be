"""What every kernel computes, in plain torch: the reference, and what runs where no kernel does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, rounds_first: bool) -> Tensor:
    """Return weight x hidden / rms over the last dimension, [..., D], computed in float32.

    GLM-4 multiplies by the weight in float32; transformers' GLM rounds the quotient before.
    """
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(hidden.dtype) if rounds_first else (weight * wide).to(hidden.dtype)


def swiglu(both: Tensor) -> Tensor:
    """Return silu(gate) x up, [..., F], of [..., gate | up]."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return [B, H, T, C] with neighbouring pairs of the first channels turned, the rest untouched.

    `cos` and `sin` are [B or 1, 1, T, pairs].
    """
    channels = 2 * cos.shape[-1]
    if (
        states.dtype is torch.float32
        and states.device.type == "cpu"
        and not torch.is_grad_enabled()
    ):
        return _rotate_at_once(states, channels, torch.complex(cos, sin))
    turned, rest = states[..., :channels], states[..., channels:]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((pairs.flatten(-2), rest), dim=-1)


def _rotate_at_once(states: Tensor, channels: int, angles: Tensor) -> Tensor:
    """The same, a pair being a complex number: one product instead of nine steps."""
    pairs = torch.view_as_complex(torch.unflatten(states[..., :channels], -1, (-1, 2)))
    turned = torch.view_as_real(pairs * angles).flatten(-2)
    if channels == states.shape[-1]:
        return turned
    return torch.cat((turned, states[..., channels:]), dim=-1)
