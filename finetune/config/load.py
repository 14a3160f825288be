"""A YAML file and overrides -> RunConfig, and back; every problem in one message.

Relative paths in a configuration are relative to the working directory, and stay as they are written;
environment variables are never expanded, so that a saved configuration holds no secret of a machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune import launcher
from finetune.config.migrate import Program, program_of
from finetune.config.problems import METHODS, findings
from finetune.config.reference import json_schema, reference_page
from finetune.config.rules import broken_rules, without_effect
from finetune.config.schema import RunConfig
from finetune.config.yaml_text import (
    Document,
    Key,
    Place,
    Problem,
    dotted,
    kind_of,
    parse,
    parse_file,
    resolve,
)
from finetune.errors import ConfigError

__all__ = [
    "Loaded", "config_tree", "dump_config", "json_schema", "load", "load_config", "load_mapping",
    "reference_page", "settled",
]  # fmt: skip

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Loaded:
    """A configuration, and what a user may want to know about how it came about."""

    config: RunConfig
    notes: tuple[str, ...]
    document: Document

    def problem(self, key: Key, said: str) -> str:
        """A sentence about an option, with the place where it was given: `x.yaml:4: data.train: …`."""
        return str(_located(self.document, key, said))


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a file with `section.key=value` overrides; ConfigError lists all problems."""
    return load(path, overrides).config


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """`load_config` with notes about options that were left out or have no effect."""
    path = Path(path)
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a name that is too long
        raise ConfigError(_not_there(path))
    return _loaded(parse_file(path), overrides)


def load_mapping(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Loaded:
    """`load` of sections that are a mapping already, as a file of them would be read."""
    text = yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return _loaded(parse(text, "config"), overrides)


def _loaded(document: Document, overrides: Sequence[str]) -> Loaded:
    if not document.whole:
        raise _error(document.problems)
    notes = _apply(document, overrides)
    for section, value in document.value.items():
        if value is None and section in ("data", "evaluation", "method", "model", "training"):
            document.value[section] = {}  # a section whose every line is commented out
    config = _validated(document)
    if config is None:
        raise _error(document.problems, program_of(document.value))
    notes += [str(_located(document, key, said)) for key, said in without_effect(document.value)]
    return Loaded(config, tuple(notes), document)


def config_tree(config: RunConfig) -> dict[str, Any]:
    """Every option's value by section; a file of it, as JSON or YAML, gives an equal configuration."""
    tree = config.model_dump()
    if config.deepspeed is not None and config.deepspeed.config is not None:
        tree["deepspeed"] = {"config": config.deepspeed.config}
    return tree


def dump_config(config: RunConfig) -> str:
    """YAML with every option's value; `load_config` of it gives an equal configuration."""
    tree = config_tree(config)
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return (
        f"# Every option of the run; paths are relative to the directory it was started in.\n{text}"
    )


def settled(config: RunConfig, world: int | None = None) -> RunConfig:
    """The configuration with `training.tokens_per_step` said as forward passes a step.

    4 processes that each take one row of 4,096 tokens at a time need 4 passes for 65,536.

    Raises:
        ConfigError: Rows cannot be shared out over so many processes.
    """
    training = config.training
    world = launcher.world_size() if world is None else world
    sharing = training.sequence_parallel
    if world % sharing:
        raise ConfigError(
            f"training.sequence_parallel is {sharing}, and the number of processes, {world}, is not a "
            f"multiple of it: start {sharing} or more (torchrun --nproc_per_node={sharing}; of a plan: "
            f"--gpus {sharing})"
        )
    if training.tokens_per_step is None:
        return config
    at_once = training.batch_size * config.data.max_length * world // sharing
    passes = max(1, round(training.tokens_per_step / at_once))
    changes = {"gradient_accumulation_steps": passes, "tokens_per_step": None}
    return config.model_copy(update={"training": training.model_copy(update=changes)})


class _Dumper(yaml.SafeDumper):
    """Quotes text that we would read back as something else, such as the word `5e-4`."""

    def ignore_aliases(self, data: Any) -> bool:
        """Writes equal values out, as we refuse aliases."""
        return True

    def represent_text(self, text: str) -> yaml.Node:
        """A scalar that `resolve` gives back as text."""
        style = None if isinstance(resolve(text), str) else "'"
        if not text.isprintable():
            style = '"'  # PyYAML would fold a line separator such as U+0085 into a blank
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _validated(document: Document) -> RunConfig | None:
    """The checked configuration, or None with the problems added to the document."""
    found = list(broken_rules(document.value))
    config = None
    try:
        config = RunConfig.model_validate(document.value, strict=True)
    except ValidationError as error:
        found = findings(error, document.value) + found
    known = {problem.key for problem in document.problems}
    for key, said in found:
        if not any(key[:length] in known for length in range(1, len(key) + 1)):
            document.problems.append(_located(document, key, said))
    return None if document.problems else config


def _located(document: Document, key: Key, said: str) -> Problem:
    """A sentence with the place of its key, or of the nearest section around it."""
    for length in range(len(key), 0, -1):
        if key[:length] in document.places:
            return Problem(document.places[key[:length]], key, said)
    return Problem(document.places.get((), Place(COMMAND_LINE)), key, said)


def _apply(document: Document, overrides: Sequence[str]) -> list[str]:
    """Writes the overrides into the document; gives notes about what they displaced."""
    notes: list[str] = []
    for override in overrides:
        name, sign, text = override.partition("=")
        key: Key = tuple(name.strip().split("."))
        if not sign or not all(key):
            said = f"`{override}` is not of the form section.key=value"
            document.problems.append(Problem(Place(COMMAND_LINE), (), said))
            continue
        value = parse(text, COMMAND_LINE, numbered=False)
        document.problems += [
            Problem(problem.place, key + problem.key, problem.text) for problem in value.problems
        ]
        if not value.whole:
            continue
        if key == ("method", "kind"):
            notes += _leave_out_other_method(document, value.value)
        _put(document, key, value)
    return notes


def _put(document: Document, key: Key, value: Document) -> None:
    """Sets one key; sections on the way are made when they are not there."""
    node = document.value
    for length, part in enumerate(key[:-1], start=1):
        if node.get(part) is None:
            node[part] = {}
            document.places[key[:length]] = Place(COMMAND_LINE)
        node = node[part]
        if not isinstance(node, dict):
            said = f"{dotted(key[:length])} is {kind_of(node)}, without keys; replace it as a whole"
            document.problems.append(Problem(Place(COMMAND_LINE), key, said))
            return
    node[key[-1]] = value.value
    for other in [other for other in document.places if other[: len(key)] == key]:
        del document.places[other]
    document.places[key] = Place(COMMAND_LINE)
    document.places |= {key + inner: place for inner, place in value.places.items()}


def _leave_out_other_method(document: Document, kind: Any) -> list[str]:
    """Another method.kind on the command line: the file's options of its own kind go, with a note."""
    section = document.value.get("method")
    kinds = (section.get("kind"), kind) if isinstance(section, dict) else ()
    known = [METHODS[one].model_fields for one in kinds if isinstance(one, str) and one in METHODS]
    if len(known) < 2:
        return []
    before, after = known
    gone = [
        name
        for name in section
        if name in before and name not in after and _of_file(document, ("method", name))
    ]
    for name in gone:
        del section[name]
    if not gone:
        return []
    names = ", ".join(f"method.{name}" for name in gone)
    return [f"method.kind={kind} on the command line: {names} of the file left out"]


def _of_file(document: Document, key: Key) -> bool:
    return document.places[key].line is not None


def _not_there(path: Path) -> str:
    siblings = []
    if path.parent.is_dir():
        siblings = [file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml")]
    meant = get_close_matches(path.name, siblings, n=1)
    said = f"{path}: no such file (working directory {Path.cwd()})"
    return (
        f"{said}; did you mean {path.parent / meant[0]}?" if meant else f"{said}; correct the path"
    )


def _error(problems: Sequence[Problem], program: Program | None = None) -> ConfigError:
    """All problems, those of the file first, line by line; and the way from another program's file."""
    ordered = sorted(
        problems,
        key=lambda problem: (problem.place.line is None, problem.place.line or 0),
    )
    if len(ordered) == 1:
        return ConfigError(str(ordered[0]))
    lines = "\n".join(f"  {problem}" for problem in ordered)
    said = f"{len(ordered)} problems in the configuration:\n{lines}"
    if program is not None:
        file = ordered[0].place.name
        said += (
            f"\n{file} looks like a configuration of {program.name}; "
            f"`finetune migrate {file} --output new.yaml` writes it as one of this program"
        )
    return ConfigError(said)
