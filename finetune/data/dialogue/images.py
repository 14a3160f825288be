"""Images in any of the ways that a row brings them -> where each stands, as a path or a data URL."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from finetune.data.dialogue.conversation import PLACEHOLDER, Message, RowError, ShownImage

DATA_URL = "data:"
UNNAMED = ""
"""The path of an image that a part of a message announces and a column of the row brings."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


@dataclass(frozen=True)
class ImageRule:
    """Which images the dialogues of a checkpoint may show."""

    checkpoint: str
    """Which checkpoints it is about, as messages name them."""
    most: int | None = None
    """How many a dialogue may show; one stands in front of the first question."""
    roles: tuple[str, ...] = ("user",)
    """Whose messages may show some."""

    def check(self, messages: Sequence[Message], positions: Sequence[int] | None = None) -> None:
        """Raise RowError with the first image that the checkpoint cannot be shown."""
        if not any(message.images for message in messages):
            return
        at = positions or range(1, len(messages) + 1)
        if self.most == 0:
            raise RowError(
                f"shows an image, but this checkpoint ({self.checkpoint}) takes none; use one that does, such "
                "as GLM-4V or GLM-4.1V, or leave such rows out"
            )
        for message, position in zip(messages, at, strict=True):
            if message.images and message.role not in self.roles:
                raise RowError(
                    f"message {position}: an image on {message.role!r}, and the chat template of this "
                    f"{self.checkpoint} has a place for images in {' and '.join(self.roles) or 'no'} messages; "
                    "move it, or use a checkpoint whose template has one"
                )
        if self.most == 1:
            self._check_one(messages, at)

    def _check_one(self, messages: Sequence[Message], at: Sequence[int]) -> None:
        several = sum(len(message.images) for message in messages)
        if several > 1:
            raise RowError(
                f"{self.checkpoint} takes one image, which its layout shows before the first question, and here "
                f"are {several}; leave the others out, or use GLM-4.1V, which takes several"
            )
        users = [place for place, message in enumerate(messages) if message.role == "user"]
        if users and not messages[users[0]].images:
            place = next(place for place in users if messages[place].images)
            raise RowError(
                f"message {at[place]}: {self.checkpoint} takes one image, in the first user message: its layout "
                "shows it before the first question; use GLM-4.1V, which takes images in any turn"
            )
        first = messages[users[0]] if users else messages[0]
        if not first.content:
            raise RowError(
                f"message {at[users[0]]}: content is empty beside the image; write the question"
            )


def image_of(value: Any, what: str) -> str:
    """The path or data URL of a path, bytes, or `{"bytes": …, "path": …}` as `datasets` keeps images.

    Args:
        value: What stands in the row.
        what: Where it stands; a RowError begins with it.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, bytes):
        return f"{DATA_URL}image;base64,{base64.b64encode(value).decode()}"
    if not isinstance(value, str) or not value or "\0" in value:
        raise RowError(f"{what} is neither a path nor the bytes of an image")
    if _SCHEME.match(value):
        head, comma, _ = value.partition(",")
        if not value.startswith(DATA_URL):
            raise RowError(f"{what} {value[:40]!r} is a URL; only files and data URLs are opened")
        if not comma or not head.endswith(";base64"):
            raise RowError(f"{what} is a data URL, but not data:image/…;base64,…")
    return value


def brings_image(value: Any) -> bool:
    """Whether a column or key holds anything; a table writes `{"bytes": null, "path": null}` for nothing."""
    return any(value.values()) if isinstance(value, dict) else bool(value)


def images_of(value: Any, what: str) -> list[str]:
    """The paths or data URLs of one image or a list of them."""
    return [image_of(one, what) for one in (value if isinstance(value, list) else [value])]


def with_own(message: Message, paths: Sequence[str], position: int) -> Message:
    """The message with the images that a key of it names, at its placeholders or in front of its text."""
    if message.images:
        raise RowError(f"message {position}: names images beside those of its content; keep one")
    places = message.content.count(PLACEHOLDER)
    if not places:
        return replace(message, images=tuple(ShownImage(path) for path in paths))
    if places != len(paths):
        raise RowError(f"message {position}: {_unequal(len(paths), places)}")
    return _filled(_opened(message), list(paths))


def with_placeholders(message: Message) -> str:
    """The message's text with a placeholder where each of its images stands."""
    ends = [0, *(image.at for image in message.images), len(message.content)]
    return PLACEHOLDER.join(message.content[start:end] for start, end in pairwise(ends))


def with_images_of_row(
    messages: list[Message], positions: Sequence[int], row: Mapping[str, Any]
) -> list[Message]:
    """The messages with the images that a column of the row names.

    LLaMA-Factory and ms-swift write a list `images`, LLaVA `image`, and a placeholder into the texts for each of
    them; parts of type `image` that name none are places too. Without any place all of them stand in front
    of the first question.
    """
    column = next((name for name in ("images", "image") if brings_image(row.get(name))), None)
    if column is None:
        for message, position in zip(messages, positions, strict=True):
            if any(image.path == UNNAMED for image in message.images):
                raise RowError(
                    f"message {position}: has a part of type 'image', but neither it nor a column 'images' of "
                    "the row brings the image"
                )
        return messages
    if column == "images" and brings_image(row.get("image")):
        raise RowError("images and image: both bring one; keep one")
    paths = images_of(row[column], column)
    opened = [_opened(message) for message in messages]
    places = sum(image.path == UNNAMED for message in opened for image in message.images)
    if not places:
        return _in_front(messages, paths, column)
    if places != len(paths):
        raise RowError(f"{column}: {_unequal(len(paths), places)}")
    return [_filled(message, paths) for message in opened]


def _unequal(images: int, places: int) -> str:
    return (
        f"brings {images}, and there are {places} places for images ({PLACEHOLDER} in the text, or parts of type "
        f"'image'); write one {PLACEHOLDER} for each image, or none, which shows all before the first question"
    )


def _in_front(messages: list[Message], paths: Sequence[str], column: str) -> list[Message]:
    first = next((n for n, m in enumerate(messages) if m.role == "user"), None)
    if first is None:
        raise RowError(f"{column}: there is no user message to show it with")
    message = messages[first]
    if message.images:
        raise RowError(f"{column}: the first user message names an image too; keep one of them")
    shown = replace(message, images=tuple(ShownImage(path) for path in paths))
    return [*messages[:first], shown, *messages[first + 1 :]]


def _opened(message: Message) -> Message:
    """The message with an unnamed image in place of every placeholder of its text."""
    if PLACEHOLDER not in message.content:
        return message
    content = message.content
    marks = [ShownImage(UNNAMED, m.start(), True) for m in re.finditer(PLACEHOLDER, content)]
    placed = sorted((*message.images, *marks), key=lambda image: image.at)
    images = [
        image._replace(at=image.at - content[: image.at].count(PLACEHOLDER) * len(PLACEHOLDER))
        for image in placed
    ]
    return replace(message, content=content.replace(PLACEHOLDER, ""), images=tuple(images))


def _filled(message: Message, paths: list[str]) -> Message:
    """The message with its unnamed images named, which are taken from the front of `paths`."""
    if not message.images:
        return message
    named = [i._replace(path=paths.pop(0)) if i.path == UNNAMED else i for i in message.images]
    return replace(message, images=tuple(named))
