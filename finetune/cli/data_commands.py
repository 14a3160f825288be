"""`finetune data check | show | tokens`: what a file holds, and what training would see of it."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import typer

from finetune import console
from finetune.errors import ConfigError, DataError

data_app = typer.Typer(no_args_is_help=True, help="Look at data as training would see it.")

Json = Annotated[
    bool, typer.Option("--json", help="JSON on standard output, all else on standard error.")
]
Model = Annotated[
    str, typer.Option(metavar="FOLDER", help="A model folder (or hub id); its tokenizer is used.")
]
Layout = Literal[
    "auto", "messages", "openai", "sharegpt", "alpaca", "pairs", "chatglm3", "conversation", "glaive",
    "moss", "xlam", "chatml",
]  # fmt: skip
Format = Annotated[
    Layout,
    typer.Option(metavar="NAME", help=f"The layout of the rows: {', '.join(get_args(Layout))}."),
]
ImageRoot = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Images' paths are relative to it; else to the file's."),
]
Columns = Annotated[
    tuple[str, str] | None,
    typer.Option(metavar="PROMPT REPLY", help="Column names of prompt/response rows."),
]


@data_app.command()
def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, globs, folders.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Count tokens with this model's tokenizer."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Count the dialogues over N tokens.")
    ] = None,
    format: Format = "auto",
    columns: Columns = None,
    image_root: ImageRoot = None,
    as_json: Json = False,
) -> None:
    """Check every row, and count what the files hold.

    Exits with 2 when there are bad rows. Give training data first and validation data second to
    learn how many dialogues they share.
    """
    if max_length is not None and model is None:
        raise ConfigError("--max-length counts tokens: give --model too")
    with console.json_output(as_json) as emit:
        from finetune.data.preview.report import check as run

        report = run(
            files,
            model=model,
            max_length=max_length,
            format=format,
            columns=columns,
            image_root=image_root,
        )
        console.table(*report.table())
        for note in report.notes():
            console.warn(note)
        emit(report.as_dict())
        if report.num_bad:
            listed = "".join(f"\n  {row.where}: {row.reason}" for row in report.bad_rows)
            more = report.num_bad - len(report.bad_rows)
            listed += f"\n  and {more} more" if more > 0 else ""
            raise DataError(f"{report.num_bad} bad rows:{listed}")


@data_app.command()
def show(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file, glob or folder.")],
    model: Model,
    index: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="The Nth dialogue, from 0.")
    ] = None,
    line: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The dialogue on line N, from 1.")
    ] = None,
    format: Format = "auto",
    columns: Columns = None,
    image_root: ImageRoot = None,
    as_json: Json = False,
) -> None:
    """Show one dialogue with its tokens, those that carry loss marked."""
    if index is not None and line is not None:
        raise ConfigError("give --index or --line, not both")
    with console.json_output(as_json) as emit:
        from finetune.data.preview.report import show as run

        shown = run(
            file,
            model=model,
            index=index,
            line=line,
            format=format,
            columns=columns,
            image_root=image_root,
        )
        console.say(
            f"{shown.where} ({shown.format}): {shown.num_tokens} tokens, "
            f"{shown.num_supervised} of them carry loss\n"
        )
        if shown.num_examples > 1:
            console.say(
                f"the last of {shown.num_examples} examples: this checkpoint thinks, so each turn is "
                "trained behind its own prompt\n"
            )
        console.say(shown.text() if console.on_terminal() else shown.plain())
        console.say(f"\nprompt of the last reply:\n{shown.prompt}")
        console.say(f"\nit stops at {shown.stop}")
        emit(shown.as_dict())


@data_app.command()
def tokens(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file, glob or folder.")],
    model: Model,
    format: Format = "auto",
    columns: Columns = None,
    image_root: ImageRoot = None,
) -> None:
    """Print a JSON row per example: input_ids and trained_spans.

    Spans are half-open ranges of the ids that carry loss, adjacent ones merged.
    """
    with console.json_output() as emit:
        from finetune.data.preview.report import tokens as run

        for row in run(file, model, format=format, columns=columns, image_root=image_root):
            emit(row)
