"""What a reader hands on: a row with its place, or the reason why there is none."""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One row as it was read."""

    value: dict[str, Any]
    where: str
    """`file:line`; for Parquet `file:row`, counted from 1."""


class BadRow(NamedTuple):
    """A row that cannot be used, and why."""

    where: str
    reason: str
    fatal: bool = False
    """What follows in the file cannot be read either, so `on_bad_row: skip` does not apply."""
