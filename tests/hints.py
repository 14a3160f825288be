"""What texts of the product tell a user to set, and which texts of a room do."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from finetune.data.dialogue.conversation import RowError
from finetune.errors import FinetuneError

PRODUCT = Path(__file__).resolve().parent.parent / "finetune"
VALUES = "merge|read|drop|skip|require|weights|near|first|auto|never"
OPTION = re.compile(
    r"(?<![\w./-])(?:data|training|model|method|deepspeed|evaluation)(?:\.[a-z][a-z0-9_]+){1,2}(?![\w/(])"
    rf"(?:: (?:{VALUES})\b)?|(?<![\w-])--[a-z][a-z_-]*|FINETUNE_[A-Z]+"
)
FILES = ("data.json", "model.safetensors", "model.safetensors.index", "evaluation.json")


def options(text: str) -> set[str]:
    """The options that a text names, each with the value that it is to have if one is said."""
    return {name.replace(": ", ":") for name in OPTION.findall(text) if name not in FILES}


def said(call: Callable[..., Any], *given: Any, **named: Any) -> str:
    """The text of the error that a call ends in."""
    with pytest.raises((FinetuneError, RowError)) as caught:
        call(*given, **named)
    return str(caught.value)


def unsaid(room: str, texts: Iterable[str], *, but: Iterable[str] = ()) -> list[str]:
    """Places of a room whose texts name an option and are part of none of `texts`."""
    known = list(texts)
    missing = []
    for path in sorted((PRODUCT / room).rglob("*.py")):
        if path.name in but:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        told = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
                is_message = id(node) not in told and " " in text and options(text)
                if is_message and not any(text in one for one in known):
                    missing.append(f"{path.relative_to(PRODUCT)}:{node.lineno}: {text!r:.90}")
    return missing
