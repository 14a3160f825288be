"""Lets vLLM number the tokens of an image as GLM-4V was trained: one position for all patches.

vLLM counts the patches on (its issue 14790): 1600 positions where training used one, so that the text
behind an image stands elsewhere. It computes positions of a model's own only for what it takes for
M-RoPE; the overrides say that this is such a model, and here are its positions and a forward that
takes one of the three equal rows. Nothing else of vLLM is touched, and nothing of finetune imported,
so that the file alone can be copied to a server:

    PYTHONPATH=scripts vllm serve FOLDER --worker-extension-cls vllm_glm4v.TrainedPositions \
        --hf-overrides '{"architectures": ["GLM4VForCausalLM"], "mrope_section": [1, 1, 1]}' ...
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.glm4v import GLM4VForCausalLM


class TrainedPositions:
    """What --worker-extension-cls names; importing it in the worker is all that it is for."""


def positions(num_tokens: int, images: list[tuple[int, int]]) -> torch.Tensor:
    """Positions [T] of a prompt with images at these (offset, number of tokens, both ends counted).

    boi = p, every patch = p + 1, eoi = p + 2, and on from there.
    """
    steps = torch.ones(num_tokens, dtype=torch.int64)
    for offset, length in images:
        steps[offset + 2 : offset + length - 1] = 0  # every patch but the first stands still
    return steps.cumsum(0) - 1


def get_mrope_input_positions(
    self: Any, input_tokens: list[int], mm_features: list[Any]
) -> tuple[torch.Tensor, int]:
    """The positions of a prompt, three times, and how far the next one lies from its number."""
    images = [(f.mm_position.offset, f.mm_position.length) for f in mm_features]
    row = positions(len(input_tokens), images)
    return row.expand(3, -1), int(row[-1]) + 1 - len(input_tokens)


def forward(
    self: Any,
    input_ids: torch.Tensor | None,
    positions: torch.Tensor,
    intermediate_tensors: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """As vLLM's own, with the positions [3, T] that it has for such a model, or [T]."""
    row = positions[0] if positions.ndim > 1 else positions
    return _forward(self, input_ids, row, intermediate_tensors, inputs_embeds, **kwargs)


_forward = GLM4VForCausalLM.forward
GLM4VForCausalLM.forward = forward  # type: ignore[method-assign]
GLM4VForCausalLM.get_mrope_input_positions = get_mrope_input_positions  # type: ignore[method-assign]
