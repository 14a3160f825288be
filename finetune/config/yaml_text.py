"""YAML text -> plain values that remember their lines; everything surprising in YAML is refused.

Works on the parser's events, so that nothing is ever constructed: no tags, no aliases (and no alias
bombs), no duplicate keys, one document, bounded depth and size. Scalars follow YAML 1.2's core
schema: `5e-4` is a number (YAML 1.1 reads text), `yes` and `2024-01-01` are text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 16
"""Five times the page that explains every option; PyYAML reads this much in under a second."""
MAX_DEPTH = 16
MAX_PROBLEMS = 100

Key = tuple[str | int, ...]
"""The way to a value: `("data", "train", 0, "path")`."""

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_WORDS = {"": None, "~": None} | {
    spelling: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelling in (word, word.capitalize(), word.upper())
}
_DOTTED_WORD = re.compile(r"\.([A-Za-z])")
_CANNOT_BE_TEXT = re.compile("[\x00\ud800-\udfff]")
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


@dataclass(frozen=True)
class Place:
    """Where something was written: a file and its line, or the command line."""

    name: str
    line: int | None = None

    def __str__(self) -> str:
        return self.name if self.line is None else f"{self.name}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing to put right."""

    place: Place
    key: Key
    text: str

    def __str__(self) -> str:
        return ": ".join(filter(None, [str(self.place), dotted(self.key), self.text]))


@dataclass
class Document:
    """What a text says: values, the place of each key, and what is wrong with it."""

    value: Any = None
    places: dict[Key, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    whole: bool = True
    """False when reading had to stop, so that nothing can be said about what is missing."""


def dotted(key: Key) -> str:
    """`("data", "train", 0)` as a reader writes it: `data.train[0]`."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def resolve(text: str) -> Any:
    """The value of an unquoted scalar: null, true/false, a number, or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > 100:
        return text
    if _INTEGER.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(_DOTTED_WORD.sub(r"\1", text))
    return text


def parse_file(path: Path) -> Document:
    """The content of a YAML file, which must be a mapping."""
    document = Document()

    def broken(text: str, line: int | None = None) -> Document:
        document.problems.append(Problem(Place(str(path), line), (), text))
        document.whole = False
        return document

    if path.is_dir():
        return broken("is a folder; name the YAML file in it")
    if not path.is_file():  # opening a pipe would wait for its writer
        return broken("is not a regular file")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        return broken(f"{error.strerror or error}")
    if len(raw) > MAX_BYTES:
        return broken(f"is larger than {MAX_BYTES} bytes; that is not a configuration")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return broken(f"byte {raw[error.start]:#04x} is not UTF-8; save the file as UTF-8", line)
    document = parse(text, str(path))
    document.places[()] = Place(str(path))
    if document.whole and not isinstance(document.value, dict):
        what = "is empty" if document.value is None else f"holds {kind_of(document.value)}"
        return broken(f"{what}; a configuration is a mapping with `model:`, `data:`, …")
    return document


def parse(text: str, name: str, *, numbered: bool = True) -> Document:
    """Values and places of one YAML text; `numbered` False leaves out lines (the command line)."""
    builder = _Builder(name, numbered)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.take(event)
        return builder.document
    except _StopError:
        pass
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        builder.refuse(mark, (), f"not valid YAML: {error.problem or error.context}{_hint(error)}")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        place = Place(name, line if numbered else None)
        said = f"character {error.character:#06x} is not allowed in YAML"
        builder.document.problems.append(Problem(place, (), said))
    builder.document.whole = False
    return builder.document


def kind_of(value: Any) -> str:
    """A value's type in the words of a YAML file."""
    if value is None:
        return "nothing"
    kinds = {bool: "true/false", int: "a whole number", float: "a number", str: "text"}
    return kinds.get(type(value), "a list" if isinstance(value, list) else "a mapping")


def one_line(value: Any) -> str:
    """A value as it is written behind `key: `, whatever it holds, in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    text = text.removesuffix("\n").removesuffix("\n...").strip()
    # PyYAML writes YAML 1.1, in which 1e5 is a text.
    is_read = len(text.splitlines()) == 1 and parse(f"key: {text} #", "").value == {"key": value}
    return text if is_read else json.dumps(value)


def shown(value: Any) -> str:
    """A value as an error message quotes it."""
    if isinstance(value, (dict, list)) or value is None:
        return kind_of(value)
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


class _StopError(Exception):
    """The rest of the text cannot be read sensibly; the problem is already noted."""


@dataclass
class _Frame:
    """A mapping or list that is being filled."""

    value: dict[str, Any] | list[Any]
    path: Key
    key: str | None = None


class _Builder:
    """Fills a Document from parser events, with a stack of its own instead of recursion."""

    def __init__(self, name: str, numbered: bool) -> None:
        self.document = Document()
        self._name = name
        self._numbered = numbered
        self._stack: list[_Frame] = []
        self._num_documents = 0

    def refuse(self, mark: Any, key: Key, text: str) -> None:
        """Notes a problem at a mark of the parser."""
        self.document.problems.append(Problem(self._place(mark), key, text))

    def take(self, event: yaml.Event) -> None:
        """One parser event."""
        if len(self.document.problems) >= MAX_PROBLEMS:
            raise _StopError
        if isinstance(event, yaml.DocumentStartEvent):
            self._num_documents += 1
            if self._num_documents > 1:
                self.refuse(event.start_mark, (), "a second document begins here; one file is one")
                raise _StopError
        elif isinstance(event, yaml.AliasEvent):
            self._refuse_reference(event, "*")
            self._put(None, event)
        elif isinstance(event, yaml.ScalarEvent):
            self._check(event)
            self._put_scalar(event)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            self._check(event)
            self._open({} if isinstance(event, yaml.MappingStartEvent) else [], event)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            self._stack.pop()

    def _place(self, mark: Any) -> Place:
        return Place(self._name, mark.line + 1 if self._numbered and mark else None)

    def _here(self) -> Key:
        """The key of the value that comes next."""
        if not self._stack:
            return ()
        frame = self._stack[-1]
        if isinstance(frame.value, list):
            return (*frame.path, len(frame.value))
        return frame.path if frame.key is None else (*frame.path, frame.key)

    def _check(self, event: Any) -> None:
        if event.anchor is not None:
            self._refuse_reference(event, "&")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            said = f"tag `{tag}` is refused: values are plain text, numbers, lists and mappings"
            self.refuse(event.start_mark, self._here(), said)

    def _refuse_reference(self, event: Any, sign: str) -> None:
        said = (
            f"`{sign}{event.anchor}` is refused: anchors and aliases are not used here; write the "
            f"value out (text that begins with {sign} goes in quotes)"
        )
        self.refuse(event.start_mark, self._here(), said)

    def _open(self, value: dict[str, Any] | list[Any], event: Any) -> None:
        if len(self._stack) >= MAX_DEPTH:
            self.refuse(event.start_mark, self._here(), f"nested deeper than {MAX_DEPTH} levels")
            raise _StopError
        path = self._here()
        self._put(value, event)
        self._stack.append(_Frame(value, path))

    def _put_scalar(self, event: yaml.ScalarEvent) -> None:
        # JSON spells 😀 as two halves, \ud83d\ude00, which PyYAML leaves apart.
        event.value = _PAIR.sub(_joined, event.value)
        if _CANNOT_BE_TEXT.search(event.value):
            said = "holds a NUL or half a surrogate pair, which is not text"
            self.refuse(event.start_mark, self._here(), said)
            event.value = ""
        frame = self._stack[-1] if self._stack else None
        if frame is not None and isinstance(frame.value, dict) and frame.key is None:
            self._take_key(frame, event)
            return
        self._put(resolve(event.value) if event.implicit[0] else event.value, event)

    def _take_key(self, frame: _Frame, event: yaml.ScalarEvent) -> None:
        key = (*frame.path, event.value)
        frame.key = event.value
        if key in self.document.places:
            first = self.document.places[key]
            before = f"line {first.line}" if first.line else "before"
            self.refuse(event.start_mark, key, f"given twice, first in {before}; remove one")
        else:
            self.document.places[key] = self._place(event.start_mark)

    def _put(self, value: Any, event: Any) -> None:
        if not self._stack:
            self.document.value = value
            return
        frame = self._stack[-1]
        if isinstance(frame.value, list):
            self.document.places[self._here()] = self._place(event.start_mark)
            frame.value.append(value)
        elif frame.key is None:
            self.refuse(event.start_mark, frame.path, "a key must be plain text")
            raise _StopError
        else:
            frame.value[frame.key] = value
            frame.key = None


def _joined(pair: re.Match[str]) -> str:
    return pair[0].encode("utf-16", "surrogatepass").decode("utf-16")


def _hint(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or ""
    if "'\\t'" in problem:
        return "; indent with spaces, not tabs"
    if "mapping values are not allowed" in problem:
        return "; check the indentation, and put text that holds `: ` in quotes"
    if "cannot start any token" in problem or "expected alphabetic" in problem:
        return '; text that begins with * & ! @ % ` goes in quotes: "*.jsonl"'
    return ""
