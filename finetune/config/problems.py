"""pydantic's findings -> sentences that name the place, the key, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from finetune.config.extras import ALSO_KNOWN_AS, OWNED, REFUSED, training_argument_names
from finetune.config.migrate import hint, told_of
from finetune.config.schema import Method, MethodSection, RunConfig
from finetune.config.yaml_text import Key, dotted, shown

METHODS: dict[str, type[MethodSection]] = {
    model.model_fields["kind"].default: model for model in get_args(get_args(Method)[0])
}

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def findings(error: ValidationError, tree: Any) -> list[tuple[Key, str]]:
    """Every key that does not fit, with the sentence that says so; one per key."""
    wanted: dict[Key, list[str]] = {}
    others: list[tuple[Key, str]] = []
    got: dict[Key, Any] = {}
    for item in error.errors(include_url=False):
        key = _key(item["loc"], tree, missing=item["type"] == "missing")
        if item["type"] in _WANTED:
            wanted.setdefault(key, []).append(_WANTED[item["type"]])
            got[key] = item["input"]
        else:
            others.append(_sentence(key, item, tree))
    deeper = {key[:length] for key, _ in others for length in range(len(key))}
    deeper |= {key[:length] for key in wanted for length in range(len(key))}
    for key, kinds in wanted.items():
        if key not in deeper:  # a list of which one element is wrong is not a wrong list
            others.append((key, _wrong_kind(key, kinds, got[key])))
    return others


def model_at(key: Key, tree: Any) -> type[BaseModel] | None:
    """The section that describes the mapping at `key`; None where anything goes."""
    model: type[BaseModel] | None = RunConfig
    node = tree
    for part in key:
        node = node[part] if _has(node, part) else None
        if isinstance(part, int):
            continue
        if model is None or part not in model.model_fields:
            return None
        if model is RunConfig and part == "method":
            kind = node.get("kind") if isinstance(node, dict) else None
            model = METHODS.get(kind) if isinstance(kind, str) else None
        else:
            model = next(iter(_models_in(model.model_fields[part].annotation)), None)
    return model


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant."""
    found = get_close_matches(word.lower(), list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _has(node: Any, part: str | int) -> bool:
    if isinstance(node, dict):
        return part in node
    return isinstance(node, list) and isinstance(part, int) and part < len(node)


def _key(loc: Sequence[str | int], tree: Any, *, missing: bool) -> Key:
    """The key in the file; pydantic's location also names union branches (`lora`, `str`)."""
    path: list[str | int] = []
    node = tree
    for index, part in enumerate(loc):
        if _has(node, part):
            node = node[part]
            path.append(part)
        elif missing and index == len(loc) - 1:
            path.append(part)
    return tuple(path)


def _sentence(key: Key, item: Any, tree: Any) -> tuple[Key, str]:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return key, _unknown(key, tree)
    if kind == "missing":
        return key, f"is required{_meaning(key, tree)}"
    if kind == "union_tag_not_found":
        return (*key, "kind"), f"is required: {' or '.join(METHODS)}"
    if kind == "union_tag_invalid":
        return (*key, "kind"), _not_one_of(context["tag"], list(METHODS))
    if kind == "literal_error":
        return key, _not_one_of(item["input"], _choices(key, tree))
    if kind == "string_too_short":
        return key, f"must not be empty{_meaning(key, tree)}"
    if kind in _LIMITS:
        words, limit = _LIMITS[kind]
        return key, f"must be {words} {context[limit]:.10g}, got {shown(item['input'])}"
    return key, f"{item['msg']}, got {shown(item['input'])}"


def _wrong_kind(key: Key, kinds: Sequence[str], value: Any) -> str:
    said = f"must be {' or '.join(dict.fromkeys(kinds))}, got {shown(value)}"
    if key == ("deepspeed",) and isinstance(value, str):
        return f"{said}; write the file as deepspeed: {{config: {value}}}"
    if kinds == ["text"] and isinstance(value, (bool, int, float)):
        return f"{said}; put it in quotes if it is meant"
    if isinstance(value, str) and kinds == ["a whole number"] and value.replace("_", "").isdigit():
        return f"{said}; write {int(value.replace('_', ''))}, without quotes"
    if isinstance(value, str) and kinds == ["true or false"]:
        return f"{said}; YAML 1.2 has no yes/no/on/off"
    return said


def _not_one_of(value: Any, choices: Sequence[Any]) -> str:
    said = f"must be one of {', '.join(map(str, choices))}; got {shown(value)}"
    if not isinstance(value, str):
        return said
    meant = nearest(value, [choice for choice in choices if isinstance(choice, str)])
    return f"{said}; did you mean {meant}?" if meant else said


def _choices(key: Key, tree: Any) -> list[Any]:
    """The values that the field at `key` allows."""
    *parents, name = [part for part in key if not isinstance(part, int)]
    model = model_at(tuple(parents), tree)
    annotation = model.model_fields[str(name)].annotation if model else None

    def literals(part: Any) -> list[Any]:
        inner = get_args(part)
        if all(not isinstance(value, type) and not get_args(value) for value in inner):
            return [value for value in inner if value is not None]
        return [value for option in inner for value in literals(option)]

    return literals(annotation)


def _unknown(key: Key, tree: Any) -> str:
    """Why a key is refused: of another method, of another section, or misspelt."""
    *parents, last = key
    name = str(last)
    model = model_at(tuple(parents), tree)
    names = list(model.model_fields) if model else []
    section = dotted(tuple(parents)) or "the top level"
    if parents == ["method"]:
        owners = [kind for kind, other in METHODS.items() if name in other.model_fields]
        if owners:
            chosen = tree["method"]["kind"]
            kinds = " or ".join(owners)
            return f"belongs to kind: {kinds}, but method.kind is {chosen}; remove one of the two"
    said = f"unknown key in {section}"
    if told := hint(tree, key):
        return f"{said}; {told}"
    meant = nearest(name, names)
    if told := _elsewhere(name, in_section=bool(parents)):
        return f"{said}; {told}"
    if meant:
        return f"{said}; did you mean {meant}?"
    return f"{said}; it has {', '.join(names)}" if names else said


def _elsewhere(name: str, *, in_section: bool) -> str | None:
    """Where an option of this name lives, or what became of it, also for names that other frameworks use."""
    places = {
        field: f"{section}.{field}"
        for section, info in RunConfig.model_fields.items()
        for model in _models_in(info.annotation)
        for field in model.model_fields
        if field not in ("format", "batch_size", "path", "kind")
    }
    theirs = told_of(name)
    if theirs and not in_section:  # a flat option: no configuration of ours has any
        return theirs
    if option := places.get(name) or ALSO_KNOWN_AS.get(name) or OWNED.get(name):
        return f"the option is {option}"
    if theirs or name in REFUSED:
        return theirs or REFUSED[name]
    is_argument = name in training_argument_names()
    return f"write it into training.extra, as {{{name}: …}}" if is_argument else None


def _meaning(key: Key, tree: Any) -> str:
    """What a missing key would say, from the field's own documentation."""
    if key == ("method",):
        return f": how the model is tuned, kind: {', '.join(METHODS)}"
    model = model_at(key[:-1], tree)
    info = model.model_fields.get(str(key[-1])) if model else None
    if info is None:
        return ""
    inner = _models_in(info.annotation)
    text = info.description or (inner[0].__doc__ if inner else None) or ""
    return ": " + text.split("\n")[0].split(";")[0].rstrip(".") if text else ""
