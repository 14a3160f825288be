"""Examples, or packed rows of examples, to one batch of tensors.

B rows, T tokens in the longest of them (rounded up on request), D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from finetune.data.chat.image import TakesImages
from finetune.data.examples.dataset import IGNORED, Example

if TYPE_CHECKING:
    import torch

Item: TypeAlias = "Example | Sequence[Example]"
Features: TypeAlias = "Callable[[Sequence[str]], dict[str, torch.Tensor]]"


class Collator:
    """Pads on the right and tells documents apart.

    No batch has an `attention_mask`: padding is on the right, where causal attention never looks,
    and carries no loss. A batch of packed rows has `position_ids` that restart at 0 in every document
    (and in the padding): that is what makes documents blind to each other. With `flatten`, all rows become a single
    one without padding, as flash attention wants it.
    """

    def __init__(
        self,
        pad_id: int,
        *,
        image: TakesImages | None = None,
        features: Features | None = None,
        flatten: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.pad_id = pad_id
        self.image = image
        self.features = features
        self.flatten = flatten
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """A batch.

        `input_ids`, `labels` (-100 where nothing is learned, not shifted) int64 [B, T];
        of packed rows `position_ids` int64 [B, T];
        `loss_weights` float32 [B, T] only if some supervised token weighs other than 1;
        `pixel_values` (float32 [N, 3, H, W] for GLM-4V) and what belongs to them only if some document shows images, in reading order;
        `image_features` in the place of pixels if they are at hand;
        `sample_ids` int64 [D], not for the model: the index of every document.

        Images are decoded here, so in the loader's workers if there are any.
        """
        import torch

        packed = self.flatten or any(not isinstance(item, Example) for item in items)
        rows = [[item] if isinstance(item, Example) else list(item) for item in items]
        if self.flatten:
            rows = [[example for row in rows for example in row]]
        arrays = self._positions(rows) if packed else {}
        arrays["input_ids"] = self._padded(
            [[e.input_ids for e in row] for row in rows], self.pad_id
        )
        arrays["labels"] = self._padded([[e.labels for e in row] for row in rows], IGNORED)
        if any(e.loss_weights is not None for row in rows for e in row):
            arrays["loss_weights"] = self._padded([[_weights(e) for e in row] for row in rows], 0.0)
        shown = [(path, e.location) for row in rows for e in row for path in e.images]
        images = shown if self.image else []
        if self.image is not None and images and self.features is None:
            arrays |= self.image.arrays(images)
        arrays["sample_ids"] = np.array([e.index for row in rows for e in row], dtype=np.int64)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if images and self.features is not None:
            batch |= self.features([path for path, _ in images])
        return batch

    def _positions(self, rows: list[list[Example]]) -> dict[str, np.ndarray]:
        """Counts from 0 in every document; the padding of a row counts as one more document.

        The patches of an image share a position. Their number never restarts the count.
        """
        width = self._width(rows)
        counted = []
        for row in rows:
            padding = width - sum(len(e.input_ids) for e in row)
            counted.append([*(self._places(e) for e in row), np.arange(padding)])
        return {"position_ids": self._padded(counted, 0)}

    def _places(self, example: Example) -> np.ndarray:
        if self.image is None or not example.images:
            return np.arange(len(example.input_ids))
        return self.image.positions(example.input_ids)

    def _width(self, rows: list[list[Example]]) -> int:
        longest = max(sum(len(e.input_ids) for e in row) for row in rows)
        return -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def _padded(self, rows: list[list[np.ndarray]], filler: float) -> np.ndarray:
        """The rows' pieces one after another, [B, T], float32 or int64 after the pieces' kind."""
        longest = max(sum(map(len, row)) for row in rows)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        dtype = np.float32 if rows[0][0].dtype.kind == "f" else np.int64
        padded = np.full((len(rows), width), filler, dtype=dtype)
        for line, row in zip(padded, rows, strict=True):
            end = 0
            for piece in row:
                line[end : end + len(piece)] = piece
                end += len(piece)
        return padded


def _weights(example: Example) -> np.ndarray:
    if example.loss_weights is not None:
        return example.loss_weights
    weights: np.ndarray = (example.labels != IGNORED).astype(np.float32)
    return weights
