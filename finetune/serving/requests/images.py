"""Images of a request: data URLs become files of its own folder; nothing else is ever opened.

An address is not fetched and a path is not read, so that a request reaches neither the network nor
the server's disk.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.chat.image import ImageError, check_image, image_size
from finetune.serving.errors import bad_request

PREFIX = "finetune-serve-"
"""Of the folders in which a request's images lie."""
MAX_PIXELS = 25_000_000
"""Largest image that is decoded, 5000 x 5000; GLM-4V sees it at 1120 x 1120."""
MAX_PIXELS_TOGETHER = 100_000_000
"""Of all images of a request, known by their headers before any is decoded."""


def check_sources(messages: Sequence[Any]) -> None:
    """Raises ApiError for an image that is no data URL; nothing is decoded, opened or fetched."""
    for place, message in enumerate(messages):
        parts = message.get("content") if isinstance(message, dict) else None
        named = isinstance(message, dict) and {key for key in _KEYS if message.get(key) is not None}
        if named:
            raise bad_request(f"an image comes as an image_url part, {_ONLY}", f"messages.{place}")
        for at, part in enumerate(parts if isinstance(parts, list) else []):
            if is_image(part):
                _url_of(part, f"messages.{place}.content.{at}")


def with_image_files(messages: Sequence[Any], folder: Path) -> list[Any]:
    """The messages with every data URL written into `folder`; ApiError for any other image.

    All are counted by their headers before one is decoded.
    """
    files: dict[Path, str] = {}
    kept = [
        _message(message, f"messages.{place}", folder, files)
        for place, message in enumerate(messages)
    ]
    together = 0
    for file, location in files.items():
        together += _pixels(file)
        if together > MAX_PIXELS_TOGETHER:
            reason = f"the images have more than {MAX_PIXELS_TOGETHER:,} pixels together; make them smaller"
            raise bad_request(reason, location)
    for file, location in files.items():
        try:
            check_image(file, max_pixels=MAX_PIXELS)
        except ImageError as error:
            raise bad_request(f"the image cannot be shown: {error}", location) from error
    return kept


def without_folders(text: str) -> str:
    """A message for a client, in which its images are numbered and no folder of this machine is named."""
    return re.sub(rf"\S*{PREFIX}\w+/(\d+)", lambda file: str(int(file[1]) + 1), text)


def _pixels(file: Path) -> int:
    """Pixels by the header; none where there is none, or too many for one image, which is refused then."""
    try:
        width, height = image_size(file)
    except ImageError:
        return 0
    return width * height


def _message(message: Any, location: str, folder: Path, files: dict[Path, str]) -> Any:
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [
        _part(part, f"{location}.content.{at}", folder, files) for at, part in enumerate(content)
    ]
    return {**message, "content": parts}


def _part(part: Any, location: str, folder: Path, files: dict[Path, str]) -> Any:
    if not is_image(part):
        return part
    path = folder / str(len(files))
    path.write_bytes(_bytes_of(_url_of(part, location), location))
    files[path] = location
    return {"type": "image", "image": str(path)}


def is_image(part: Any) -> bool:
    """Whether a part of a message shows an image."""
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _url_of(part: Any, location: str) -> str:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if part["type"] == "image" or not isinstance(url, str) or not url.startswith("data:"):
        raise bad_request(f"an image comes as an image_url part, {_ONLY}", location)
    return url


_KEYS = ("image", "images")
_ONLY = "its url a data URL (data:image/png;base64,...): no address is fetched, no path is read"


def _bytes_of(url: str, location: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise bad_request("the data URL is not data:image/...;base64,...", location)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request(f"the data URL holds no base64: {error}", location) from error
