"""`finetune report | runs | status | compare`: what was scored and trained, for people."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from finetune import console
from finetune.cli.data_commands import Json
from finetune.cli.inputs import Overwrite, check_output_file
from finetune.errors import ConfigError

report_app = typer.Typer()


@report_app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(help="What `finetune evaluate --output` or `finetune compare` wrote.")
    ],
    format: Annotated[
        Literal["html", "markdown", "csv"],
        typer.Option(
            help="The page and plots, or on standard output a comment for a pull request or a table."
        ),
    ] = "html",
    language: Annotated[
        Literal["en", "zh"] | None,
        typer.Option(help="The language of the page; by default that of your shell."),
    ] = None,
) -> None:
    """Make the page of an evaluation anew.

    Writes report.html and plots/ (PNG and SVG), and says it in short.
    """
    if language is not None:
        os.environ["FINETUNE_LANG"] = language
    if format != "html":
        from finetune.evaluation.schema import read_evaluation
        from finetune.report.export import comma_separated, markdown

        evaluation = read_evaluation(folder)
        made = markdown(evaluation) if format == "markdown" else comma_separated(evaluation)
        sys.stdout.write(console.shown(made) if sys.stdout.isatty() else made)
        return
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
    from finetune.report.runs import read_run
    from finetune.report.status import read_status
    from finetune.report.terminal import curve

    with console.json_output(as_json) as emit:
        found = read_status(run)
        console.table(["", str(run)], found.rows())
        drawn = curve(read_run(run).curve("loss"))
        if drawn:
            console.say("\n".join(["", "loss over steps", *drawn]))
        emit(found)


@report_app.command()
def board(
    folder: Annotated[
        Path, typer.Argument(metavar="RUNS", help="Where to look, also in folders below.")
    ] = Path("runs"),
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one.")
    ] = 8100,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="How often the page is renewed.")
    ] = 5.0,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the page as it is now, and serve nothing."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Watch runs in a browser.

    Loss, learning rate, tokens a second, memory, scores and replies of all runs, in one page that
    renews itself. It is served to this machine only.
    """
    from finetune.report import board as pages

    if output is None:
        pages.serve(folder, port=port, every=every)
        return
    check_output_file(output)
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists already; choose another --output, or say --overwrite")
    pages.write(folder, output)
    console.say(f"board: {output}")


@report_app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Runs; one is compared with its own base and steps."),
    ],
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

    with console.json_output(as_json) as emit:
        found = [read_run(path) for path in runs]
        show_differences(found)
        report = run(found, output, overwrite=overwrite)
        say_report(output)
        emit(report)


def until_over(runs: Sequence[str], evaluate: Callable[[list[str]], Any]) -> Any:
    """What `evaluate` made of the last checkpoints of runs; see `report.watching`."""
    from finetune.report import watching

    return watching.until_over(runs, evaluate)


def say_report(folder: Path) -> None:
    """Writes the page of an evaluation folder, and says what is in it in short."""
    from finetune.report.page import write_page
    from finetune.report.terminal import say_page, show

    page = write_page(folder)
    show(folder)
    say_page(page)


def say_votes(votes: Sequence[str], *others: Sequence[str] | None) -> dict[str, Any]:
    """The win rates of saved votes, shown and returned."""
    from dataclasses import asdict

    from finetune.evaluation.scores.votes import score_votes

    if any(others):
        raise ConfigError("--votes scores what people said; remove it to score models and data")
    duels = score_votes([Path(path) for path in votes])
    console.table(
        ["pair", "won", "lost", "ties", "dialogues", "win rate in %", "verdict"],
        [
            [f"{one.a} : {one.b}", str(one.wins), str(one.losses), str(one.ties), str(one.dialogues),
             f"{one.win_rate:.1f} ({one.low:.1f} to {one.high:.1f})", f"{one.verdict}, p = {one.p:.2g}"]
            for one in duels
        ],
    )  # fmt: skip
    return {"pairs": [asdict(one) for one in duels]}
