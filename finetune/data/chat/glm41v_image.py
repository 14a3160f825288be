"""Images as GLM-4.1V and what came after it take them: any number, of any shape, in a grid of patches.

The work is done by transformers' own image processor, the one that needs Pillow and no torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from finetune.data.chat.image import ImageError, between, image_size, turned_image
from finetune.data.dialogue.conversation import Message
from finetune.data.dialogue.images import ImageRule
from finetune.errors import DataError, ModelError


@dataclass(frozen=True, slots=True)
class GridSpec:
    """How a checkpoint takes images that keep their shape."""

    folder: str
    """Where its preprocessor_config.json lies."""
    begin_id: int
    checkpoints: str = "GLM-4.1V"
    """Which ones it is about, in messages."""
    patch_token = "<|image|>"
    size: ClassVar[int] = 0

    @property
    def rule(self) -> ImageRule:
        """Any number, wherever the checkpoint's template has a place for them."""
        return ImageRule(self.checkpoints)

    def laid(self, message: Message, body: str) -> list[str]:
        """The text with the images where they stand in it."""
        return between(message, body)

    @property
    def rules(self) -> str:
        """Changes when the same image would take other tokens."""
        processor = _processor(self.folder)
        return f"placed grid {processor.patch_size} {processor.merge_size} {dict(processor.size)}"

    def patches_of(self, image: str) -> int:
        """Tokens between begin and end of an image; its header is read, not its pixels."""
        processor = _processor(self.folder)
        try:
            width, height = image_size(image)
            count = processor.get_number_of_image_patches(height, width)
        except ValueError as error:  # gone, or more than 200 times as long as wide
            raise DataError(f"image {image}: {error}") from error
        return int(count // processor.merge_size**2)

    def positions(
        self, ids: npt.NDArray[np.int32], grids: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.int64]:
        """Time, height and width [3, T]: of text all three count on, of an image they are its grid.

        An image of 2 x 3 tokens behind position 4: time 5 5 5 5 5 5, height 5 5 5 6 6 6, width 5 6 7 5 6 7;
        the text goes on at 8, behind the longer side. The numbers are those of the model's `get_rope_index`.
        """
        side, parts = _processor(self.folder).merge_size, []
        place = end = 0
        begins = np.flatnonzero(ids == self.begin_id) + 1
        for begin, (time, height, width) in zip(
            begins.tolist(), [] if grids is None else grids.tolist(), strict=True
        ):
            shape = (time, height // side, width // side)
            text = np.arange(place, place + begin - end)
            place += begin - end
            parts += [np.tile(text, (3, 1)), np.indices(shape).reshape(3, -1) + place]
            place, end = place + max(shape[1:]), begin + int(np.prod(shape))
        parts.append(np.tile(np.arange(place, place + len(ids) - end), (3, 1)))
        return np.concatenate(parts, axis=1)

    def arrays(self, images: Sequence[tuple[str, str]]) -> dict[str, npt.NDArray[Any]]:
        """`pixel_values` [patches of all, C] and `image_grid_thw` [N, 3] of (path, who shows it)."""
        made = [self._made(path, location) for path, location in images]  # one decoded at a time
        return {
            "pixel_values": np.concatenate([one["pixel_values"] for one in made]).astype(
                np.float32
            ),
            "image_grid_thw": np.concatenate([one["image_grid_thw"] for one in made]).astype(
                np.int64
            ),
        }

    def _made(self, path: str, location: str) -> Any:
        try:
            return _processor(self.folder)(images=[turned_image(path)], return_tensors="np")
        except ImageError as error:
            raise DataError(f"{location}: image {path}: {error}") from error


@lru_cache(maxsize=4)
def _processor(folder: str) -> Any:
    try:
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
    except ImportError as error:
        raise ModelError(
            f"{folder}: this version of transformers cannot prepare images for GLM-4.1V ({error}); "
            "install the one that this project asks for, or torchvision"
        ) from error
    try:
        return Glm4vImageProcessorPil.from_pretrained(folder)
    except OSError as error:
        raise ModelError(
            f"{folder}: no preprocessor_config.json that says how images are prepared; copy it from "
            "the checkpoint"
        ) from error
