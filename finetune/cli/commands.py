"""The commands: each reads its options, imports what it needs, calls one function, reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune import console
from finetune.cli.data_commands import Json, data_app

app = typer.Typer(
    epilog="`finetune.py configs/lora.yaml` without a command trains. `finetune schema --markdown` "
    "describes every option of a configuration.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help pages answer three times as fast
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")

Target = Annotated[
    Path,
    typer.Argument(help="A run, a checkpoint, an adapter, a merged model, or a base model."),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Longest reply in tokens.")]


Replies = Literal["every_reply", "last_reply"]
Dtype = Literal["bfloat16", "float16", "float32"]


def _show_version(asked: bool) -> None:
    if asked:
        from finetune import __version__

        console.say(__version__)
        raise typer.Exit


@app.callback()
def finetune(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; allowed anywhere.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Fine-tune GLM-4: train, evaluate, predict, merge, chat."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The YAML file of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Options that win over the file's."),
    ] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print every option's value, and stop there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train; a run that was interrupted goes on where it stopped."""
    from finetune.config_file import dump_config, load

    loaded = load(config, overrides or ())
    if show_config:
        console.say(dump_config(loaded.config).rstrip())
        return
    with console.json_output(as_json) as emit:
        for note in loaded.notes:
            console.warn(note)
        from finetune.cli.inputs import check_inputs

        check_inputs(loaded.config)
        from finetune.training.run import train as run

        emit(run(loaded.config, config))


@app.command()
def evaluate(
    target: Target,
    data: Annotated[list[str], typer.Option(help="Held-out file, glob or folder; repeatable.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for scores.json and predictions.jsonl.")
    ] = None,
    replies: Annotated[Replies, typer.Option(help="Which replies.")] = "every_reply",
    max_new_tokens: MaxNewTokens = 512,
    max_samples: Annotated[
        int | None, typer.Option(min=1, help="At most this many replies, the same ones each time.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated at once.")] = 16,
    as_json: Json = False,
) -> None:
    """Score a model's replies against the references of a file."""
    with console.json_output(as_json) as emit:
        from finetune.evaluation.evaluate import evaluate as run

        emit(run(target, data))


@app.command()
def predict(
    target: Target,
    data: Annotated[list[str], typer.Option(help="File, glob or folder; repeatable.")],
    output: Annotated[Path, typer.Option(help="The JSONL file to write.")],
    max_new_tokens: MaxNewTokens = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated at once.")] = 16,
    as_json: Json = False,
) -> None:
    """Write the model's reply to every prompt of a file."""
    with console.json_output(as_json) as emit:
        from finetune.evaluation.predict import predict as run

        emit(run(target, data))


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="An adapter, a checkpoint, or a run.")],
    output: Annotated[Path, typer.Option(help="The folder to write; must not exist yet.")],
    base: Annotated[
        Path | None, typer.Option(help="The base model, when it is not where the adapter says.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Number format to write; by default the base's.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the folder; accept another base.")
    ] = False,
    check: Annotated[
        bool, typer.Option(help="Compare forward passes of merged and adapted model.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Fold an adapter into its base: a plain checkpoint."""
    with console.json_output(as_json) as emit:
        from finetune.export.merge import merge as run

        emit(run(adapter, output, base=base, dtype=dtype, force=force, check=check))


@app.command()
def chat(
    target: Target,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 always takes the likeliest token.")
    ] = 0.0,
) -> None:
    """Talk to a model in the terminal."""
    from finetune.chat.terminal import chat as run

    run(target, system=system, max_new_tokens=max_new_tokens, temperature=temperature)


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The reference page for people instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of a configuration."""
    from finetune.config_file import json_schema, reference_page

    if markdown:
        console.say(reference_page().rstrip())
        return
    with console.json_output() as emit:
        emit(json_schema())
