"""Every error that a user can cause says what is wrong, where, and what to do next."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import finetune.errors
from finetune.errors import FinetuneError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts" / "docs"))
import messages as catalogue_script  # noqa: E402

PLACED_BY_READER = frozenset({"StreamError", "ImageError"})
"""Caught where the file is read, which puts file and line in front."""
ERRORS = PLACED_BY_READER | {
    name
    for name, value in vars(finetune.errors).items()
    if isinstance(value, type) and issubclass(value, FinetuneError)
}
TO_DO = (
    "add|allow|begin|change|check|choose|convert|copy|correct|crop|decompress|define|delete|download|drop|evaluate|export|fetch|fix|free|"
    "freeze|give|install|keep|leave|look|lower|make|merge|move|name|open|pass|prepare|put|raise|remove|report|rename|resume|return|"
    "run|save|say|see|set|show|simplify|sample|start|take|train|try|type|unset|use|wait|write"
)
REMEDY = re.compile(
    rf"(?:^|[;:.,?(]\s+(?:please )?|\b(?:or|and|must|please|so|first|to do:) )(?:{TO_DO})\b"  # … ; copy it again
    r"|pip install|`finetune |must be |must end |is one of |such as |did you mean |nothing is to be done|` lists them|supported are ",
    flags=re.IGNORECASE | re.MULTILINE,
)
PLACE = re.compile(
    r"\{\}|--[a-z]|\b[A-Z]+_[A-Z_]+|finetune [a-z]|pip install|\b(?:data|training|model|method|evaluation|deepspeed)\.[a-z_]"
)
SAID_ELSEWHERE = {  # a place in front of words that another of these texts, or the library that was asked, has
    "{}: {}", "{}: image {}: {}", "image {}: {}", "{}:{}: {}", "{} is {}", "{} {}: {}", "--json-schema: {}",
    "evaluation options: {}", "--rows {}={}: {}", "{} holds no dialogue. {}", "it is too complex",
}  # fmt: skip
WITHOUT = {
    "evaluation/scoring.py:_in_parallel": "says again what another process met",
    "report/runs.py:read_run": "the problems of a configuration, whose rule has a test of its own",
    "report/requirements.py:check_requirements": "a result that was asked for, not a mistake",
    "data/reading/streams.py:_refuse_other_kinds": "each of the table it reads from says it",
    "chat/terminal.py:_make_room": "said in the chat, below the message",
    "chat/terminal.py:_switched": "said in the chat, below the message",
    "data/chat/layouts/glm45.py:_body": "every caller puts the row and the message in front",
    "chat/terminal.py:_checked_image": "said in the chat, below the message",
    "data/chat/layouts/glm4.py:_tools": "every caller puts the row in front",
    "data/chat/image.py:opened_image": "every caller puts the image's path in front",
    "generation/structured.py:_check": "every caller puts the schema's file in front",
    "export/shards.py:_read": "another program cuts the file off, which is the news",
    "generation/decoder.py:draw": "of the one model that is open",
}
"""Module:function -> why its errors say no place, or no next step."""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def helpers() -> dict[str, list[ast.FunctionDef]]:
    """The functions of the project that return text, by name."""
    found: dict[str, list[ast.FunctionDef]] = {}
    for path in (ROOT / "finetune").rglob("*.py"):
        for node in ast.walk(tree_of(path)):
            if (
                isinstance(node, ast.FunctionDef)
                and node.returns is not None
                and re.search("str|Error", ast.unparse(node.returns))
            ):
                found.setdefault(node.name, []).append(node)
    return found


def of_the_program() -> Iterator[tuple[str, str, list[str]]]:
    """Place, error and the texts that it may have; the functions that write them are followed."""
    for path in sorted((ROOT / "finetune").rglob("*.py")):
        tree = tree_of(path)
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                    name = ast.unparse(node.exc.func).split(".")[-1]
                    place = f"{path.relative_to(ROOT / 'finetune')}:{function.name}"
                    if name in ERRORS and place not in WITHOUT:
                        yield (
                            f"{place}:{node.lineno}",
                            name,
                            list(texts_of(node.exc.args[0], function)),
                        )


def texts_of(node: ast.expr, function: ast.FunctionDef, depth: int = 0) -> Iterator[str]:
    """What an expression may say: literals, names that stand for some, lists that are filled, helpers called."""
    yield from catalogue_script._texts_of(node, function)
    for part in ast.walk(node) if depth < 3 else ():
        if isinstance(part, ast.Name):
            for value in values_of(part.id, function):
                yield from texts_of(value, function, depth + 1)
        elif isinstance(part, ast.Call):
            for argument in part.args:
                yield from catalogue_script._texts_of(argument, function)
            for helper in helpers().get(ast.unparse(part.func).split(".")[-1], ()):
                for said in ast.walk(helper):
                    if isinstance(said, ast.Return | ast.Yield) and said.value is not None:
                        yield from texts_of(said.value, helper, depth + 1)


def values_of(name: str, function: ast.FunctionDef) -> Iterator[ast.expr]:
    """What is assigned, added or appended to a name."""
    for line in ast.walk(function):
        match line:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=target), attr="append"), args=[value]
            ):
                pass
            case ast.Assign(targets=[ast.Name(id=target)], value=value):
                pass
            case (
                ast.AugAssign(target=ast.Name(id=target), value=value)
                | ast.NamedExpr(target=ast.Name(id=target), value=value)
            ):
                pass
            case _:
                continue
        if target == name:
            yield value


Raised = list[tuple[str, str, list[str]]]


@pytest.fixture(scope="module")
def raised() -> Raised:
    found = list(of_the_program())
    places = {place.rpartition(":")[0] for place, _, _ in found}
    assert len(places) > 200
    return found


def test_every_error_says_what_to_do_next(raised: Raised) -> None:
    silent = {
        place: said
        for place, _, said in raised
        if not any(REMEDY.search(text) for text in said) and not set(said) & SAID_ELSEWHERE
    }
    assert silent == {}, "say it at the end: '…; correct the path'"


def test_every_error_names_the_place_or_the_option(raised: Raised) -> None:
    nowhere = {
        place: said
        for place, name, said in raised
        if name not in PLACED_BY_READER and not any(map(PLACE.search, said))
    }
    assert nowhere == {}, "name the file, the line, the option or the model"


def test_the_rule_tells_a_dead_end_from_a_way_on() -> None:
    for ends in (
        "{} cannot be read ({})",
        "{} is no picture: {}",
        "the loss of {} is high",
        "--x {}: no",
    ):
        assert not REMEDY.search(ends), ends
    for goes_on in (
        "{} cannot be read; copy it again",
        "{} is gone. Give another",
        "use {} or leave it out",
    ):
        assert REMEDY.search(goes_on), goes_on
    assert not PLACE.search("the file is not there; copy it again")
