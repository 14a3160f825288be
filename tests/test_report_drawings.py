"""Curves and the names of runs on the report's page."""

from __future__ import annotations

import io
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
    exact = drawn(line(points=[(0, 4, 0, 6), (1, 6, 4, 6), (2, 0, 0, 4)]))
    at = {value: float(dot["cy"]) for value, dot in zip((4, 6, 0), attributes(exact, "circle"), strict=True)}  # fmt: skip
    [band] = attributes(exact, "polygon")
    upper, lower = (6, 6, 4), (0, 4, 0)
    assert [y for _, y in corners(band["points"])] == [at[one] for one in (*upper, *lower[::-1])]


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
    odd = drawn(line(points=[(0, float("nan"), 1.0), (1, 1.0, float("-inf"), 2.0), (2, 3.0)]))
    assert len(attributes(odd, "circle")) == 2
    assert "nan" not in re.sub('<title>.*?</title>|aria-label="[^"]*"', "", odd)
    low = drawn(line(points=[(0, 5.0, -5.0, 6.0), (1, 5.0, 4.0, 6.0)]))
    assert texts(low, "tick end")[0][2] == "-5", "the ends of intervals are inside, too"


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
        (-7, 5.5, [-5, -2.5, 0, 2.5, 5]), (-7, 6, [-5, 0, 5]), (1.1, 1.6, [1.1, 1.2, 1.3, 1.4, 1.5, 1.6]),
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


def texts(picture: str, kind: str) -> list[tuple[float, float, str]]:
    """Place and words of the texts of a class."""
    found = re.findall(rf'<text class="{kind}" x="([^"]*)" y="([^"]*)">([^<]*)</text>', picture)
    return [(float(x), float(y), said) for x, y, said in found]


def test_the_axes_say_where_a_point_of_that_step_and_that_score_lies() -> None:
    picture = drawn(line(points=[(0, 0.0), (10, 5.0), (20, 10.0)]))
    places = [(float(dot["cx"]), float(dot["cy"])) for dot in attributes(picture, "circle")]
    steps, scores = texts(picture, "tick mid"), texts(picture, "tick end")
    assert [said for *_, said in steps] == ["0", "5", "10", "15", "20"]
    assert [said for *_, said in scores] == ["0", "2.5", "5", "7.5", "10"]
    assert [x for x, _, said in steps if said in ("0", "10", "20")] == [x for x, _ in places]
    assert {y for _, y, _ in steps} == {210.0}
    whole = [(x, y - 3.5) for x, y, said in scores if said in ("0", "5", "10")]
    assert whole == [(34.0, y) for _, y in places]
    grid = [one for one in attributes(picture, "line") if one["class"] == "grid"]
    assert [float(one["y1"]) for one in grid] == [y - 3.5 for _, y, _ in scores]
    assert all((one["x1"], one["x2"], one["y2"]) == ("40", "348", one["y1"]) for one in grid)
    [axis] = [one for one in attributes(picture, "line") if one["class"] == "axis"]
    assert [axis[key] for key in ("x1", "x2", "y1", "y2")] == ["40", "348", "194", "194"]
    assert texts(picture, "tick end label") == [(348.0, 189.0, "step")]
    assert picture.startswith('<svg viewBox="0 0 360 220" role="img" ')


def test_steps_are_whole_numbers_and_a_single_one_stands_in_the_middle() -> None:
    assert [said for *_, said in texts(drawn(line(points=[(0, 1), (1, 2)])), "tick mid")] == ["0", "1"]  # fmt: skip
    alone = drawn(line(points=[(10, 5)]))
    [dot] = attributes(alone, "circle")
    assert dot["cx"] == "194.0"
    assert [said for *_, said in texts(alone, "tick mid")] == ["9", "10", "11"]
    [far] = attributes(drawn(line(points=[(1e30, 5)])), "circle")
    assert far["cx"] == "194.0"


def test_everything_of_a_series_has_its_colour_and_its_name_is_text() -> None:
    picture = drawn(line(name="<b>", points=[(0, 1, 0, 2), (1, 2, 1, 3)]), charts.Series("base", 5, [charts.Point(0, 1.5, 1, 2)], "level"))  # fmt: skip
    assert "<b>" not in picture
    assert "<title>base: 1.50</title>" in picture
    assert attributes(picture, "polyline")[0]["class"] == "curve line c2"
    assert [one["class"] for one in attributes(picture, "polygon")] == ["band c2", "band c5"]
    assert [one["class"] for one in attributes(picture, "circle")] == ["dot c2"] * 2
    assert [one["class"] for one in attributes(picture, "line") if "c5" in one["class"]] == ["curve level c5"]  # fmt: skip
    thin = drawn(line("thin", points=[(0, 1, 0, 2)]))
    assert attributes(thin, "polyline")[0]["class"] == "curve thin c2"
    assert "whisker c2" in thin


def test_bars_stand_beside_each_other_and_are_seen_however_many_there_are() -> None:
    picture = str(charts.histogram([0, 10, 20], [1, 0], title="Lengths"))
    bars = attributes(picture, "rect")
    assert [(float(bar["x"]), float(bar["width"])) for bar in bars] == [(40.5, 153.0), (194.5, 153.0)]  # fmt: skip
    assert [bar["class"] for bar in bars] == ["bar c0"] * 2
    assert [said for *_, said in texts(picture, "tick end")] == ["0", "1"], "counts are whole"
    assert 'aria-label="Lengths"' in picture
    assert "polyline" not in picture
    assert texts(picture, "tick end label") == []
    many = attributes(str(charts.histogram(range(401), [1] * 400, title="t")), "rect")
    assert {bar["width"] for bar in many} == {"0.5"}
    assert 'height="0.0"' in str(charts.histogram([0, 1], [0], title="t")), "no bar, and no error"


def test_a_picture_of_its_own_has_a_title_and_the_names_two_in_a_row() -> None:
    series = [charts.Series(name, n, [charts.Point(0, 1)]) for n, name in enumerate(("base", "x" * 31, "<c>"))]  # fmt: skip
    series += [series[0], charts.Series("nothing", 7, [])]
    picture = plots._picture("Loss & more", charts.lines(series, title="t"), series)
    assert picture.startswith(
        '<svg xmlns="http://www.w3.org/2000/svg" width="360" height="282" viewBox="0 0 360 282">'
    )
    assert '<text class="title" x="8" y="18">Loss &amp; more</text><svg y="26" width="360" height="220" viewBox' in picture  # fmt: skip
    keys = [one for one in attributes(picture, "rect") if one.get("class", "").startswith("key")]
    assert [(one["class"], one["x"], one["y"]) for one in keys] == [
        ("key c0", "8", "247"), ("key c1", "188", "247"), ("key c2", "8", "263"),
    ]  # fmt: skip
    named = re.findall(r'<text x="(\d+)" y="(\d+)">([^<]*)</text>', picture)
    assert named == [("23", "256", "base"), ("203", "256", "x" * 29 + "…"), ("23", "272", "&lt;c&gt;")]  # fmt: skip
    stacked = plots._stacked([Markup("<svg />")] * 3)
    assert re.findall(r"translate\(0 (\d+)\)", stacked) == ["0", "246", "492"]
    assert 'height="738"' in stacked


def test_a_picture_of_its_own_shows_its_curves_in_the_colours_of_the_light_page() -> None:
    from PIL import Image

    series = [charts.Series("a", 1, [charts.Point(0, 1), charts.Point(9, 2)], "thin"), charts.Series("b", 2, [charts.Point(0, 2, 1, 3), charts.Point(9, 1, 0, 2)], "thin")]  # fmt: skip
    picture = plots._picture("t", charts.lines(series, title="t"), series)
    with Image.open(io.BytesIO(plots.painted(picture))) as image:
        assert image.size == (1080, 3 * (26 + 220 + 16 + 4))
        plain = image.convert("RGB")
    assert plain.getpixel((0, 0)) == (255, 255, 255)
    # Behind the axis and above the names: what lies between them is drawn by the chart alone.
    inside = plain.crop((3 * 42, 3 * 30, 3 * 346, 3 * (26 + 192)))
    blue, orange = (
        sum(count for count, (r, _, b) in inside.getcolors(1 << 20) or () if sign * (b - r) > 40)
        for sign in (1, -1)
    )
    assert min(blue, orange) > 1000
    for number in range(9):
        for part in ("stroke", "fill"):
            assert re.search(rf"\.c{number} {{ {part}: #\w{{6}} }}", plots._style()), number
    assert "#2f5bd0" in plots._style()
    assert "#7e9dff" not in plots._style(), "that is the dark page's"
