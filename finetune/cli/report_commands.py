"""`finetune report | runs | compare`: what was scored and trained, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune import console
from finetune.cli.data_commands import Json

report_app = typer.Typer()


@report_app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(help="What `finetune evaluate --output` or `finetune compare` wrote.")
    ],
) -> None:
    """Write report.html and plots/ of an evaluation anew, and say it in short."""
    from finetune.report.terminal import show
    from finetune.report.write import write_report

    page = write_report(folder)
    show(folder)
    console.say(f"\nreport: {page}")


@report_app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look, also in folders below.")] = Path(
        "runs"
    ),
    as_json: Json = False,
) -> None:
    """List the runs in a folder, in what they differ, and their best scores."""
    from finetune.report.runs import find_runs
    from finetune.report.terminal import show_runs

    with console.json_output(as_json) as emit:
        found = find_runs(folder)
        if found:
            show_runs(found)
        else:
            console.say(f"no runs in {folder}")
        emit([run.summary for run in found])
