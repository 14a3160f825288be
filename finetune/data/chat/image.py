"""Image files to what GLM-4V's tower takes, equal to the published preprocessing bit for bit.

RGB, resized to exactly size x size with Pillow's bicubic filter, scaled to 0..1, normalised with
CLIP's mean and deviation. Nothing is decoded before its size is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from finetune.data.dialogue.conversation import Conversation, Message, RowError
from finetune.data.dialogue.images import ImageRule
from finetune.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

BEGIN, END = "<|begin_of_image|>", "<|end_of_image|>"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 89_478_485
"""Largest image that is decoded; where Pillow begins to warn of decompression bombs."""
_ORIENTATION = 0x0112
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class ImageError(ValueError):
    """Why a file is no image that can be shown; the text goes behind its path."""


class TakesImages(Protocol):
    """How a checkpoint takes images."""

    @property
    def begin_id(self) -> int:
        """The token that every image begins with, and nothing else."""
        ...

    @property
    def patch_token(self) -> str:
        """The placeholder between begin and end."""
        ...

    @property
    def rules(self) -> str:
        """Changes when the same image would take other tokens."""
        ...

    @property
    def rule(self) -> ImageRule:
        """How many images a dialogue may show, and who shows them."""
        ...

    def laid(self, message: Message, body: str) -> list[str]:
        """The text in front of, between and behind a message's images: one piece more than images.

        Args:
            message: One that shows images.
            body: Its content as the checkpoint's template writes it.
        """
        ...

    @property
    def size(self) -> int:
        """Width and height in pixels of every image; 0 where they keep their shape."""
        ...

    def patches_of(self, image: str) -> int:
        """Tokens between begin and end of an image."""
        ...

    def positions(
        self, ids: npt.NDArray[np.int32], grids: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.int64]:
        """Rotary positions of one document's T tokens: [T], or of several coordinates [3, T].

        Args:
            ids: The document's.
            grids: Rows of `image_grid_thw` of its images, where `arrays` gives one.
        """
        ...

    def arrays(self, images: Sequence[tuple[str, str]]) -> dict[str, npt.NDArray[Any]]:
        """What the model is shown of (path, who shows it), by the names of its arguments."""
        ...


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How a checkpoint takes images."""

    size: int
    """Width and height in pixels."""
    patches: int
    """Tokens between begin and end of an image; all but the first keep its position."""
    begin_id: int
    """The token that every image begins with, and nothing else."""
    patch_token = "<|endoftext|>"
    rule: ClassVar[ImageRule] = ImageRule("GLM-4V", most=1)

    def laid(self, message: Message, body: str) -> list[str]:
        """Nothing in front of the image, and the text without the placeholder's line break behind it.

        So that a placeholder in front and behind gives the same text.
        """
        (image,) = message.images
        if not image.marked:
            return ["", body]
        before, behind = body[: image.at], body[image.at :]
        return [
            "",
            before.removesuffix("\n") + behind if before.strip() else behind.removeprefix("\n"),
        ]

    @property
    def rules(self) -> str:
        """Changes when the same image would take other tokens."""
        return str(self.patches)

    def patches_of(self, image: str) -> int:
        """Tokens between begin and end of an image."""
        return self.patches

    def positions(
        self, ids: npt.NDArray[np.int32], grids: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int64]:
        """Of a document with an image: begin p, every patch p + 1, end p + 2."""
        steps = np.ones(len(ids), dtype=np.int64)
        for begin in np.flatnonzero(ids == self.begin_id):
            steps[begin + 2 : begin + 1 + self.patches] = 0
        return np.cumsum(steps) - 1

    def arrays(self, images: Sequence[tuple[str, str]]) -> dict[str, npt.NDArray[Any]]:
        """`pixel_values` [N, 3, size, size] of (path, who shows it)."""
        return {"pixel_values": np.stack([shown(path, self.size, who) for path, who in images])}

    @property
    def tokens(self) -> int:
        """Tokens of an image's whole span."""
        return self.patches + 2


def check_images(rule: ImageRule, conversation: Conversation) -> None:
    """Raise DataError for an image of the dialogue that the checkpoint cannot be shown."""
    try:
        rule.check(conversation.messages)
    except RowError as error:
        raise DataError(f"{conversation.location}: {error}") from error


def span_ids(image: TakesImages, control_ids: Mapping[str, int], path: str) -> list[int]:
    """Ids of an image's span: with as many placeholders as the model has patches for it."""
    tokens = (BEGIN, image.patch_token, END)
    if missing := [token for token in tokens if token not in control_ids]:
        raise DataError(
            f"this checkpoint's tokenizer has no {missing[0]}; use the tokenizer of its base"
        )
    begin, patch, end = (control_ids[token] for token in tokens)
    return [begin, *[patch] * image.patches_of(path), end]


def between(message: Message, body: str) -> list[str]:
    """The text in front of, between and behind a message's images."""
    gone = len(message.content) - len(message.content.lstrip()) if body != message.content else 0
    ends = [min(max(image.at - gone, 0), len(body)) for image in message.images]
    return [body[start:end] for start, end in pairwise([0, *ends, len(body)])]


def image_spec(config: Mapping[str, Any]) -> ImageSpec | None:
    """What a checkpoint's config.json says about images; None when it takes none."""
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        return None
    size = int(vision["image_size"])
    side = size // int(vision["patch_size"]) // 2
    return ImageSpec(size, side * side, int(config["boi_token_id"]))


def pixels(path: str | Path, size: int) -> npt.NDArray[np.float32]:
    """The pixel values [3, size, size] of an image file; ImageError when it is none."""
    return pixels_of(read_image(path), size)


def pixels_of(image: Image, size: int) -> npt.NDArray[np.float32]:
    """The pixel values [3, size, size] of an RGB image."""
    from PIL import Image

    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    values = np.asarray(resized)  # uint8 [size, size, 3]
    return np.stack([table[values[:, :, c]] for c, table in enumerate(_tables())])


def read_image(path: str | Path) -> Image:
    """An image file as RGB: turned as its EXIF says, transparency on white, first frame."""
    with opened_image(path) as image:
        return rgb_of(image)


def turned_image(path: str | Path) -> Image:
    """An image file as it is stored, turned as its EXIF says; first frame."""
    from PIL import ImageOps

    with opened_image(path) as image:
        return ImageOps.exif_transpose(image)  # a copy, which is decoded


def rgb_of(image: Image) -> Image:
    """An image as RGB: turned as its EXIF says, transparency on white."""
    from PIL import ImageOps

    return _rgb(ImageOps.exif_transpose(image))


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) as the image is shown; only its header is read."""
    with opened_image(path) as image:
        width, height = image.size
        sideways = image.getexif().get(_ORIENTATION, 1) >= 5
        return (height, width) if sideways else (width, height)


def check_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> None:
    """Raises ImageError unless the whole file can be decoded and has at most `max_pixels`.

    JPEGs are decoded at an eighth of their size, which reads every byte of them too.
    """
    with opened_image(path, max_pixels) as image:
        image.draft("RGB", (image.width // 8, image.height // 8))
        image.load()


class ImagePrompt(list[int]):
    """The ids of a prompt that shows images, and where their pixels come from."""

    def __init__(self, ids: Iterable[int], paths: Sequence[str], spec: TakesImages) -> None:
        super().__init__(ids)
        self.paths = tuple(paths)
        self.spec = spec

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What the model is shown; DataError when one is gone or damaged since it was checked."""
        return self.spec.arrays([(path, "a prompt") for path in self.paths])


def shown(path: str, size: int, location: str) -> npt.NDArray[np.float32]:
    """`pixels` of an image that `location` shows; DataError naming both."""
    try:
        return pixels(path, size)
    except ImageError as error:
        raise DataError(f"{location}: image {path}: {error}") from error


@contextmanager
def opened_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image]:
    """The file, its header read and its size checked; whatever its decoder raises is an ImageError."""
    from PIL import Image, UnidentifiedImageError

    file = Path(path)
    try:
        if not file.is_file():
            raise ImageError(
                "there is no such file; correct the path"
                if not file.exists()
                else "it is not a file; correct the path"
            )
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(_too_large(f"{image.width} x {image.height} pixels", max_pixels))
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            f"it is no image in one of the formats {', '.join(FORMATS)}; convert it"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(_too_large("far too many pixels", max_pixels)) from None
    except Exception as error:  # decoders raise anything on damaged files
        raise ImageError(f"it cannot be decoded: {error}; save it again") from error


def _too_large(size: str, limit: int) -> str:
    return f"it has {size}, more than {limit:,}; make it smaller"


def _rgb(image: Image) -> Image:
    from PIL import Image as Pillow

    if image.mode.startswith("I"):  # 16 bits of grey
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Pillow.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Pillow.new("RGBA", coloured.size, (255, 255, 255, 255))
        image = Pillow.alpha_composite(white, coloured)
    return image.convert("RGB")


@lru_cache(maxsize=1)
def _tables() -> tuple[npt.NDArray[np.float32], ...]:
    """For every channel the normalised value of each of the 256 intensities."""
    scaled = np.arange(256).astype(np.float32) / np.float32(255)
    pairs = zip(MEAN, DEVIATION, strict=True)
    return tuple((scaled - np.float32(mean)) / np.float32(std) for mean, std in pairs)
