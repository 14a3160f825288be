"""Data, images, paths and configurations that are odd or broken; control strings; numbers and memory that run out."""

from __future__ import annotations

from pathlib import Path

from tests.reliability import (
    input_controls,
    input_files,
    input_images,
    input_limits,
    input_paths,
    input_properties,
    input_yaml,
)
from tests.reliability.frame import Case
from tests.reliability.places import prepare

PARTS = (
    input_files,
    input_images,
    input_paths,
    input_yaml,
    input_controls,
    input_properties,
    input_limits,
)


def cases(folder: Path, subset: bool, stock: bool, groups: tuple[str, ...]) -> list[Case]:
    """All of them; the subset has every third."""
    if stock:
        prepare(folder)
        return list(input_controls.stock_cases())
    prepare(folder)
    found = [case for part in PARTS for case in part.cases()]
    return found[::3] if subset else found
