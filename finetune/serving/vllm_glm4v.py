"""GLM-4V in vLLM with the positions and the pixels that it was trained with.

vLLM's own class counts the patches of an image on (its issue 14790): 1600 positions where training
used one, so that the text behind the image stands elsewhere. It asks a model for positions only if it
takes it for one of M-RoPE, which the overrides say; and it resizes with torchvision, which differs
from Pillow by up to 3 of 255. This class is vLLM's but for these two.

    vllm serve FOLDER \
        --hf-overrides '{"architectures": ["GLM4VAsTrained"], "mrope_section": [1, 1, 1]}' ...

Imported by vLLM alone, see `vllm_plugin`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, fromarray
from transformers import BatchFeature
from vllm.model_executor.models.glm4v import (
    GLM4VDummyInputsBuilder,
    GLM4VForCausalLM,
    GLM4VMultiModalProcessor,
    GLM4VProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.processors.glm4v import GLM4VImageProcessorFast

from finetune.data.chat.image import pixels_of


def prompt_positions(num_tokens: int, images: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Positions [T] of a prompt with images at these (offset, number of tokens, both ends counted).

    boi = p, every patch = p + 1, eoi = p + 2, and on from there.
    """
    steps = torch.ones(num_tokens, dtype=torch.int64)
    for offset, length in images:
        steps[offset + 2 : offset + length - 1] = 0  # every patch but the first stands still
    return steps.cumsum(0) - 1


class ImageProcessor(GLM4VImageProcessorFast):
    """Images as in training, bit for bit."""

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """`pixel_values` [N, 3, size, size] of images as vLLM decoded them."""
        size = kwargs.get("size") or self.size
        rows = [
            pixels_of(image if isinstance(image, Image) else fromarray(image), int(size["width"]))
            for image in (images if isinstance(images, list | tuple) else [images])
        ]
        return BatchFeature({"pixel_values": torch.from_numpy(np.stack(rows))})


class ProcessingInfo(GLM4VProcessingInfo):
    """vLLM's, with our images."""

    def get_image_processor(self, **kwargs: Any) -> ImageProcessor:
        """For the size that the checkpoint takes."""
        side = self.get_hf_config().vision_config["image_size"]
        return ImageProcessor(size={"width": side, "height": side})


@MULTIMODAL_REGISTRY.register_processor(
    GLM4VMultiModalProcessor, info=ProcessingInfo, dummy_inputs=GLM4VDummyInputsBuilder
)
class GLM4VAsTrained(GLM4VForCausalLM):
    """vLLM's GLM-4V, whose patches share a position."""

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        """The positions [3, T] of a prompt, all rows equal, and how far the next is from its number."""
        images = [(f.mm_position.offset, f.mm_position.length) for f in mm_features]
        row = prompt_positions(len(input_tokens), images)
        return row.expand(3, -1), int(row[-1]) + 1 - len(input_tokens)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As vLLM's, of positions [3, T]."""
        return super().forward(input_ids, positions[0], *args, **kwargs)
