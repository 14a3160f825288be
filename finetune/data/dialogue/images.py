"""An image in any of the ways that a row brings one -> its path, or a data URL with its bytes."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

from finetune.data.dialogue.conversation import RowError

DATA_URL = "data:"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


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
