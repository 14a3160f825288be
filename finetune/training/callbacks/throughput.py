"""How much of a GPU a run uses: FLOPs of a token, what the card can do at most, memory as it sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from finetune.artifacts.experts import PARTS
from finetune.distributed import device

# Dense bf16 TFLOP/s that the makers state, by a part of the device's name; the first that is found.
PEAKS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L20": 119.5, "A6000": 155, "A40": 150,
    "RTX 6000 Ada": 364, "5090": 209, "4090": 165, "3090": 71, "A10": 125,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs that a run's tokens take, without what is recomputed."""

    per_token: float
    peak: float | None
    """FLOP/s of one device; None where it is not known."""
    devices: int

    def speed(self, tokens_per_second: float) -> dict[str, float]:
        """TFLOP/s of one device, and its share of what the device can do at most."""
        reached = tokens_per_second * self.per_token / self.devices
        found = {"tflops_per_second": reached / 1e12}
        return found if self.peak is None else found | {"mfu": reached / self.peak}


def work_of(model: nn.Module, mean_length: float, devices: int) -> Work:
    """What a token takes: 2 FLOPs a weight forward, 2 for the gradients on their way, 2 where it is trained.

    Attention to `mean_length` / 2 tokens on average comes on top, forward and twice backward. Tables are
    looked up and do not count; the output layer does.
    """
    matrices = trained = 0
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for module in model.modules():
        for fused in _of_experts(module):
            size = int(getattr(fused, "ds_numel", fused.numel()))
            used = size * text.num_experts_per_tok // text.n_routed_experts
            matrices += used
            trained += used if fused.requires_grad else 0
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or isinstance(module, nn.Embedding):
            continue
        size = int(getattr(weight, "ds_numel", weight.numel()))
        if weight.dim() < 2 and not hasattr(weight, "ds_numel"):
            continue
        if hasattr(weight, "quant_state"):
            size *= 2  # two numbers in a byte
        matrices += size
        trained += size if weight.requires_grad else 0
    heads = text.num_hidden_layers * text.num_attention_heads
    channels = getattr(text, "qk_head_dim", None) or getattr(text, "head_dim", None)
    channels = channels or text.hidden_size // text.num_attention_heads
    attention = 3 * 4 * heads * channels * mean_length / 2
    return Work(4 * matrices + 2 * trained + attention, peak_flops(), devices)


def _of_experts(module: nn.Module) -> list[nn.Parameter]:
    """The fused weights of a layer's routed experts, of which a token takes some."""
    found = [getattr(module, part, None) for part in PARTS]
    return [weight for weight in found if isinstance(weight, nn.Parameter)]


def peak_flops() -> float | None:
    """bf16 FLOP/s of this process's GPU, if its name is known."""
    card = device.card()
    if card is None:
        return None
    return next((1e12 * peak for part, peak in PEAKS.items() if part in card.name), None)


def gpu_memory() -> dict[str, float]:
    """GB beyond what tensors took at most: what torch holds, and what is used of the whole device."""
    held = device.memory()
    if held is None:
        return {}
    return {
        "memory_reserved_gb": held.most_reserved / 1e9,
        "memory_device_gb": (held.total - held.free) / 1e9,
    }
