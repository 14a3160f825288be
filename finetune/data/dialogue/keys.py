"""What the keys of a row and of a message mean, whichever framework wrote them: one table.

There are three answers only. A key is read (as mask, weight, reasoning, system text …), it is known
to change nothing, or it is said: refused where training it would be wrong, counted and named else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from finetune.data.dialogue.conversation import RowError

TRAINED = ("train", "loss", "training", "trainable", "learn", "loss_mask")
"""Message keys whose true says that a reply carries loss."""
UNTRAINED = ("masked",)
"""Message keys whose true says that it carries none."""
WEIGHTS = ("weight", "loss_weight", "loss_scale")
"""Message keys with the weight of a reply's tokens in the loss."""
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "think", "cot")
"""Message keys with what a reply was thought out with."""
SYSTEM = ("system", "system_prompt", "meta_instruction")
"""Columns with the text of a system message."""
CONTEXT = ("context",)
"""Columns with a text that the question is about; it stands under the question."""

_READ_IN_ALL = frozenset(
    {
        *("role", "from", "content", "value", "metadata", "image", "images"),
        *("train_detail", "mask", *TRAINED, *UNTRAINED, *WEIGHTS),
    }
)
_READ_IN = {
    "system": _READ_IN_ALL | {"tools"},
    "user": _READ_IN_ALL,
    "assistant": _READ_IN_ALL | {"tool_calls", "function_call", *REASONING},
    "observation": _READ_IN_ALL | {"tool_call_id", "name", "parameters", "observation"},
}
"""Keys that are read, by the role of their message."""
_MESSAGE_KEYS = frozenset().union(*_READ_IN.values())
_READ_IN_PARTS = frozenset(
    {
        *("type", "image", "image_url", "bytes", "path", "url"),
        *("detail", "cache_control", "annotations", "index", "id"),  # change nothing
    }
)
_SAME = (("role", "from"), ("content", "value"))
"""Keys of which a message has one."""
_REFUSED_IN_MESSAGES = {
    "mask": "some frameworks mean 'trained' by it and others 'left out'; write \"train\": true or false",
    "refusal": "put the text into content",
    "tools": "tools stand on a system message or in a column of the row",
    "tool_calls": "only an assistant calls tools",
    "function_call": "only an assistant calls tools",
    "audio": "GLM-4 takes no audio",
    "videos": "GLM-4 takes no video files; show frames as images",
}
_HARMLESS_IN_MESSAGES = frozenset(
    {
        *("id", "idx", "index", "uuid", "message_id", "parent_id", "timestamp", "time", "date"),
        "tool_call_id",
        *(
            "created_at",
            "create_time",
            "model",
            "lang",
            "language",
            "annotations",
            "type",
            "status",
        ),
    }
)
_REFUSED_COLUMNS = {
    "chosen": "preference data holds a wanted and an unwanted reply; to train the wanted one, "
    "name the columns: data.columns: {prompt: …, response: chosen}",
    "rejected": "preference data holds an unwanted reply, which is not for training",
    "rejected_response": "preference data holds an unwanted reply, which is not for training",
    "rejected_messages": "preference data holds an unwanted reply, which is not for training",
    "videos": "GLM-4 takes text, and those that see take images; show frames as images",
    "audios": "GLM-4 takes text, and those that see take images",
    "documents": "GLM-4 has no place for documents; write them into the user's text",
}
_UNWANTED_IF_FALSE = (
    *("label", "kto_tag", "kto_label", "desirable", "is_desirable", "preferred", "is_preferred"),
    *("is_chosen", "wanted", "is_good"),
)
_HARMLESS_COLUMNS = frozenset(
    {
        *(
            "id",
            "_id",
            "idx",
            "index",
            "uuid",
            "uid",
            "guid",
            "hash",
            "conversation_id",
            "dialog_id",
        ),
        *(
            "sample_id",
            "question_id",
            "prompt_id",
            "conversation_hash",
            "source",
            "data_source",
            "dataset",
            "origin",
        ),
        *(
            "category",
            "task",
            "task_type",
            "task_name",
            "type",
            "kind",
            "domain",
            "topic",
            "subject",
        ),
        *(
            "lang",
            "language",
            "split",
            "url",
            "link",
            "license",
            "license_id",
            "tags",
            "meta",
            "metadata",
        ),
        *(
            "timestamp",
            "created_at",
            "create_time",
            "date",
            "model",
            "model_name",
            "generator",
            "version",
        ),
        *("difficulty", "level", "quality", "score", "author", "annotator", "parallel_tool_calls"),
    }
)
_MAY_MASK = re.compile(
    r"loss|train|mask|learn|supervis|backprop|gradient|^(?:is_)?target$"
    r"|(?:^|_)(?:ignored?|skip(?:ped)?|excluded?|weights?)$",
    flags=re.IGNORECASE,
)
"""Names of keys and columns that say what is learned, whatever framework wrote them."""
_SAYS_NO = re.compile(
    "mask|ignor|skip|exclud|omit|without|disable|^no_?|^not_?|^un", flags=re.IGNORECASE
)
"""Those whose true says that something is not."""
_FALSE = ("false", "no", "0", "off")
_TRUE = ("true", "yes", "1", "on")
_LONG = 100
"""Characters from which a column that is known to change nothing says something all the same."""
_SLIPS = ("messages", "conversations", "tools", "system", "images", "history")
"""Columns whose misspelling would lose what they hold."""


class Marks(NamedTuple):
    """What the keys of one message say besides its role and its text."""

    train: bool | None = None
    weight: float = 1.0
    reasoning: str = ""
    unread: tuple[str, ...] = ()
    """Keys that nothing reads and that are not known to change nothing."""


def marks_of(message: Mapping[str, Any], role: str) -> Marks:
    """The marks of a message; RowError for a key that is refused, misspelt or contradicts another."""
    unread = []
    for key in message.keys() - _READ_IN[role]:
        value = message[key]
        if value in (None, "", []) or key in _HARMLESS_IN_MESSAGES:
            continue
        if key in _REFUSED_IN_MESSAGES:
            raise RowError(f"key {key!r} is not supported; {_REFUSED_IN_MESSAGES[key]}")
        if _is_unwanted(key, value):
            raise RowError(f"{key}: is false, which marks a reply that is not wanted")
        near = _meant(key, tuple(sorted(_MESSAGE_KEYS))) if key not in _MESSAGE_KEYS else None
        if near:
            raise RowError(f"key {key!r} is not known; did you mean {near!r}?")
        if _may_mask(key, value):
            raise RowError(
                f'key {key!r} seems to say what is learned, and is not known; write "train": true or false. '
                f"If it says something else: data.ignore_columns: [{key}]"
            )
        unread.append(key)
    for one, other in _SAME:
        said = (message.get(one), message.get(other))
        if None not in said and said[0] != said[1]:
            raise RowError(f"has {one!r} and {other!r}, which say different things; keep one")
    if message.get("mask") is not None:
        raise RowError(f"key 'mask' is not supported; {_REFUSED_IN_MESSAGES['mask']}")
    return Marks(_train(message), _weight(message), _reasoning(message), tuple(sorted(unread)))


def unread_of_part(part: Mapping[str, Any]) -> set[str]:
    """Keys of a content part that nothing reads; RowError for one that seems to say what is learned."""
    unread = set()
    for key in part.keys() - _READ_IN_PARTS:
        value = part[key]
        if value in (None, "", [], {}) or (key in ("text", "value") and part.get("type") == "text"):
            continue
        if key in (*TRAINED, *UNTRAINED, *WEIGHTS, "mask") or _may_mask(key, value):
            raise RowError(
                f"a content part says {key!r}, and parts are not trained one by one; write it beside content"
            )
        unread.add(f"{key} of a content part")
    return unread


def _train(message: Mapping[str, Any]) -> bool | None:
    said: dict[str, bool] = {}
    for key in (*TRAINED, *UNTRAINED):
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool) and (value not in (0, 1) or isinstance(value, str)):
            raise RowError(f"{key} is {_described(value)}, not true or false")
        said[key] = bool(value) != (key in UNTRAINED)
    if (parts := message.get("train_detail")) is not None:
        said["train_detail"] = _whole(parts)
    if len(set(said.values())) > 1:
        listed = " and ".join(repr(key) for key in said)
        raise RowError(f"{listed} contradict each other; keep one")
    return next(iter(said.values()), None)


def _whole(parts: Any) -> bool:
    """The one answer that all segments of axolotl's `train_detail` give."""
    answers = {part.get("train") for part in parts if isinstance(part, dict)} if parts else set()
    if len(answers) != 1 or not isinstance(answer := answers.pop(), bool):
        raise RowError(
            "train_detail trains parts of a reply, which is not supported; "
            'write "train": true or false for the whole'
        )
    return answer


def _weight(message: Mapping[str, Any]) -> float:
    said = {key: message[key] for key in WEIGHTS if message.get(key) is not None}
    for key, value in said.items():
        if isinstance(value, int) and abs(value) > 1_000_000:
            raise RowError(f"{key} is over a million")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RowError(f"{key} is {_described(value)}, not a number")
    if len({float(value) for value in said.values()}) > 1:
        raise RowError(f"{' and '.join(map(repr, said))} contradict each other; keep one")
    return float(next(iter(said.values()), 1.0))


def _reasoning(message: Mapping[str, Any]) -> str:
    said = {key: message[key] for key in REASONING if message.get(key)}
    for key, value in said.items():
        if not isinstance(value, str):
            raise RowError(f"{key} is {_described(value)}, not text")
    if len(set(said.values())) > 1:
        raise RowError(f"{' and '.join(map(repr, said))} hold different texts; keep one")
    return next(iter(said.values()), "")


def changes_nothing(column: str) -> bool:
    """Whether a column is known to say nothing that a model could learn."""
    return column in _HARMLESS_COLUMNS


def check_columns(row: Mapping[str, Any], read: frozenset[str]) -> tuple[str, ...]:
    """The columns that nothing reads, unless they are known to change nothing; RowError for one that is refused or misspelt.

    Args:
        row: A row of a file.
        read: The columns that its layout reads.
    """
    unread = []
    for name in _unknown(tuple(row), read):
        value = row[name]
        if value in (None, "", [], {}):
            continue
        if name in _HARMLESS_COLUMNS and not (
            _may_mask(name, value) or (isinstance(value, str) and len(value) > _LONG)
        ):
            continue
        if _is_unwanted(name, value):
            raise RowError(
                f"{name}: is false, which marks a reply that is not wanted; leave it out"
            )
        if name in _REFUSED_COLUMNS:
            raise RowError(f"{name}: {_REFUSED_COLUMNS[name]}")
        near = _meant(name, _SLIPS)
        if near and not row.get(near):
            raise RowError(
                f"column {name!r} is not known; did you mean {near!r}? If it is meant: "
                f"data.ignore_columns: [{name}]"
            )
        if _may_mask(name, value):
            raise RowError(
                f'column {name!r} seems to say what is learned; write it into the messages as "train" or '
                f'"weight", or leave the row out. If it says something else: data.ignore_columns: [{name}]'
            )
        unread.append(name)
    return tuple(unread)


def _is_unwanted(name: str, value: Any) -> bool:
    return name in _UNWANTED_IF_FALSE and value in (False, 0, "false", "False")


def _may_mask(name: str, value: Any) -> bool:
    """Whether an unknown key says that something is not to be learned, or not as the rest is.

    `supervise: true` is what is done anyway. Keys of an object count as the key itself.
    """
    if isinstance(value, Mapping):
        return any(_may_mask(key, inner) for key, inner in value.items())
    if _MAY_MASK.search(name) is None:
        return False
    if isinstance(value, list):
        return all(isinstance(item, bool | int | float) for item in value)
    says_no = name not in TRAINED and _SAYS_NO.search(name) is not None
    if isinstance(value, str):
        return value.strip().lower() in (*_FALSE, *(_TRUE if says_no else ()))
    return isinstance(value, bool | int | float) and (value != 1 or says_no)


@lru_cache(maxsize=256)
def _unknown(names: tuple[str, ...], read: frozenset[str]) -> tuple[str, ...]:
    """The names that are not read, those that are harmless last; most rows of a file have the same ones."""
    unread = [name for name in names if name not in read]
    return tuple(sorted(unread, key=lambda name: name in _HARMLESS_COLUMNS))


@lru_cache(maxsize=256)
def _meant(key: str, known: Sequence[str]) -> str | None:
    """The known key that an unknown one is a slip of, or None for a key of somebody's own."""
    if len(key) < 4:
        return None
    near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.8)
    return near[0] if near and near[0] != key else None


def _described(value: Any) -> str:
    kinds = {bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def table() -> list[tuple[str, str]]:
    """(keys, what is done with them) for the reference in data/README.md."""

    def listed(names: Sequence[str]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    return [
        (listed(TRAINED), "in a message: true = its tokens carry loss, false = they carry none"),
        (listed(UNTRAINED), "in a message: true = its tokens carry no loss"),
        ("`train_detail`", "in a message: read when all its parts say the same, else refused"),
        (listed(WEIGHTS), "in a message: weight of the reply's tokens in the loss"),
        (listed(REASONING), "in a message: the reasoning of a reply; see `data.reasoning`"),
        (listed(SYSTEM), "column: the system message"),
        (listed(CONTEXT), "column: stands under the question, as `input` does"),
        *(
            (f"`{name}`", f"in a message: refused; {why}")
            for name, why in _REFUSED_IN_MESSAGES.items()
        ),
        *((f"`{name}`", f"column: refused; {why}") for name, why in _REFUSED_COLUMNS.items()),
        (
            listed(_UNWANTED_IF_FALSE),
            "column, and in a message: false is refused, it marks a reply that is not wanted",
        ),
        (
            listed(sorted(_HARMLESS_COLUMNS)),
            f"column: changes nothing; a text of more than {_LONG} characters is named all the same",
        ),
        (listed(sorted(_HARMLESS_IN_MESSAGES)), "in a message: changes nothing"),
        (
            "any other",
            "what seems to say what is learned (`compute_loss: false`) is refused; all else that holds "
            "something is counted and named; `data.ignore_columns` says that it is meant, of columns and of keys "
            "of messages",
        ),
    ]
