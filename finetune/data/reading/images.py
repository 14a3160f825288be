"""Images of rows -> files: paths under a root, and bytes that stand in the row kept in the cache."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from finetune.data.chat.image import ImageError, check_image
from finetune.data.dialogue.conversation import Conversation, RowError, ShownImage
from finetune.data.dialogue.images import DATA_URL
from finetune.errors import DataError
from finetune.storage.cache import default_root
from finetune.storage.files import whole_binary


@dataclass(frozen=True)
class ImagePolicy:
    """What is done about the images that rows show."""

    root: str | None = None
    """The folder that paths are relative to and stay under; by default the data file's own."""
    check: bool = False
    """Whether a row whose image cannot be decoded is a bad row."""
    cache_root: str | None = None
    """Where images that stand in rows are kept; by default the cache."""
    file_alone: bool = False
    """Whether the data file was fetched from a hub without what lies beside it there."""


class ImageFiles:
    """The files of images; each is looked at once."""

    def __init__(self, images: ImagePolicy) -> None:
        self._images = images
        self._whole: set[str] = set()

    def placed(self, conversation: Conversation, folder: Path) -> Conversation:
        """The dialogue with its images' paths as this process opens them; RowError if it may not.

        Args:
            conversation: A dialogue with the paths or data URLs that its row says.
            folder: The folder of the data file.
        """
        if not any(message.images for message in conversation.messages):
            return conversation
        moved = []
        for message in conversation.messages:
            if message.images:
                placed = (self._placed(image, folder) for image in message.images)
                message = replace(message, images=tuple(placed))
            moved.append(message)
        return replace(conversation, messages=tuple(moved))

    def _placed(self, image: ShownImage, folder: Path) -> ShownImage:
        path = self._path(image.path, folder)
        self._check(path)
        return image._replace(path=path)

    def _path(self, image: str, folder: Path) -> str:
        if image.startswith(DATA_URL):
            return self._kept(image)
        if self._images.file_alone and self._images.root is None:
            raise RowError(
                f"image {image!r} lies beside the rows, and of a hub's stream only the rows are fetched; fetch the "
                "images and set data.image_root, write their bytes into the rows, or leave data.streaming out"
            )
        return _under(Path(self._images.root or folder), image)

    def _kept(self, url: str) -> str:
        """The file in the cache that holds the bytes of a data URL, named by their hash."""
        try:
            content = base64.b64decode(url.partition(",")[2], validate=True)
        except ValueError as error:
            raise RowError(f"the image's data URL holds no base64: {error}") from error
        name = sha256(content).hexdigest()
        root = Path(self._images.cache_root) if self._images.cache_root else default_root()
        path = root / "images" / name[:2] / name
        if not path.is_file() or path.stat().st_size != len(content):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with whole_binary(path) as file:
                    file.write(content)
            except OSError as error:
                raise DataError(
                    f"images that stand in rows are kept under {root}, which cannot be written "
                    f"({error.strerror}); set data.cache_dir or $FINETUNE_CACHE"
                ) from error
        return str(path)

    def _check(self, path: str) -> None:
        """RowError unless the image can be decoded."""
        if not self._images.check or path in self._whole:
            return
        try:
            check_image(path)
        except ImageError as error:
            raise RowError(f"image {path}: {error}") from error
        self._whole.add(path)


def _under(root: Path, path: str) -> str:
    """The path of an image, seen from the working directory; RowError when it leaves the root."""
    home = Path(os.path.normpath(root.absolute()))
    if not Path(os.path.normpath(home / path)).is_relative_to(home):
        raise RowError(
            f"image {path!r} is outside {root}; set data.image_root (--image-root) to a folder above it"
        )
    if "\0" not in path and not _real(home / path).is_relative_to(_real(home)):
        raise RowError(
            f"image {path!r} is a link that leads out of {root}; copy the image in its place, or set "
            "data.image_root (--image-root) to a folder above both"
        )
    return os.path.normpath(root / path)


def _real(path: Path) -> Path:
    """Without links; a loop of links stays as it is, and is no file."""
    return Path(os.path.realpath(path))
