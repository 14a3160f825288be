"""Small charts as SVG text: lines with intervals over steps, and histograms.

Colours are classes (`c0`, `c1`, …) that the page's style sheet fills for light and dark. Sizes are in
units of the view box, which a panel of the page shows at about one pixel each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 10, 26


@dataclass(frozen=True, slots=True)
class Point:
    """A score at a step, with its interval if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one colour; a level is drawn across the whole panel."""

    name: str
    colour: int
    points: Sequence[Point]
    style: str = "line"
    """`line` with dots, `thin` without, `dashed`, or `level`."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where data coordinates lie in the picture."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return _round(LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT))

    def y(self, value: float) -> float:
        return _round(HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM))  # fmt: skip


def lines(series: Sequence[Series], *, title: str, x_label: str = "step") -> Markup:
    """A panel of curves; empty when there is nothing to draw."""
    drawn = [one for one in series if one.points]
    if not drawn:
        return Markup("")
    frame = _frame(drawn)
    parts = [_axes(frame, x_label)]
    parts += [_band(one, frame) for one in drawn]
    parts += [_curve(one, frame) for one in drawn]
    said = "; ".join(f"{one.name}: {_span(one)}" for one in drawn)
    return _svg(Markup("").join(parts), f"{title} over {x_label}s. {said}")


def histogram(
    edges: Sequence[float],
    bars: Sequence[int],
    outline: Sequence[int] = (),
    *,
    title: str,
    colour: int = 0,
) -> Markup:
    """Bars between `edges`, with the outline of other counts in the same bins over them."""
    most = max([*bars, *outline, 1])
    frame = _Frame(edges[0], edges[-1], 0.0, most * 1.05)
    parts = [_axes(frame, "", whole=True)]
    for left, right, number in zip(edges, edges[1:], bars, strict=False):
        x, y = frame.x(left), frame.y(number)
        parts.append(
            Markup('<rect class="bar c{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                colour, x + 0.5, y, _round(max(frame.x(right) - x - 1, 0.5)),
                _round(frame.y(0) - y), f"{left:.0f} to {right:.0f}: {number}",
            )
        )  # fmt: skip
    if outline:
        corners = [f"{frame.x(edges[0])},{frame.y(0)}"]
        for left, right, number in zip(edges, edges[1:], outline, strict=False):
            corners += [f"{frame.x(left)},{frame.y(number)}", f"{frame.x(right)},{frame.y(number)}"]
        corners.append(f"{frame.x(edges[-1])},{frame.y(0)}")
        parts.append(Markup('<polyline class="outline" points="{}"/>').format(" ".join(corners)))
    return _svg(Markup("").join(parts), title)


def ticks(low: float, high: float, most: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers between `low` and `high`, at most about `most` of them.

    >>> ticks(0, 52)
    [0.0, 20.0, 40.0]
    """
    span = high - low
    if span <= 0:
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    if whole:
        step = max(float(math.ceil(step)), 1.0)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number on an axis: `0.25`, `40`, `1.5k`."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g}k"
    return f"{value:.4g}"


def _frame(series: Sequence[Series]) -> _Frame:
    points = [point for one in series for point in one.points]
    stepped = [point.x for one in series if one.style != "level" for point in one.points] or [0.0]
    values = [
        value
        for point in points
        for value in (point.y, point.low, point.high)
        if value is not None and math.isfinite(value)
    ]
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    bottom = 0.0 if 0 <= low <= (high - low) * 0.5 else low - pad
    x0, x1 = min(stepped), max(stepped)
    if x0 == x1:
        beside = max(1.0, abs(x0) / 1e9)  # of 1e30 the next whole number is the same
        x0, x1 = x0 - beside, x1 + beside
    margin = (x1 - x0) * 0.03
    return _Frame(x0 - margin, x1 + margin, bottom, high + pad)


def _axes(frame: _Frame, x_label: str, *, whole: bool = False) -> Markup:
    parts = []
    for value in ticks(frame.y0, frame.y1, whole=whole):
        y = frame.y(value)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, y, y))  # fmt: skip
        parts.append(Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(LEFT - 6, y + 3.5, short(value)))  # fmt: skip
    for value in ticks(frame.x0, frame.x1, 6, whole=True):
        parts.append(Markup('<text class="tick mid" x="{}" y="{}">{}</text>').format(frame.x(value), HEIGHT - BOTTOM + 16, short(value)))  # fmt: skip
    base = HEIGHT - BOTTOM
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, base, base))  # fmt: skip
    if x_label:
        parts.append(Markup('<text class="tick end label" x="{}" y="{}">{}</text>').format(WIDTH - RIGHT, base - 5, x_label))  # fmt: skip
    return Markup("").join(parts)


def _band(one: Series, frame: _Frame) -> Markup:
    known = [p for p in one.points if p.low is not None and p.high is not None]
    if not known:
        return Markup("")
    places = [(frame.x(p.x), frame.y(p.low or 0.0), frame.y(p.high or 0.0)) for p in known]
    if one.style == "level":
        _, low, high = places[0]
        places = [(LEFT, low, high), (WIDTH - RIGHT, low, high)]
    if len(places) == 1:
        x, low, high = places[0]
        return Markup('<line class="whisker c{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(one.colour, x, x, low, high)  # fmt: skip
    corners = [f"{x},{high}" for x, _, high in places]
    corners += [f"{x},{low}" for x, low, _ in reversed(places)]
    return Markup('<polygon class="band c{}" points="{}"/>').format(one.colour, " ".join(corners))


def _curve(one: Series, frame: _Frame) -> Markup:
    if one.style == "level":
        y = frame.y(one.points[0].y)
        return Markup('<line class="curve level c{}" x1="{}" x2="{}" y1="{}" y2="{}"><title>{}</title></line>').format(
            one.colour, LEFT, WIDTH - RIGHT, y, y, f"{one.name}: {one.points[0].y:.2f}"
        )  # fmt: skip
    path = " ".join(f"{frame.x(p.x)},{frame.y(p.y)}" for p in one.points if math.isfinite(p.y))
    parts = [Markup('<polyline class="curve {} c{}" points="{}"/>').format(one.style, one.colour, path)]  # fmt: skip
    if one.style == "line":
        parts += [
            Markup('<circle class="dot c{}" cx="{}" cy="{}" r="3"><title>{}</title></circle>').format(
                one.colour, frame.x(p.x), frame.y(p.y), f"{one.name}, {p.x:.0f}: {p.y:.4g}{_interval(p)}"
            )
            for p in one.points
            if math.isfinite(p.y)
        ]  # fmt: skip
    return Markup("").join(parts)


def _interval(point: Point) -> str:
    return "" if point.low is None or point.high is None else f" ({point.low:.4g} to {point.high:.4g})"  # fmt: skip


def _span(one: Series) -> str:
    first, last = one.points[0], one.points[-1]
    return f"{first.y:.4g}" if first is last else f"{first.y:.4g} to {last.y:.4g}"


def _svg(inner: Markup, said: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(WIDTH, HEIGHT, said, inner)  # fmt: skip


def _round(value: float) -> float:
    return round(value, 1)
