"""Small files that a user names beside data and models: read whole, or refused in words.

A schema, a key, votes, another program's configuration. A pipe that nobody writes to is empty, not waited
for, and of a device that never ends no more is read than a file may have.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError, FinetuneError

LARGEST = 64 << 20
"""Bytes; those that people write have a thousandth of it."""


def read_given(path: Path, name: str, error: type[FinetuneError] = ConfigError) -> str:
    """The text of a file, without the mark that Windows puts in front.

    Args:
        path: the file.
        name: what a message calls it, such as `--json-schema x.json`.
        error: what is raised when it is a folder, too large, no UTF-8, or cannot be read.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            os.set_blocking(file.fileno(), True)  # who writes to a pipe is waited for
            raw = file.read(LARGEST + 1)
    except (OSError, ValueError) as reason:
        said = reason.strerror if isinstance(reason, OSError) else str(reason)
        raise error(
            f"{name} cannot be read: {said}; check the path and its permissions"
        ) from reason
    if len(raw) > LARGEST:
        raise error(f"{name} is larger than {LARGEST >> 20} MiB; name the right file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(
            f"{name} is not UTF-8 (byte {raw[reason.start]:#04x} at {reason.start}); save it as UTF-8"
        ) from reason


def read_given_json(path: Path, name: str, error: type[FinetuneError] = ConfigError) -> Any:
    """The value in a JSON file; raises as `read_given` does, and for what is no JSON."""
    try:
        return json.loads(read_given(path, name, error))
    except (ValueError, RecursionError) as reason:
        raise error(f"{name} is no JSON ({reason}); correct it") from reason
