"""Curves and the names of runs on the report's page."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from markupsafe import Markup

from finetune.report import charts, compare, plots


def test_a_picture_of_a_name_that_xml_has_no_place_for_is_painted() -> None:
    picture = plots._whole([Markup("<text>{}</text>").format("a\0b\x1b\ud800")], 30)
    assert "a\ufffdb\ufffd\ufffd" in picture
    assert plots.painted(picture).startswith(b"\x89PNG")


def test_a_curve_shows_its_intervals_where_all_are_known() -> None:
    known = [charts.Point(x, x, x - 1, x + 1) for x in (1.0, 2.0, 3.0)]
    drawn = charts.lines([charts.Series("a", 0, known)], title="t")
    assert drawn.count("<polygon") == 1
    [points] = re.findall(r'<polygon class="band c0" points="([^"]*)"', drawn)
    assert len(points.split()) == 6
    bare = [charts.Point(x, x) for x in (1.0, 2.0)]
    half = [charts.Point(1.0, 1.0, 0.5, None), charts.Point(2.0, 2.0, None, 2.5)]
    for points_of_one in (bare, half):
        assert "<polygon" not in charts.lines([charts.Series("a", 0, points_of_one)], title="t")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/a"], ["a"]),
        (["x/a", "x/b", "y/c"], ["a", "b", "c"]),
        (["x/a", "y/a", "y/b"], ["x-a", "y-a", "b"]),
    ],
)
def test_a_run_is_called_by_its_folder_and_those_above_where_two_have_one_name(
    paths: list[str], names: list[str]
) -> None:
    runs: list[Any] = [SimpleNamespace(path=Path("/r") / path) for path in paths]
    assert [compare._name(run, runs) for run in runs] == names
