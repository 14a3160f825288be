"""Single files that are whole or absent, and the lines of JSONL."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


def json_line(value: Any) -> str:
    """One line of a JSONL file."""
    return json.dumps(value, ensure_ascii=False) + "\n"


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file that takes its name only once all of it is written and synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
