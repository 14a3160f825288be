"""The commands: each reads its options, imports what it needs, calls one function, reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune import console
from finetune.cli.data_commands import Json, data_app
from finetune.cli.export_commands import Base, export_app
from finetune.cli.inputs import check_inputs, model_in, models_in
from finetune.cli.report_commands import report_app

app = typer.Typer(
    epilog="`finetune.py configs/lora.yaml` without a command trains. `finetune schema --markdown` "
    "describes every option of a configuration.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help pages answer three times as fast
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(export_app)
app.add_typer(report_app)

Target = Annotated[
    str,
    typer.Argument(help="A run, a checkpoint, an adapter, a merged model, or a base model."),
]
BatchSize = Annotated[
    int, typer.Option(metavar="N", min=1, help="Prompts generated at once, per process.")
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Longest reply in tokens.")]


Replies = Literal["every_reply", "last_reply"]
BleuUnit = Literal["word", "character"]


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
        check_inputs(loaded)
        from finetune.training.run import train as run

        emit(run(loaded.config, config))


@app.command()
def evaluate(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="Runs (all their checkpoints), checkpoints, adapters, merged or base models."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Held-out file, glob or folder; repeatable. By default those of the run.",
        ),
    ] = None,
    base: Annotated[
        bool,
        typer.Option(
            "--base",
            help="Score the untuned model too. Where it lies elsewhere now, name it as a target.",
        ),
    ] = False,
    predictions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Replies made elsewhere, scored as they are; repeatable."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="For evaluation.json and predictions/; by default beside the target.",
        ),
    ] = None,
    replies: Annotated[
        Replies | None, typer.Option(help="Which replies of a dialogue to generate.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Longest reply in tokens.")
    ] = None,
    max_samples: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="At most N replies, the same ones each time."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Prompts generated at once.")
    ] = None,
    bleu_unit: Annotated[
        BleuUnit, typer.Option(help="`character` for LLaMA-Factory's BLEU and ROUGE.")
    ] = "word",
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Your own metric: texts of reply and reference -> a number; repeatable.",
        ),
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A general set; its loss tells what was forgotten."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score models' replies against held-out dialogues, and say which differences are real.

    What is not said here is as in the run that saved the (first) model, so that the numbers are
    those of its training. What was generated before is not generated again.
    """
    changes = {
        "replies": replies,
        "max_new_tokens": max_new_tokens,
        "max_samples": max_samples,
        "batch_size": batch_size,
    }
    with console.json_output(as_json) as emit:
        models = models_in(targets or ())
        from finetune.evaluation.evaluate import Options
        from finetune.evaluation.evaluate import evaluate as run
        from finetune.evaluation.scoring import Scoring

        options = Options(
            with_base=base,
            predictions=tuple(predictions or ()),
            scoring=Scoring(bleu_unit, tuple(metric or ())),
            general=tuple(general or ()),
        )
        emit(run(models, data or (), output=output, changes=changes, options=options))


@app.command()
def predict(
    target: Target,
    data: Annotated[
        list[str], typer.Option(metavar="FILE", help="File, glob or folder; repeatable.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The JSONL file to write.")],
    base: Base = None,
    max_new_tokens: MaxNewTokens = 512,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Write the model's reply to every dialogue of a file."""
    with console.json_output(as_json) as emit:
        target = model_in(target)
        from finetune.evaluation.predict import PredictOptions
        from finetune.evaluation.predict import predict as run

        options = PredictOptions(max_new_tokens=max_new_tokens, batch_size=batch_size)
        emit(run(target, data, output, base=base, options=options))


@app.command()
def chat(
    target: Target,
    base: Base = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Annotated[
        float, typer.Option(metavar="X", min=0, help="0 always takes the likeliest token.")
    ] = 0.0,
) -> None:
    """Talk to a model in the terminal."""
    target = model_in(target)
    from finetune.chat.terminal import chat as run

    run(target, base=base, system=system, max_new_tokens=max_new_tokens, temperature=temperature)


@app.command()
def serve(
    target: Target,
    base: Base = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's id for clients; by default the folder's name.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with the API key; else FINETUNE_API_KEY."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A further Host name of requests; repeatable."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Longest reply where a request names none.")
    ] = 1024,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Bound on prompt and reply; at most the model's."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests answered at once.")
    ] = 8,
    max_requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests taken, waiting ones included.")
    ] = 64,
    max_request_mb: Annotated[
        int, typer.Option(metavar="N", min=1, help="Largest request in MiB.")
    ] = 16,
) -> None:
    """Answer OpenAI's chat completions over HTTP."""
    folder = model_in(target)
    from finetune.serving.serve import ServeOptions
    from finetune.serving.serve import serve as run

    options = ServeOptions(
        host=host,
        port=port,
        name=name,
        api_key_file=api_key_file,
        allow_hosts=tuple(allow_host or ()),
        max_new_tokens=max_new_tokens,
        context=context,
        batch_size=batch_size,
        max_requests=max_requests,
        max_request_mb=max_request_mb,
    )
    run(folder, shown_as=target, base=base, options=options)


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
