"""What the product holds is used by the product: tests alone keep no code alive."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.security_code import SOURCES

CALLED_FROM_OUTSIDE = {
    "ignore_aliases": "PyYAML asks it of a dumper",
    "readable": "io asks it of a raw stream",
    "convert_to_native_format": "transformers asks it of a tokenizer",
    "GLM4VAsTrained": "vLLM finds it by its name",
    "visit_Name": "ast calls it by its name",
}
"""Names that a library calls, where the class does not show it."""


def names_used(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2]
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 80
        ):
            yield from re.findall(r"\w+", node.value)  # getattr, entry points, columns of a table


def definitions(tree: ast.Module) -> Iterator[str]:
    """Functions and classes that nothing outside is known to call: no decorator, no foreign base."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def is_hooked(node: ast.AST) -> bool:
        """Whether a class, or one that it comes from, has a base from elsewhere, which may call it."""
        bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
        return any(base not in classes or is_hooked(classes[base]) for base in bases)

    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if not (child.name.startswith("__") or child.decorator_list or is_hooked(node)):
                yield child.name


def unused(sources: dict[str, str]) -> list[str]:
    trees = {name: ast.parse(text) for name, text in sources.items()}
    uses = Counter(name for tree in trees.values() for name in names_used(tree))
    return [
        f"{path}: {name}"
        for path, tree in trees.items()
        for name in definitions(tree)
        if not uses[name] and name not in CALLED_FROM_OUTSIDE
    ]


def test_every_function_of_the_product_is_used_by_the_product() -> None:
    assert unused({str(path): path.read_text(encoding="utf-8") for path in SOURCES}) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(): ...\nf()", []),
        ("def f(): ...", ["x: f"]),
        ("class A:\n    def m(self): ...\nA()", ["x: m"]),
        ("class A(Trainer):\n    def m(self): ...\nA()", []),
        ("@app.command()\ndef f(): ...", []),
        ("def f(): ...\ngetattr(x, 'f')", []),
    ],
)
def test_a_function_that_nothing_uses_is_found(text: str, found: list[str]) -> None:
    assert unused({"x": text}) == found


def test_no_public_class_has_the_name_of_another_thing() -> None:
    homes: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(Path(path).name)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
