"""LLaMA-Factory's registered data sets (`dataset_info.json`) -> sources of ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import ConfigError
from finetune.storage.given import read_given_json

FILL_IN = "FILL-IN"
"""Stands where the old file does not say something that is needed."""


class Register(NamedTuple):
    """A dataset_info.json."""

    folder: Path
    """Where it lies; its file names are seen from there."""
    entries: Mapping[str, Any]
    """Name -> what is said of the data set."""


def read_register(folder: str, beside: Path) -> Register:
    """The register in a folder, seen from the working directory or from `beside`; empty without one.

    Raises:
        ConfigError: It is there and is no JSON object.
    """
    for file in (Path(folder, "dataset_info.json"), beside / folder / "dataset_info.json"):
        if not file.is_file():
            continue
        entries = read_given_json(file, str(file))
        if not isinstance(entries, Mapping):
            raise ConfigError(
                f"{file} is not an object of names and data sets; correct or remove it"
            )
        return Register(file.parent, entries)
    return Register(Path(folder), {})


def source_of(name: Any, register: Register, left: dict[str, str]) -> Any:
    """The source for a registered data set, or FILL_IN; `left` gets what is not taken, and why."""
    entry = register.entries.get(name) if isinstance(name, str) else None
    if not isinstance(entry, Mapping):
        left[f"dataset {name}"] = "not in a dataset_info.json that is here: write its file"
        return FILL_IN
    if entry.get("ranking"):
        left[f"dataset {name}"] = "preference data; this program does supervised fine-tuning"
    if not entry.get("file_name"):
        schemes = {"hf": entry.get("hf_hub_url"), "ms": entry.get("ms_hub_url")}
        there = [f"{scheme}://{location}" for scheme, location in schemes.items() if location]
        if not there:
            left[f"dataset {name}"] = "is made by a script: write its rows into a file"
            return FILL_IN
        source: dict[str, Any] = {"path": there[0]}
    else:
        source = {"path": os.path.normpath(register.folder / str(entry["file_name"]))}
    formatting = entry.get("formatting", "alpaca")
    source["format"] = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}.get(
        str(formatting), "auto"
    )
    ours = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "messages": "conversations",
    }
    columns = {
        ours.get(theirs, theirs): column
        for theirs, column in _mapping(entry.get("columns")).items()
        if ours.get(theirs, theirs) != column
    }
    if columns:
        source["columns"] = columns
    odd = {k: v for k, v in _mapping(entry.get("tags")).items() if v not in _READ_TAGS}
    if odd:
        left[f"dataset {name}: tags"] = f"{odd} are not read; rename them in the file"
    return source if source.keys() - {"path"} else source["path"]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


_READ_TAGS = frozenset(
    {
        *("role", "from", "content", "value", "user", "human", "assistant", "gpt", "system"),
        *("observation", "tool", "function_call", "tool_call"),
    }
)
