"""Everything that is made of an evaluation folder: the page and the plots."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from finetune import console
from finetune.evaluation.predictions import whole_file
from finetune.report.content import read_content
from finetune.report.folder import read_evaluation
from finetune.report.page import page, runs_of
from finetune.report.plots import write_plots

PAGE = "report.html"


def write_report(folder: Path) -> Path:
    """Writes `report.html` and `plots/` beside the `evaluation.json` in `folder`; the page's path.

    Raises:
        DataError: The folder is no whole evaluation.
    """
    page = write_page(folder)
    if find_spec("matplotlib") is None:
        console.say("plots/ is left out: matplotlib is not installed (pip install 'glm4-finetune[report]')")  # fmt: skip
    else:
        write_plots(folder)
    return page


def write_page(folder: Path) -> Path:
    """Writes `report.html`, and returns its path."""
    evaluation = read_evaluation(folder)
    runs = runs_of(evaluation)
    for name in {target.run for target in evaluation.targets if target.run} - set(runs):
        console.warn(f"{name} is not here: its losses and configuration are left out of the report")
    with whole_file(folder / PAGE) as file:
        file.write(page(evaluation, read_content(folder, evaluation), runs))
    return folder / PAGE
