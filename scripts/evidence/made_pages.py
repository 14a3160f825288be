"""What a script has made, put between its marks in a page of both languages."""

from __future__ import annotations

import re
from pathlib import Path


def put(page: Path, begin: str, made: str, end: str) -> None:
    """Write `made` between the lines `begin` and `end` of a page and of its Chinese twin, where that is."""
    marked = f"{begin}\n{made}\n{end}"
    for one in filter(Path.exists, (page, page.with_stem(f"{page.stem}_zh"))):
        text = one.read_text(encoding="utf-8")
        text = re.sub(f"{begin}.*?{end}", lambda _: marked, text, flags=re.DOTALL)
        one.write_text(text, encoding="utf-8")
