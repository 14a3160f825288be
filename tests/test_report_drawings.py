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


def drawn(*series: charts.Series) -> str:
    return str(charts.lines(series, title="loss"))


def line(style: str = "line", name: str = "a", **points: Any) -> charts.Series:
    return charts.Series(name, 2, [charts.Point(*values) for values in points["points"]], style)


def attributes(picture: str, tag: str) -> list[dict[str, str]]:
    return [dict(re.findall(r'([\w-]+)="([^"]*)"', found)) for found in re.findall(rf"<{tag} ([^>]*)>", picture)]  # fmt: skip


def corners(text: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in text.split()]  # type: ignore[misc]


def test_a_point_lies_where_its_step_and_its_score_say() -> None:
    picture = drawn(line(points=[(0, 0.0), (50, 5.0), (100, 10.0)]))
    dots = [(float(dot["cx"]), float(dot["cy"])) for dot in attributes(picture, "circle")]
    width, height = 360 - 40 - 12, 220 - 10 - 26
    # 3 % of the steps stay free on both sides, 8 % of the scores above; a score of 0 lies on the axis.
    assert dots == [
        (pytest.approx(40 + width * part, abs=0.1), pytest.approx(194 - height * up, abs=0.1))
        for part, up in ((3 / 106, 0), (53 / 106, 5 / 10.8), (103 / 106, 10 / 10.8))
    ]
    [curve] = attributes(picture, "polyline")
    assert corners(curve["points"]) == dots


@pytest.mark.parametrize(
    ("values", "bottom"), [((4.0, 10.0), 3.52), ((3.0, 10.0), 0.0), ((-1.0, 10.0), -1.88), ((5.0, 5.0), 4.5), ((0.0, 0.0), 0.0)]
)  # fmt: skip
def test_the_axis_begins_at_0_where_that_wastes_no_room(
    values: tuple[float, float], bottom: float
) -> None:
    points = [charts.Point(n, value) for n, value in enumerate(values)]
    assert charts._frame([charts.Series("a", 0, points)]).y0 == pytest.approx(bottom)


def test_a_band_runs_along_the_upper_ends_and_back_along_the_lower_ones() -> None:
    picture = drawn(line(points=[(0, 5, 4, 6), (1, 5, 3, 7), (2, 5, 4, 8)]))
    [band] = [one for one in attributes(picture, "polygon") if "band" in one["class"]]
    places = corners(band["points"])
    assert [x for x, _ in places] == sorted(x for x, _ in places)[:6:2] + sorted((x for x, _ in places), reverse=True)[:6:2]  # fmt: skip
    highs, lows = places[:3], places[:2:-1]
    assert all(high < low for (_, high), (_, low) in zip(highs, lows, strict=True))
    assert [y for _, y in highs] == sorted((y for _, y in highs), reverse=True), "6, 7, 8 rise"


def test_levels_cross_the_panel_and_one_point_has_a_whisker() -> None:
    picture = drawn(line("level", points=[(0, 5, 4, 6)]), line(points=[(10, 4), (20, 6)]))
    [level] = [one for one in attributes(picture, "line") if "level" in one["class"]]
    assert (level["x1"], level["x2"], level["y1"]) == ("40", "348", level["y2"])
    [band] = attributes(picture, "polygon")
    assert {x for x, _ in corners(band["points"])} == {40.0, 348.0}
    dots = attributes(picture, "circle")
    assert float(dots[0]["cx"]) < 60, "the level's own step 0 does not widen the axis"
    alone = drawn(line(points=[(10, 5, 4, 6)]))
    [whisker] = [one for one in attributes(alone, "line") if "whisker" in one["class"]]
    assert whisker["x1"] == whisker["x2"]
    assert float(whisker["y1"]) > float(whisker["y2"])
    assert "<polygon" not in alone


def test_what_is_no_number_is_not_drawn_and_thin_curves_have_no_dots() -> None:
    picture = drawn(line(points=[(0, 1.0), (1, float("nan")), (2, 3.0)]))
    assert len(attributes(picture, "circle")) == 2
    assert len(corners(attributes(picture, "polyline")[0]["points"])) == 2
    assert "<circle" not in drawn(line("thin", points=[(0, 1.0), (1, 2.0)]))
    assert drawn(line(points=[])) == ""


def test_a_chart_is_described_in_words() -> None:
    picture = drawn(line(points=[(0, 3.0), (9, 1.5)]), line("level", "base", points=[(0, 2.0)]))
    assert 'aria-label="loss over steps. a: 3 to 1.5; base: 2"' in picture
    titles = re.findall("<title>([^<]*)</title>", drawn(line(points=[(0, 3.0, 2.5, 3.25), (9, 1.5)])))  # fmt: skip
    assert titles == ["a, 0: 3 (2.5 to 3.25)", "a, 9: 1.5"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.25, "0.25"), (40.0, "40"), (9999, "9999"), (10_000, "10k"), (12_345, "12.3k"), (-20_000, "-20k")],
)  # fmt: skip
def test_a_number_on_an_axis_is_short(value: float, text: str) -> None:
    assert charts.short(value) == text


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0, 52, [0, 20, 40]), (0, 50, [0, 10, 20, 30, 40, 50]), (3, 3, [3]), (0.1, 0.35, [0.1, 0.15, 0.2, 0.25, 0.3, 0.35]),
        (-7, 5.5, [-5, -2.5, 0, 2.5, 5]), (-7, 6, [-5, 0, 5]),
    ],
)  # fmt: skip
def test_ticks_are_few_round_and_inside(low: float, high: float, found: list[float]) -> None:
    assert charts.ticks(low, high) == found
    assert charts.ticks(0, 2, whole=True) == [0, 1, 2]


def test_bars_stand_between_their_edges_with_the_outline_over_them() -> None:
    picture = str(charts.histogram([0, 10, 20], [4, 8], [2, 0], title="t", colour=3))
    bars = attributes(picture, "rect")
    base, tall = 194.0, 184 / 1.05
    assert [float(bar["height"]) for bar in bars] == [pytest.approx(tall / 2, abs=0.2), pytest.approx(tall, abs=0.2)]  # fmt: skip
    assert [float(bar["y"]) + float(bar["height"]) for bar in bars] == [
        pytest.approx(base, abs=0.1)
    ] * 2
    assert [bar["class"] for bar in bars] == ["bar c3"] * 2
    [outline] = attributes(picture, "polyline")
    places = corners(outline["points"])
    assert len(places) == 6
    assert places[0] == (40.0, base)
    assert places[-1] == (348.0, base)
    assert places[1][1] == places[2][1] < base == places[3][1]
    assert re.findall("<title>([^<]*)</title>", picture) == ["0 to 10: 4", "10 to 20: 8"]
