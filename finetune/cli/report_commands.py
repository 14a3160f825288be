"""`finetune report | runs | status | compare`: what was scored and trained, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune import console
from finetune.cli.data_commands import Json
from finetune.cli.inputs import Overwrite
from finetune.errors import ConfigError

report_app = typer.Typer()


@report_app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(help="What `finetune evaluate --output` or `finetune compare` wrote.")
    ],
) -> None:
    """Make the page of an evaluation anew.

    Writes report.html and plots/ (PNG and SVG), and says it in short.
    """
    from finetune.report.plots import write_plots

    say_report(folder)
    write_plots(folder)
    console.say(f"plots: {folder / 'plots'}")


@report_app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look, also in folders below.")] = Path(
        "runs"
    ),
    as_json: Json = False,
) -> None:
    """List runs, how they differ, and their scores."""
    from finetune.report.runs import find_runs
    from finetune.report.terminal import show_runs

    with console.json_output(as_json) as emit:
        found = find_runs(folder)
        if found:
            show_runs(found)
        else:
            console.say(f"no runs in {folder}")
        emit([run.summary for run in found])


@report_app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    as_json: Json = False,
) -> None:
    """Say how far a run is.

    From its files alone: step, loss, speed, newest and best checkpoint, and which process is at it.
    """
    from finetune.report.status import read_status

    with console.json_output(as_json) as emit:
        found = read_status(run)
        console.table(["", str(run)], found.rows())
        emit(found)


@report_app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Two or more runs.")],
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="For evaluation.json, predictions/ and the page.")
    ] = Path("comparison"),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Report over several runs.

    From the replies that they gave while they were trained.
    No model is opened. `finetune evaluate RUN RUN --data FILE` asks their checkpoints anew.
    """
    from finetune.report.compare import compare as run
    from finetune.report.runs import read_run
    from finetune.report.terminal import show_differences

    if len(runs) < 2:
        raise ConfigError("name two or more runs to compare; `finetune runs` lists them")
    with console.json_output(as_json) as emit:
        found = [read_run(path) for path in runs]
        show_differences(found)
        report = run(found, output, overwrite=overwrite)
        say_report(output)
        emit(report)


def say_report(folder: Path) -> None:
    """Writes the page of an evaluation folder, and says what is in it in short."""
    from finetune.report.page import write_page
    from finetune.report.terminal import show

    page = write_page(folder)
    show(folder)
    console.say(f"\nreport: {page}")
