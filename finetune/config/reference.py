"""What there is to configure, for editors (JSON Schema) and for people (a page)."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from finetune.config.schema import RunConfig
from finetune.language import word

_PREAMBLE = """# Every option of a configuration

[简体中文](config_zh.md)

Made from `finetune/config/schema.py` by `finetune schema --markdown > docs/config.md`, with `FINETUNE_LANG=zh` in Chinese; a test holds them together.

* A configuration is one YAML mapping with the sections below; a key that is not on this page is refused.
* Any option can be overridden on the command line, `section.key=value`, with the value typed as in YAML:
  `training.learning_rate=5e-4`, `data.train='[a.jsonl, b.jsonl]'`, `deepspeed=null`. The last one wins.
* `method.kind=…` on the command line leaves out the file's options of the other method, and says so.
* Relative paths are relative to the working directory. Environment variables and `~` are not expanded.
* Numbers and words follow YAML 1.2: `5e-4` is a number, `yes` is text. Anchors, aliases, tags, duplicate keys
  and several documents in one file are refused.
* `finetune schema` prints the JSON Schema; editors complete and check with the line
  `# yaml-language-server: $schema=…` at the head of a file.
"""


_WORDS = ("text", "integer", "number", "true/false", "anything", "list of {}", "mapping", "or", "required",
    "option", "type", "default", "meaning", "It has no options of its own.")  # fmt: skip


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file."""
    schema = RunConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def reference_page() -> str:
    """Every section and option as Markdown: name, type, default, meaning."""
    parts = [word(_PREAMBLE.strip()) + "\n"]
    for name, info in RunConfig.model_fields.items():
        for model in _models_in(info.annotation):
            parts.append(_section(name, model, info))
            for inner_name, inner in _inner_models(model):
                parts.append(_section(f"{name}.{inner_name}", inner, None))
    return "\n".join(parts)


def texts() -> Iterator[str]:
    """What the page says in words, so that it can be said in another language."""
    yield _PREAMBLE.strip()
    yield from _WORDS
    for info in RunConfig.model_fields.values():
        for model in _models_in(info.annotation):
            yield from _texts_of(model, info)
            for _, inner in _inner_models(model):
                yield from _texts_of(inner, None)


def option_keys() -> list[str]:
    """`section.key` of every option, of all methods."""
    found = [
        f"{name}.{field}"
        for name, info in RunConfig.model_fields.items()
        for model in _models_in(info.annotation)
        for field in model.model_fields
    ]
    return list(dict.fromkeys(found))


def _texts_of(model: type[BaseModel], info: FieldInfo | None) -> Iterator[str]:
    found = [(model.__doc__ or "").split("\n")[0], info.description if info else None]
    found += [details.description for details in model.model_fields.values()]
    yield from (text for text in found if text)


def _section(name: str, model: type[BaseModel], info: FieldInfo | None) -> str:
    kind = model.model_fields.get("kind")
    title = f"`{name}`" + (f", `kind: {kind.default}`" if kind else "")
    lines = [f"## {title}", "", word((model.__doc__ or "").split("\n")[0])]
    if info is not None and info.description:
        lines += ["", word(info.description)]
    heads = " | ".join(word(each) for each in ("option", "type", "default", "meaning"))
    lines += ["", f"| {heads} |", "|---|---|---|---|"]
    for field, details in model.model_fields.items():
        if field == "kind":
            continue
        row = [f"`{field}`", _type(details), _default(details), word(details.description or "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    if len(lines) and lines[-1].startswith("|---"):
        lines[-2:] = [word("It has no options of its own.")]
    return "\n".join([*lines, ""])


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _inner_models(model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """Models inside a section, each under the first field that holds it."""
    seen: dict[type[BaseModel], str] = {}
    for name, info in model.model_fields.items():
        for inner in _models_in(info.annotation):
            seen.setdefault(inner, name)
    return [(name, inner) for inner, name in seen.items()]


def _type(info: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(limit, name):.10g}"
        for limit in _metadata(info.annotation, info.metadata)
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if getattr(limit, name, None) is not None
    ]
    return " ".join([_spelled(info.annotation), ", ".join(limits)]).strip()


def _metadata(annotation: Any, metadata: list[Any]) -> list[Any]:
    """Limits of a field, also of `Annotated[int, …] | None`; those inside a Field() count too."""
    found = [limit for entry in metadata for limit in getattr(entry, "metadata", [entry])]
    for part in get_args(annotation):
        if hasattr(part, "__metadata__"):
            found += _metadata(None, list(part.__metadata__))
    return found


def _spelled(annotation: Any) -> str:
    names = {str: "text", int: "integer", float: "number", bool: "true/false", Any: "anything"}
    if annotation in names:
        return word(names[annotation])
    if hasattr(annotation, "__metadata__"):
        return _spelled(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    inner = [part for part in get_args(annotation) if part is not NoneType]
    if get_origin(annotation) is Literal:
        return f" {word('or')} ".join(f"`{value}`" for value in inner)
    if get_origin(annotation) is list:
        each = _spelled(inner[0])
        return word("list of {}").format(f"({each})" if get_args(inner[0]) else each)
    if get_origin(annotation) is dict:
        return word("mapping")
    return f" {word('or')} ".join(_spelled(part) for part in inner)


def _default(info: FieldInfo) -> str:
    if info.default is PydanticUndefined:
        return f"**{word('required')}**"
    if info.default is None:
        return "–"
    if isinstance(info.default, bool):
        return f"`{str(info.default).lower()}`"
    return f"`{info.default}`".replace("'", "")
