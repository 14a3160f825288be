"""Routed experts: tensors of their own in a published checkpoint, one tensor for all in memory and in adapters.

    on disk   X.mlp.experts.E.gate_proj.weight [I, D], X.mlp.experts.E.up_proj.weight [I, D]
    fused     X.mlp.experts.gate_up_proj [experts, 2 I, D]: rows of the gate, then rows of up
    on disk   X.mlp.experts.E.down_proj.weight [D, I]
    fused     X.mlp.experts.down_proj [experts, D, I]

The layers that predict tokens further ahead (MTP) lie behind the last layer and are read by nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

PARTS: dict[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
"""What is one in memory, in the order in which it holds them, and in which PEFT adapts them."""

_FUSED = re.compile(rf"(?P<experts>.+\.experts)\.(?P<part>{'|'.join(PARTS)})")
_SEPARATE = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj)\.weight"
)
_LAYER = re.compile(r"(?:.+\.)?layers\.(\d+)\.")


def fused_part(name: str) -> tuple[str, str] | None:
    """The module and the part of it that a fused tensor's name says; None of any other."""
    match = _FUSED.fullmatch(name)
    return (match["experts"], match["part"]) if match else None


def separate_names(name: str, experts: int) -> list[str]:
    """What a tensor is called on disk: itself, or each expert's, those of a fused one part by part."""
    found = fused_part(name)
    if found is None:
        return [name]
    module, part = found
    return [f"{module}.{e}.{leaf}.weight" for e in range(experts) for leaf in PARTS[part]]


def separate_name(name: str) -> tuple[str, int, str] | None:
    """Module, number and layer of one expert's tensor on disk; None of any other."""
    match = _SEPARATE.fullmatch(name)
    return (match["experts"], int(match["number"]), match["leaf"]) if match else None


def fused_names(names: Iterable[str]) -> list[str]:
    """What the experts among a checkpoint's tensors are together in memory."""
    found = {match["experts"] for name in names if (match := _SEPARATE.fullmatch(name))}
    return [f"{module}.{part}" for module in sorted(found) for part in PARTS]


def num_experts(config: Mapping[str, Any]) -> int:
    """Routed experts of a layer that a config.json names; 0 where there are none."""
    text = config.get("text_config") or config
    return int(text.get("n_routed_experts") or 0)


def of_prediction(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Those of a checkpoint's tensors that belong to layers behind the last one."""
    text = config.get("text_config") or config
    layers = int(text.get("num_hidden_layers") or 0)
    found = []
    for name in names:
        match = _LAYER.match(name)
        if match and 0 < layers <= int(match[1]) and ".visual." not in name:
            found.append(name)
    return found
