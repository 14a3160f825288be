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
        of packed rows `position_ids` int64 [B, T], or [3, B, T] with images that keep their shape;
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
        arrays: dict[str, np.ndarray] = {}
        arrays["input_ids"] = self._padded(
            [[e.input_ids for e in row] for row in rows], self.pad_id
        )
        arrays["labels"] = self._padded([[e.labels for e in row] for row in rows], IGNORED)
        if any(e.loss_weights is not None for row in rows for e in row):
            arrays["loss_weights"] = self._padded([[_weights(e) for e in row] for row in rows], 0.0)
        arrays["sample_ids"] = np.array([e.index for row in rows for e in row], dtype=np.int64)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        shown = [(path, e.location) for row in rows for e in row for path in e.images]
        if self.image is not None and shown:
            batch |= self._images(self.image, shown)
        if packed:
            grids = batch.get("image_grid_thw")
            positions = self._positions(rows, None if grids is None else grids.numpy())
            batch["position_ids"] = torch.from_numpy(positions)
        return batch

    def _images(
        self, spec: TakesImages, shown: Sequence[tuple[str, str]]
    ) -> dict[str, torch.Tensor]:
        """What the model is told of the images: their pixels, or what is at hand in their place."""
        import torch

        if self.features is not None:
            return self.features([path for path, _ in shown])
        return {name: torch.from_numpy(array) for name, array in spec.arrays(shown).items()}

    def _positions(self, rows: list[list[Example]], grids: np.ndarray | None) -> np.ndarray:
        """Counts from 0 in every document; the padding of a row counts as one more document.

        What positions the patches of an image have is the checkpoint's; they never restart the count.
        """
        width, seen = self._width(rows), 0
        counted = []
        for row in rows:
            places = []
            for example in row:
                number = len(example.images)
                own = None if grids is None else grids[seen : seen + number]
                places.append(self._places(example, own))
                seen += number
            padding = width - sum(len(e.input_ids) for e in row)
            counted.append([*places, np.arange(padding)])
        axes = max(piece.ndim for row in counted for piece in row)
        if axes == 1:
            return self._padded(counted, 0)
        return np.stack(
            [
                self._padded([[p if p.ndim == 1 else p[axis] for p in row] for row in counted], 0)
                for axis in range(3)
            ]
        )

    def _places(self, example: Example, grids: np.ndarray | None) -> np.ndarray:
        if self.image is None or not example.images:
            return np.arange(len(example.input_ids))
        return self.image.positions(example.input_ids, grids)

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
