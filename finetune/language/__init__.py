"""What the program says, in the language of who reads it: `$FINETUNE_LANG`, else the locale; en or zh.

Messages are written in English where they arise. On their way out, at one place (`console`), they meet the
catalogue of `zh/LC_MESSAGES/finetune.po`: a text, or the template of one with `{}` where a value goes.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

CATALOGUE = Path(__file__).resolve().parent / "zh/LC_MESSAGES/finetune.po"
_PLACE = re.compile(r"\{(\d*)\}")


def language() -> str:
    """`zh` or `en`: what `$FINETUNE_LANG` says, else the locale of the shell."""
    names = ("FINETUNE_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
    wanted = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return "zh" if wanted.lower().startswith("zh") else "en"


def word(text: str) -> str:
    """A fixed text in the user's language."""
    return chinese(text) if language() == "zh" else text


def chinese(text: str) -> str:
    """A fixed text in Chinese, whoever reads."""
    return _catalogue().get(text, text)


def sentence(text: str) -> str:
    """A message in the user's language, as far as the catalogue has it; values stay as they are."""
    return _translated(text)[0] if language() == "zh" else text


def width(text: str) -> int:
    """Columns that a text takes on a screen: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _translated(text: str) -> tuple[str, int]:
    """The text in Chinese, and how many of its characters the catalogue had.

    Of the ways to read it, the one that the catalogue knows most of wins: the whole, its lines, or what stands
    before and behind a mark, such as a place in a file and what is wrong there.
    """
    core = text.strip()
    if not re.search(r"[A-Za-z]{2}", core):
        return text, 0
    if core in _catalogue():
        found = [(_catalogue()[core], len(core))]
    else:
        found = [(core, 0), *_by_parts(core), *_by_template(core)]
    said, known = max(found, key=lambda candidate: candidate[1])
    before, _, after = text.partition(core)
    return before + said + after, known


def _by_template(text: str) -> Iterator[tuple[str, int]]:
    """By each of the templates that say most of it; values are translated likewise, and hold one sentence."""
    matches = (
        (match, parts, other)
        for parts, places, other in _templates()
        if all(part in text for part in parts)
        and (match := re.fullmatch(places, text, flags=re.DOTALL))
    )
    for match, parts, other in islice(matches, 3):
        values = [_translated(value) for value in match.groups()]
        known = sum(map(len, parts)) + sum(known for _, known in values)
        yield _filled(other, [value for value, _ in values]), known - ("; " in "".join(match.groups()))  # fmt: skip


def _by_parts(text: str) -> Iterator[tuple[str, int]]:
    """Line by line, or cut at the first mark of a kind."""
    for mark in ("\n",) if "\n" in text else (": ", "; ", ". "):
        parts = text.split(mark, maxsplit=-1 if mark == "\n" else 1)
        if len(parts) > 1:
            said = [_translated(part) for part in parts]
            yield mark.join(part for part, _ in said), sum(known for _, known in said)


def _filled(template: str, values: list[str]) -> str:
    """`{}` takes the next value, `{2}` the third."""
    rest = iter(values)
    return _PLACE.sub(lambda place: values[int(place[1])] if place[1] else next(rest), template)


@cache
def _catalogue() -> dict[str, str]:
    """English -> Chinese, from the catalogue in gettext's form: msgid and msgstr, each of quoted lines."""
    found: dict[str, str] = {}
    texts = {"msgid": "", "msgstr": ""}
    field = "msgid"
    for line in (*CATALOGUE.read_text(encoding="utf-8").splitlines(), "msgid"):
        name, _, rest = line.partition(" ")
        if name == "msgid":
            found[texts["msgid"]] = texts["msgstr"]
            texts = {"msgid": "", "msgstr": ""}
        if name in texts:
            field = name
        quoted = line if line.startswith('"') else rest if name in texts else ""
        if quoted:
            texts[field] += json.loads(quoted)
    return {text: other for text, other in found.items() if text and other}


@cache
def _templates() -> list[tuple[list[str], str, str]]:
    """Fixed parts, the pattern and the translation of each template; those that say most come first."""
    found = []
    for text, other in _catalogue().items():
        parts = _PLACE.split(text)[::2]
        if len(parts) > 1:
            found.append((parts, "(.*?)".join(map(re.escape, parts)), other))
    return sorted(found, key=lambda entry: 3 * len(entry[0]) - sum(map(len, entry[0])))
