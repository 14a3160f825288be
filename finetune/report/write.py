"""The page of an evaluation folder, written into it."""

from __future__ import annotations

from pathlib import Path

from finetune import console
from finetune.report.folder import read_evaluation
from finetune.report.page import page, runs_of
from finetune.report.page_data import read_content
from finetune.storage.files import whole_file

PAGE = "report.html"


def write_page(folder: Path) -> Path:
    """Writes `report.html` beside the `evaluation.json` in `folder`, and returns its path.

    Raises:
        DataError: The folder is no whole evaluation.
    """
    evaluation = read_evaluation(folder)
    runs = runs_of(evaluation)
    for name in {target.run for target in evaluation.targets if target.run} - set(runs):
        console.warn(f"{name} is not here: its losses and configuration are left out of the report")
    with whole_file(folder / PAGE) as file:
        file.write(page(evaluation, read_content(folder, evaluation), runs))
    return folder / PAGE
