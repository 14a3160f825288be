"""`finetune data check | show | tokens | split | prepare`: what a file holds, and what training would see of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from finetune import console
from finetune.cli.inputs import Overwrite
from finetune.config.row_formats import RowFormat
from finetune.errors import ConfigError, DataError

data_app = typer.Typer(no_args_is_help=True, help="Look at data as training would see it.")

Json = Annotated[
    bool, typer.Option("--json", help="JSON on standard output, all else on standard error.")
]
Model = Annotated[
    str, typer.Option(metavar="FOLDER", help="A model folder (or hub id); its tokenizer is used.")
]
Format = Annotated[
    RowFormat,
    typer.Option(metavar="NAME", help=f"The layout of the rows: {', '.join(get_args(RowFormat))}."),
]  # fmt: skip
ImageRoot = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Images' paths are relative to it; else to the file's."),
]
Columns = Annotated[
    tuple[str, str] | None,
    typer.Option(metavar="PROMPT REPLY", help="Column names of prompt/response rows."),
]


Rows = Annotated[
    list[str] | None,
    typer.Option(
        "--rows",
        metavar="KEY=VALUE",
        help="An option of the config's data section about rows, such as turns=merge; repeatable.",
    ),
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
    rows: Rows = None,
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
            options=rows or (),
        )
        console.table(*report.table())
        for note in report.notes():
            console.warn(note)
        emit(report.as_dict())
        if report.num_bad:
            listed = "".join(f"\n  {row.location}: {row.reason}" for row in report.bad_rows)
            more = report.num_bad - len(report.bad_rows)
            listed += f"\n  and {more} more" if more > 0 else ""
            raise DataError(
                f"{report.num_bad} bad rows:{listed}\nFix these rows; training leaves them out with data.on_bad_row=skip"
            )


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
    rows: Rows = None,
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
            options=rows or (),
        )
        console.say(
            f"{shown.location} ({shown.format}): {shown.num_tokens} tokens, "
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
    rows: Rows = None,
) -> None:
    """Print a JSON row per example: input_ids and trained_spans.

    Spans are half-open ranges of the ids that carry loss, adjacent ones merged.
    """
    with console.json_output() as emit:
        from finetune.data.preview.report import tokens as run

        found = run(
            file,
            model,
            format=format,
            columns=columns,
            image_root=image_root,
            options=rows or (),
        )
        for row in found:
            emit(row)


@data_app.command()
def split(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, globs, folders.")],
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Gets train.jsonl and held_out.jsonl.")
    ],
    share: Annotated[
        float, typer.Option(metavar="X", help="How much is held out, 0.05 for 5 %.")
    ] = 0.05,
    group_by: Annotated[
        str, typer.Option(metavar="COLUMN", help="What makes a group; else the question asked.")
    ] = "",
    format: Format = "auto",
    columns: Columns = None,
    image_root: ImageRoot = None,
    rows: Rows = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Hold a part of the rows out, whole groups at a time."""
    if not 0 < share < 1:
        raise ConfigError(f"--share is a part of 1, such as 0.05; got {share:g}")
    with console.json_output(as_json) as emit:
        from finetune.data.reading import section as sections
        from finetune.data.reading.parts import Part
        from finetune.data.reading.split import split as run

        section = sections.with_rows(
            sections.AS_DEFAULT,
            format=format,
            columns=columns,
            image_root=image_root,
            options=rows or (),
        )
        counts = run(
            list(sections.sources_of(section, files)),
            output,
            Part(share, held_out=True, group_by=group_by),
            sections.reading_of(section),
            overwrite=overwrite,
        )
        console.say(
            f"{counts.train} dialogues in {output / 'train.jsonl'}, {counts.held_out} in "
            f"{output / 'held_out.jsonl'}"
        )
        emit({"train": counts.train, "held_out": counts.held_out})


@data_app.command()
def prepare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE ...]", help="Changes to it.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Of N machines with one cache this is I: every N-th file."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tokenise the training data into the cache, where a run finds it; by shards on several machines.

    When all shards are there, the run, or this command without --shard, only copies them together.
    """
    from finetune.config.load import load_config
    from finetune.data.examples.ahead import prepare_ahead

    found = load_config(config, overrides or [])
    with console.json_output(as_json) as emit:
        counts = prepare_ahead(found.data, found.model, found.training.seed, shard)
        console.say(
            f"{counts.kept:,} examples from {counts.rows:,} rows, {counts.tokens:,} tokens are prepared"
        )
        emit({"examples": counts.kept, "rows": counts.rows, "tokens": counts.tokens})
