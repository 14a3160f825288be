"""What all pages share: one look, and the policy that lets nothing run but their own script."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@cache
def theme() -> str:
    """Colours, light and dark, letters and controls: the first part of every page's style sheet."""
    return Path(__file__).with_name("theme.css").read_text(encoding="utf-8")


def templates(folder: Path) -> Environment:
    """Templates of pages; what is put into them is escaped."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def encodable(text: str) -> str:
    """The text with half surrogate pairs, which JSON can spell and UTF-8 cannot, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def hashed(text: str) -> str:
    """What a page's policy names, so that no other script or style runs."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
