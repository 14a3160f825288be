"""Weights of a mixture of experts between memory, where experts are one tensor, and disk, where each has its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.artifacts.base_record import BaseRecord
from finetune.artifacts.experts import PARTS, fused_part, of_prediction, separate_name
from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.plain_files import read_json
from finetune.artifacts.resolve import local_folder
from finetune.artifacts.weights import tensors as tensors_of


def separated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of a published checkpoint; views, nothing is copied."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part = fused_part(name)
        if part is None:
            found[name] = tensor
            continue
        leaves = PARTS[part[1]]
        for number, expert in enumerate(tensor):
            for leaf, matrix in zip(leaves, expert.chunk(len(leaves)), strict=True):
                found[f"{part[0]}.{number}.{leaf}.weight"] = matrix
    return found


def together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back, of what `separated` made of whole tensors."""
    found: dict[str, Tensor] = {}
    experts: defaultdict[str, dict[int, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        if (parts := separate_name(name)) is None:
            found[name] = tensor
        else:
            module, number, leaf = parts
            experts[module][number][leaf] = tensor
    for module, numbers in experts.items():
        for part, leaves in PARTS.items():
            if leaves[0] in numbers[0]:
                rows = [torch.cat([numbers[n][leaf] for leaf in leaves]) for n in sorted(numbers)]
                found[f"{module}.{part}"] = torch.stack(rows)
    return found


def ahead_of(base: BaseRecord) -> dict[str, Tensor]:
    """The base's layers that predict tokens further ahead, which nothing here trains; in its mapped files."""
    folder = local_folder(base.path, base.revision)
    held = tensors_of(folder)
    found = {}
    for name in of_prediction(held, read_json(folder / MODEL_CONFIG)):
        with safe_open(held[name].file, "pt") as file:
            found[name] = file.get_tensor(name)
    return found
