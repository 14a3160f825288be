"""The page as one text, with the policy that it is sent with: nothing of it comes from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from finetune.language import chinese, language
from finetune.webpages import hashed, templates, theme

ASSETS = Path(__file__).parent / "assets"
LIBRARIES = Path(__file__).parent / "libraries"
SCRIPTS = (
    *(LIBRARIES / name for name in ("marked.js", "purify.js", "highlight.js", "katex.js")),
    *(ASSETS / name for name in ("elements.js", "markdown.js", "talk.js", "view.js", "page.js")),
)
_WORDS = re.compile(r'\bt\("([^"]+)"\)|data-t="([^"]+)"')


@dataclass(frozen=True, slots=True)
class PageOptions:
    """How the page begins, and where it saves."""

    folder: Path | None = None
    """For votes.jsonl, rows.jsonl and images; without it neither is offered."""
    system: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """Settings of the first reply by OpenAI's names; what is not here is the server's choice."""


@dataclass(frozen=True, slots=True)
class Page:
    """The page and its headers."""

    text: str
    headers: Mapping[str, str]


def make_page(options: PageOptions, *, needs_key: bool) -> Page:
    """The page for a server that may want a key, which a reader types into it."""
    style = theme() + _text(ASSETS / "page.css")
    script = "\n;\n".join(map(_text, SCRIPTS))
    setup = {
        "language": "zh" if language() == "zh" else None,  # else the browser's
        "words": {text: chinese(text) for text in sorted(set(words()))},
        "saves": options.folder is not None,
        "needs_key": needs_key,
        "system": options.system,
        "sampling": dict(options.sampling),
    }
    text = (
        templates(ASSETS)
        .get_template("page.html")
        .render(style=Markup(style), script=Markup(script), setup=_json(setup))
    )
    # Trusted Types let HTML into the page through DOMPurify alone.
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify; "
        f"style-src 'sha256-{hashed(style)}'; script-src 'sha256-{hashed(script)}'"
    )
    return Page(
        text,
        {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        },
    )


def words() -> Iterator[str]:
    """Every text of the page, in English."""
    for path in (ASSETS / "page.html", *(one for one in SCRIPTS if one.parent == ASSETS)):
        for called, said in _WORDS.findall(_text(path)):
            yield called or said


def _text(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL="))


def _json(value: Any) -> Markup:
    """JSON that no text inside it can end."""
    return Markup(json.dumps(value, ensure_ascii=False).replace("<", "\\u003c"))
