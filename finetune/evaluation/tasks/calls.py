"""Tool calls as the Berkeley Function Calling Leaderboard asks for them -> a score per category.

Its files in a folder: `BFCL_v3_simple.json` and so on, a question a line, and the right calls under the
same name in `possible_answer/`. Of the categories those are asked that one turn answers and that are
judged by the call itself: simple, multiple (one of several functions), parallel (several calls),
parallel_multiple, irrelevance (no function fits: no call is right), and their `live` counterparts.

A call is right when its function is, every required argument is there, none is made up, and each value
is one of those that the file allows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.data.chat.thinking import arguments_of
from finetune.data.dialogue.conversation import Conversation, Message, RowError
from finetune.data.dialogue.tool_calls import read_tools
from finetune.errors import ConfigError, DataError, ModelError
from finetune.evaluation.tasks.table import TaskScore
from finetune.storage.given import read_given

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate

CATEGORIES = ("simple", "multiple", "parallel", "parallel_multiple", "irrelevance", "relevance")
PREFIX = "calls"
ABSENT = ""
"""Among the values of an argument: it may be left out."""
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None, "String": "string"}
_SIGNS = re.compile(r"[ ,./\-_*^'\"]")


class MadeCall(NamedTuple):
    """A call that a model made."""

    name: str
    arguments: dict[str, Any] | None
    """None when they are no JSON object."""


@dataclass(frozen=True)
class CallQuestion:
    """One prompt, and the calls that are right."""

    id: str
    category: str
    conversation: Conversation
    answer: Sequence[Mapping[str, Mapping[str, Sequence[Any]]]]
    """Every wanted call: name -> argument -> allowed values; none in `irrelevance`."""

    @property
    def group(self) -> str:
        """The category without `live_`."""
        return self.category.removeprefix("live_")

    def is_right(self, calls: Sequence[MadeCall]) -> bool:
        """Whether a reply's calls are those that are wanted, in any order."""
        if self.group == "irrelevance":
            return not calls
        if self.group == "relevance":
            return bool(calls)
        if len(calls) != len(self.answer):
            return False
        return _matched([[_fits(call, wanted) for call in calls] for wanted in self.answer])


def read_questions(folder: Path) -> list[CallQuestion]:
    """The questions of the files in `folder`.

    Raises:
        ConfigError: There are none.
        DataError: A row is not as the leaderboard writes it, or has no answer; names it.
    """
    files = {_category(file): file for file in sorted(folder.glob("BFCL_*.json"))}
    known = {name: file for name, file in files.items() if name.removeprefix("live_") in CATEGORIES}
    if not known:
        wanted = ", ".join(f"BFCL_v3_{name}.json" for name in CATEGORIES)
        raise ConfigError(
            f"--tasks calls:{folder}: holds no files of the leaderboard, such as {wanted} and the "
            "folder possible_answer; download its data set from the hub: gorilla-llm/Berkeley-Function-Calling-Leaderboard"
        )
    return [one for name, file in known.items() for one in _questions(name, file)]


def ask(
    model: Any, template: ChatTemplate, folder: Path, *, batch_size: int, max_samples: int | None
) -> dict[str, TaskScore]:
    """What a model's calls score in every category; ModelError when it has no place for tools."""
    from finetune.generation.generate import generate

    if not template.takes_tools:
        raise ModelError(
            f"--tasks calls:{folder}: this checkpoint's chat template has no place for tools; name a chat checkpoint"
        )
    questions = read_questions(folder)
    if max_samples is not None:
        questions = [one for _, one in _first(questions, max_samples)]
    prompts = template.prompts([(one.conversation, len(one.conversation.messages)) for one in questions])  # fmt: skip
    replies = generate(model, template, prompts, max_new_tokens=512, batch_size=batch_size)
    given = [
        calls_of(template, reply.ids, one.conversation.tools)
        for reply, one in zip(replies, questions, strict=True)
    ]
    rights = [100.0 * one.is_right(calls) for one, calls in zip(questions, given, strict=True)]
    found = {}
    for name in (*dict.fromkeys(one.category for one in questions), "all"):
        rows = [
            (one.id, right)
            for one, right in zip(questions, rights, strict=True)
            if name in (one.category, "all")
        ]
        said = f"share of right {name} replies, calls compared as the Berkeley leaderboard does, greedy"  # fmt: skip
        found[f"{PREFIX}/{name}"] = TaskScore(said, tuple(id for id, _ in rows), tuple(r for _, r in rows))  # fmt: skip
    return found


def calls_of(
    template: ChatTemplate, ids: Sequence[int], tools: Sequence[Mapping[str, Any]]
) -> list[MadeCall]:
    """The calls of a reply."""
    return [
        MadeCall(message.metadata.strip(), _arguments(arguments_of(message)))
        for message in template.messages(ids, tools)
        if message.metadata.strip()
    ]


def _arguments(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _fits(call: MadeCall, wanted: Mapping[str, Mapping[str, Sequence[Any]]]) -> bool:
    [(name, allowed)] = wanted.items()
    if call.name != name or call.arguments is None or not call.arguments.keys() <= allowed.keys():
        return False
    return all(
        _is_allowed(call.arguments[key], values) if key in call.arguments else ABSENT in values
        for key, values in allowed.items()
    )


def _is_allowed(value: Any, allowed: Sequence[Any]) -> bool:
    return any(_equal(value, one) for one in allowed)


def _equal(value: Any, wanted: Any) -> bool:
    """Whether a value is an allowed one; in a wanted object every key lists what is allowed."""
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(value, str) and isinstance(wanted, str):
        return _plain(value) == _plain(wanted)
    if isinstance(value, dict) and isinstance(wanted, dict):
        return value.keys() <= wanted.keys() and all(
            _is_allowed(value[key], _listed(one)) if key in value else ABSENT in _listed(one)
            for key, one in wanted.items()
        )
    if isinstance(value, list) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(_equal, value, wanted))
    return bool(value == wanted)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _plain(text: str) -> str:
    """A text without what the leaderboard overlooks: case, spaces and some signs."""
    return _SIGNS.sub("", text).casefold()


def _matched(fits: Sequence[Sequence[bool]]) -> bool:
    """Whether every wanted call (row) has a made one (column) of its own."""
    taken: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in seen:
                seen.add(column)
                if column not in taken or place(taken[column], seen):
                    taken[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(fits)))


def _category(file: Path) -> str:
    """`simple` of `BFCL_v3_simple.json`, and of the newer `BFCL_v4_simple_python.json`."""
    name = re.sub(r"^BFCL_(v\d+_)?", "", file.stem)
    return name.removesuffix("_python")


def _questions(category: str, file: Path) -> Iterator[CallQuestion]:
    needs_answers = category.removeprefix("live_") not in ("irrelevance", "relevance")
    answers: dict[str, Any] = {}
    if needs_answers:
        answers = {row["id"]: row["ground_truth"] for _, row in _rows(file.parent / "possible_answer" / file.name, ("id", "ground_truth"))}  # fmt: skip
    for location, row in _rows(file, ("id", "question", "function")):
        if needs_answers and row["id"] not in answers:
            raise DataError(
                f"{location}: possible_answer has no answer to {row['id']}; copy the leaderboard's files again"
            )
        try:
            [turn] = row["question"]
            messages = tuple(Message(one["role"], one["content"]) for one in turn)
            tools = read_tools([_described(one) for one in row["function"]])
        except (KeyError, TypeError, ValueError, RowError) as error:
            raise DataError(
                f"{location}: not a question of one turn as the leaderboard writes it ({type(error).__name__}: {error}); copy the leaderboard's files again"
            ) from error
        yield CallQuestion(row["id"], category, Conversation(messages, tools, location), answers.get(row["id"], ()))  # fmt: skip


def _rows(file: Path, keys: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(read_given(file, str(file), DataError).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file}:{number}: {error}; copy the leaderboard's files again"
            ) from error
        if not isinstance(row, dict) or any(key not in row for key in keys):
            raise DataError(
                f"{file}:{number}: has not all of {', '.join(keys)}; copy the leaderboard's files again"
            )
        yield f"{file}:{number}", row


def _described(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function with its parameters as JSON schema; the leaderboard writes Python's types."""
    kept = ("name", "description", "parameters")
    return {key: _schema(function[key]) for key in kept if key in function}


def _schema(value: Any) -> Any:
    if isinstance(value, list):
        return [_schema(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {key: _schema(one) for key, one in value.items()}
    kind = found.get("type")
    if isinstance(kind, str) and kind in _TYPES:
        found["type"] = _TYPES[kind]
        if found["type"] is None:
            del found["type"]
    return found


def _first(questions: Sequence[CallQuestion], most: int) -> Iterator[tuple[int, CallQuestion]]:
    """The first questions of every category with their places."""
    counts: dict[str, int] = {}
    for place, one in enumerate(questions):
        counts[one.category] = counts.get(one.category, 0) + 1
        if counts[one.category] <= most:
            yield place, one
