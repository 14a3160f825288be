"""Python source -> small mistakes that somebody could have made in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple


class Mistake(NamedTuple):
    """A text of the source and what stands there instead."""

    line: int
    column: int
    """In bytes, as `ast` counts."""
    old: str
    new: str


COMPARED: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Lt: ("<=", ">"),
    ast.LtE: ("<", ">="),
    ast.Gt: (">=", "<"),
    ast.GtE: (">", "<="),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
}
COMPUTED: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
ORDERED = {"isinstance", "issubclass", "hasattr", "getattr", "cast"}
"""Calls whose arguments nobody swaps: it would fail wherever it is reached."""
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "sum": "max"}


def mistakes(source: str) -> list[Mistake]:
    """Turned comparisons, signs and flags, conditions turned or left out, numbers off by one, other keys, swapped arguments, calls left out."""
    found = dict.fromkeys(_Finder(source).found())
    return sorted(found)


class _Finder:
    def __init__(self, source: str) -> None:
        self._lines = source.encode().splitlines(keepends=True)
        self._tree = ast.parse(source)
        self._keys = sorted(set(_keys(self._tree)))

    def found(self) -> Iterator[Mistake]:
        skipped = self._not_code()
        for node in ast.walk(self._tree):
            if id(node) not in skipped:
                yield from self._of(node)

    def _not_code(self) -> set[int]:
        """Annotations, decorators, and what only types or texts are made of."""
        roots: list[ast.AST | None] = []
        for node in ast.walk(self._tree):
            match node:
                case ast.AnnAssign(annotation=annotation) | ast.arg(annotation=annotation):
                    roots.append(annotation)
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    roots += [node.returns, *node.decorator_list]
                case ast.ClassDef():
                    roots += node.decorator_list
                case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.JoinedStr():
                    roots.append(node)
        return {id(inner) for root in roots if root is not None for inner in ast.walk(root)}

    def _of(self, node: ast.AST) -> Iterator[Mistake]:  # noqa: C901 - a table of kinds
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                for symbol in COMPARED[type(op)]:
                    yield self._put(node, f"{self._text(left)} {symbol} {self._text(right)}")
            case ast.BoolOp(op=op, values=values):
                word, other = (" and ", " or ")[:: 1 if isinstance(op, ast.And) else -1]
                texts = [self._text(value) for value in values]
                yield self._put(node, other.join(texts), closed=True)
                for left_out in range(len(texts)):
                    kept = [text for place, text in enumerate(texts) if place != left_out]
                    yield self._put(node, word.join(kept), closed=True)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield self._put(node, self._text(operand), closed=True)
            case ast.BinOp(left=left, op=op, right=right) if _is_number(node):
                yield self._put(
                    node,
                    f"{self._text(left)} {COMPUTED[type(op)][1]} {self._text(right)}",
                    closed=True,
                )
            case ast.AugAssign(target=target, op=op, value=value) if type(op) in COMPUTED:
                yield self._put(
                    node, f"{self._text(target)} {COMPUTED[type(op)][1]}= {self._text(value)}"
                )
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                if not isinstance(test, ast.Compare | ast.Constant):
                    yield self._put(test, f"not ({self._text(test)})", closed=True)
            case ast.Constant(value=bool() as value):
                yield self._put(node, str(not value))
            case ast.Constant(value=int() as value):
                yield self._put(node, str(value + 1))
            case ast.Expr(value=ast.Call(func=function)):
                if not self._text(function).startswith(("logger.info", "logger.debug")):
                    yield self._put(node, "pass")
            case ast.Call(func=ast.Name(id=name) as function) if name in NAMES:
                yield self._put(function, NAMES[name])
            case ast.Call(
                args=[
                    ast.Name() | ast.Attribute() as one,
                    ast.Name() | ast.Attribute() as two,
                    *rest,
                ]
            ) if self._text(node.func) not in ORDERED and self._text(one) != self._text(two):
                given = [self._text(two), self._text(one), *map(self._text, rest)]
                given += [self._keyword(keyword) for keyword in node.keywords]
                yield self._put(node, f"{self._text(node.func)}({', '.join(given)})")
            case ast.Subscript(slice=ast.Constant(value=str(key)) as place):
                yield from self._another_key(place, key)
            case ast.Call(
                func=ast.Attribute(attr="get"), args=[ast.Constant(value=str(key)) as place, *_]
            ):
                yield from self._another_key(place, key)

    def _another_key(self, node: ast.Constant, key: str) -> Iterator[Mistake]:
        """The next key that the module reads anywhere."""
        if len(self._keys) > 1:
            following = self._keys[(self._keys.index(key) + 1) % len(self._keys)]
            yield self._put(node, repr(following).replace("'", '"'))

    def _keyword(self, keyword: ast.keyword) -> str:
        value = self._text(keyword.value)
        return f"{keyword.arg}={value}" if keyword.arg else f"**{value}"

    def _text(self, node: ast.expr | ast.stmt) -> str:
        """Its source; `ast.get_source_segment` would split the whole source each time."""
        first, *others = self._lines[node.lineno - 1 : node.end_lineno]
        if not others:
            return first[node.col_offset : node.end_col_offset].decode()
        whole = [first[node.col_offset :], *others[:-1], others[-1][: node.end_col_offset]]
        return b"".join(whole).decode()

    def _put(self, node: ast.AST, new: str, *, closed: bool = False) -> Mistake:
        place = node if isinstance(node, ast.expr | ast.stmt) else None
        assert place is not None
        new = f"({new})" if closed else new
        return Mistake(place.lineno, place.col_offset, self._text(node), new)


def _keys(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(slice=ast.Constant(value=str(key))):
                yield key
            case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=str(key)), *_]):
                yield key


def _is_number(node: ast.BinOp) -> bool:
    """Whether numbers are computed: of joined texts and of paths another sign is no mistake, only noise."""
    sides = (node.left, node.right)
    is_text = any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in sides
    )
    names = [side.id for side in sides if isinstance(side, ast.Name)]
    is_path = isinstance(node.op, ast.Div) and any(name.isupper() for name in names)
    return type(node.op) in COMPUTED and not is_text and not is_path
