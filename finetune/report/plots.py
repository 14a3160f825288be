"""Scores over steps and lengths as PNG and SVG files, for papers and slides, through matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.errors import ConfigError
from finetune.evaluation.schema import Evaluation, read_evaluation
from finetune.evaluation.scores.metrics import metric
from finetune.report.charts import Series
from finetune.report.page import colours_of, edges_of, loss_curves, metric_series, runs_of
from finetune.report.page_data import Content, read_content
from finetune.storage.files import staged_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = "plots"
FORMATS = ("png", "svg")
LONGEST_NAME = 36
CHINESE = "中"
FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "Source Han Sans CN", "PingFang SC", "Microsoft YaHei",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Heiti SC", "Droid Sans Fallback",
)  # fmt: skip
"""Chinese fonts in the order in which they are liked; any other that has the signs will do."""
COLOURS = ("#8a877f", "#2f5bd0", "#d9641e", "#14845c", "#9a3fb5", "#c22f5d", "#0b8aa3", "#7a6a12", "#5b5bd6")  # fmt: skip


def write_plots(folder: Path) -> list[Path]:
    """Writes `plots/<name>.png` and `.svg` of the losses, every score and the lengths; their paths.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: The folder is no whole evaluation.
    """
    evaluation = read_evaluation(folder)
    content = read_content(folder, evaluation)
    colours = colours_of(evaluation)
    drawn = {"loss": loss_curves(evaluation, runs_of(folder, evaluation))}
    if any(target.step is not None for target in evaluation.targets):
        drawn |= {name: metric_series(evaluation, name, colours) for name in evaluation.metrics}
    (folder / FOLDER).mkdir(exist_ok=True)
    written: list[Path] = []
    with _style(_texts(evaluation)):
        for name, series in drawn.items():
            if any(one.points for one in series):
                file = re.sub(r"[^\w.-]+", "-", name)[
                    :100
                ]  # a metric of the user's own may be named anything
                written += _save(_curves(series, metric(name).label), folder / FOLDER / file)
        written += _save(_lengths(evaluation, content, colours), folder / FOLDER / "lengths")
    return written


def chinese_font() -> str | None:
    """The name of an installed font with Chinese signs; None when there is none."""
    from matplotlib import font_manager

    installed = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    liked = next((name for name in FONTS if name in installed), None)
    if liked is not None:
        return liked
    likely = (name for name in sorted(installed) if "CJK" in name or "Han" in name or "Hei" in name)
    return next((name for name in likely if _has_chinese(installed[name])), None)


def _has_chinese(file: str) -> bool:
    from matplotlib.ft2font import FT2Font

    return FT2Font(file).get_char_index(ord(CHINESE)) != 0


def _texts(evaluation: Evaluation) -> str:
    return "".join([*(target.name for target in evaluation.targets), *evaluation.metrics])


def _style(texts: str) -> AbstractContextManager[None]:
    """Matplotlib's settings, with a Chinese font when some name needs one."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'glm4-finetune[report]'") from error
    fonts = ["DejaVu Sans"]
    if any(ord(char) >= 0x2E80 for char in texts):
        found = chinese_font()
        if found is None:
            console.warn(
                "no font with Chinese signs is installed (try fonts-noto-cjk): Chinese names are "
                "drawn as boxes in plots/; report.html shows them"
            )
        else:
            fonts.insert(0, found)
    return matplotlib.rc_context(
        {
            "font.family": fonts,
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#ebe9e4",
            "axes.edgecolor": "#bdbab2",
            "text.parse_math": False,  # a name may hold dollar signs
            "svg.fonttype": "none",
            "svg.hashsalt": "finetune",
            "figure.dpi": 100,
            "savefig.dpi": 160,
        }
    )


def _curves(series: Sequence[Series], title: str) -> Figure:
    figure, axes = _figure(title)
    for one in series:
        colour = COLOURS[one.colour]
        xs, ys = [point.x for point in one.points], [point.y for point in one.points]
        known = [p for p in one.points if p.low is not None and p.high is not None]
        lows, highs = [p.low or 0.0 for p in known], [p.high or 0.0 for p in known]
        if one.style == "level":
            axes.axhline(ys[0], color=colour, linestyle="--", linewidth=1.4, label=_short(one.name))
            for low, high in zip(lows, highs, strict=True):
                axes.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
            continue
        marks: dict[str, Any] = (
            {"marker": "o", "markersize": 4} if one.style == "line" else {"alpha": 0.55}
        )
        axes.plot(xs, ys, color=colour, linewidth=1.8 if marks.get("marker") else 1, label=_short(one.name), **marks)  # fmt: skip
        if len(known) > 1:
            axes.fill_between([p.x for p in known], lows, highs, color=colour, alpha=0.15, linewidth=0)  # fmt: skip
        elif known:
            axes.vlines([known[0].x], lows, highs, color=colour, alpha=0.4, linewidth=4)
    axes.set_xlabel("step")
    _legend(axes)
    return figure


def _lengths(evaluation: Evaluation, content: Content, colours: Sequence[int]) -> Figure:
    figure, axes = _figure("characters of a reply")
    everything = [content.reference_lengths, *content.reply_lengths]
    top = max((sorted(one)[int(len(one) * 0.99)] for one in everything if one), default=0)
    edges = edges_of(top)
    for target, found, colour in zip(
        evaluation.targets, content.reply_lengths, colours, strict=True
    ):
        clipped = [min(value, edges[-1] - 1) for value in found]
        axes.hist(clipped, edges, histtype="step", color=COLOURS[colour], linewidth=1.4, label=_short(target.name))  # fmt: skip
    references = [min(value, edges[-1] - 1) for value in content.reference_lengths]
    axes.hist(references, edges, color="#d8d5cd", label="references", zorder=0)
    axes.set_xlabel("characters")
    axes.set_ylabel("replies")
    _legend(axes)
    return figure


def _figure(title: str) -> tuple[Figure, Axes]:
    """A figure outside of pyplot, which would hold on to it and may look for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    return figure, axes


def _legend(axes: Axes) -> None:
    """Below the axes: looking for the best place among many points takes seconds."""
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _save(figure: Figure, stem: Path) -> list[Path]:
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in FORMATS]
    for file in files:
        metadata = {"Date": None} if file.suffix == ".svg" else {"Software": None}
        with staged_file(file) as part:
            figure.savefig(part, format=file.suffix[1:], metadata=metadata)
    return files
