"""The page's curves as files of their own, SVG and PNG, for papers and slides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from markupsafe import Markup

from finetune import console
from finetune.errors import ConfigError
from finetune.evaluation.schema import Evaluation, read_evaluation
from finetune.evaluation.scores.metrics import metric
from finetune.report.charts import HEIGHT, WIDTH, Series, lines
from finetune.report.page import (
    colours_of,
    length_charts,
    loss_curves,
    metric_series,
    runs_of,
)
from finetune.report.page_data import read_content
from finetune.storage.files import refuse_odd, whole_binary
from finetune.storage.outputs import write_marked
from finetune.webpages import theme

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
FOLDER = "plots"
TITLE, ROW, COLUMNS = 26, 16, 2
LONGEST_NAME = 30
PIXELS = 3
"""Of a PNG, for each unit of the picture: 1,080 wide."""
FAMILIES = (
    "Aileron", "DejaVu Sans", "Liberation Sans", "Noto Sans", "Noto Sans CJK SC", "Source Han Sans SC",
    "PingFang SC", "Microsoft YaHei", "Arial", "Helvetica", "sans-serif",
)  # fmt: skip
"""Fonts in the order in which they are tried. Aileron comes with Pillow: no label of a PNG file is missing."""
MARK = ".whisker { stroke-width: 5;"
"""What tells our own pictures."""
STYLE = """
text { font-family: FAMILIES; fill: #3a3833; font-size: 11px } .title { font-weight: bold; font-size: 13px }
.grid { stroke: #ebe9e4 } .axis { stroke: #bdbab2 } .tick { fill: #6f6b63; font-size: 10.5px }
.end { text-anchor: end } .mid { text-anchor: middle }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round } .thin { stroke-width: 1.2; opacity: .55 }
.level { stroke-dasharray: 5 4; stroke-width: 1.5 } .band { opacity: .15 }
.whisker { stroke-width: 5; opacity: .3 } .dot { stroke: #fff; stroke-width: 1.5 }
.bar { opacity: .72 } .outline { fill: none; stroke: #3a3833; stroke-width: 1.2; opacity: .7 }
"""


def write_plots(folder: Path) -> list[Path]:
    """Writes `plots/<name>.svg` and `.png` of the losses, every score and the lengths; their paths.

    Raises:
        ConfigError: What draws PNG files is not installed; the SVG files are written.
        DataError: The folder is no whole evaluation.
    """
    evaluation = read_evaluation(folder)
    pictures = _pictures(folder, evaluation)
    drawn = [folder / FOLDER / f"{name}.svg" for name in pictures]
    bitmaps = [file.with_suffix(".png") for file in drawn]
    for file in (*drawn, *bitmaps):
        refuse_odd(file, inside=folder)
    for vector, bitmap in zip(drawn, bitmaps, strict=True):
        if bitmap.exists() and not vector.exists():
            raise ConfigError(f"{bitmap} was not written by this program; move it away")
    (folder / FOLDER).mkdir(exist_ok=True)
    for file, picture in zip(drawn, pictures.values(), strict=True):
        write_marked(file, picture, mark=MARK)
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{folder / FOLDER} has SVG files only; PNG files need: pip install 'glm4-finetune[report]'"
        ) from error
    for file, picture in zip(bitmaps, pictures.values(), strict=True):
        with whole_binary(file) as out:
            out.write(painted(picture))
    if any(ord(char) >= 0x2E80 for char in "".join(pictures.values())) and not has_chinese_font():
        console.warn(
            "no font with Chinese characters is installed (try fonts-noto-cjk): Chinese names are "
            "missing from the PNG files in plots/; the SVG files and report.html show them"
        )
    return [*drawn, *bitmaps]


def _pictures(folder: Path, evaluation: Evaluation) -> dict[str, str]:
    """SVG texts by file name without its ending."""
    colours, runs = colours_of(evaluation), runs_of(folder, evaluation)
    curves = {"loss": loss_curves(evaluation, runs)}
    if any(target.step is not None for target in evaluation.targets):
        curves |= {name: metric_series(evaluation, name, colours) for name in evaluation.metrics}
    pictures = {
        # a metric of the user's own may be named anything
        re.sub(r"[^\w.-]+", "-", name)[:100]: _picture(metric(name).label, lines(series, title=name), series)
        for name, series in curves.items()
        if any(one.points for one in series)
    }  # fmt: skip
    charts = length_charts(evaluation, read_content(folder, evaluation), runs, colours)
    panels = [_titled(f"{_short(name)}, {unit}", chart) for name, unit, chart in charts]
    return pictures | {"lengths": _stacked(panels)}


def _picture(title: str, chart: Markup, series: Sequence[Series]) -> str:
    """A chart with a title above and the names of its series below, two in a row."""
    names = list(dict.fromkeys((one.name, one.colour) for one in series if one.points))
    parts = [_titled(title, chart)]
    for number, (name, colour) in enumerate(names):
        x = 8 + number % COLUMNS * (WIDTH // COLUMNS)
        y = TITLE + HEIGHT + ROW * (number // COLUMNS) + 10
        parts.append(Markup('<rect class="key c{}" x="{}" y="{}" width="10" height="10" rx="2"/><text x="{}" y="{}">{}</text>').format(colour, x, y - 9, x + 15, y, _short(name)))  # fmt: skip
    return _whole(parts, TITLE + HEIGHT + ROW * -(-len(names) // COLUMNS) + 4)


def _stacked(panels: Sequence[Markup]) -> str:
    """Titled charts below each other in one picture."""
    tall = TITLE + HEIGHT
    placed = [Markup('<g transform="translate(0 {})">{}</g>').format(tall * number, panel) for number, panel in enumerate(panels)]  # fmt: skip
    return _whole(placed, tall * len(panels))


def _titled(title: str, chart: Markup) -> Markup:
    placed = str(chart).replace("<svg ", f'<svg y="{TITLE}" width="{WIDTH}" height="{HEIGHT}" ', 1)
    heading = Markup('<text class="title" x="8" y="18">{}</text>').format(title)
    return heading + Markup(placed)


def _whole(parts: Sequence[Markup], height: int) -> str:
    """A file of its own: white ground, and the style that the page has in its style sheet.

    A name may hold what XML has no place for, such as a zero byte.
    """
    text = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}">'
        '<style>{2}</style><rect width="{0}" height="{1}" fill="#fff"/>{3}</svg>\n'
    ).format(WIDTH, height, _style(), Markup("").join(parts))
    return NOT_XML.sub("\ufffd", text)


@cache
def _style() -> Markup:
    """The style of a picture, with the page's colours for light mode."""
    colours = dict(reversed(re.findall(r"-{2}c(\d): (#\w+)", theme())))
    rules = [
        f".curve.c{n}, .whisker.c{n} {{ stroke: {colour} }} .band.c{n}, .dot.c{n}, .bar.c{n}, .key.c{n} {{ fill: {colour} }}"
        for n, colour in sorted(colours.items())
    ]
    families = ", ".join(f'"{name}"' for name in FAMILIES[:-1]) + f", {FAMILIES[-1]}"
    return Markup(STYLE.replace("FAMILIES", families) + "\n".join(rules))


def painted(picture: str) -> bytes:
    """The PNG file of an SVG text."""
    from PIL import ImageFont
    from resvg_py import svg_to_bytes

    label: Any = ImageFont.load_default(12)  # Pillow's own font lies in memory
    with NamedTemporaryFile(suffix=".ttf") as font:
        font.write(label.path.getvalue())
        font.flush()
        # Looking through the system's fonts takes half a second, so only where a name needs them.
        alone = all(ord(char) < 0x250 or char == "…" for char in picture)
        return bytes(
            svg_to_bytes(
                svg_string=picture, zoom=PIXELS, font_files=[font.name], skip_system_fonts=alone
            )
        )


def has_chinese_font() -> bool:
    """Whether a Chinese character is drawn otherwise than one that no font has."""
    common, unknown = (
        painted(_whole([_titled(char, Markup("<svg />"))], 30)) for char in "中\U000effff"
    )
    return common != unknown


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
