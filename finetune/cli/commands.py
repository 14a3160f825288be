"""All commands, and `finetune train`: each reads its options, imports what it needs, calls one function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune import console
from finetune.cli.bench_commands import bench_app
from finetune.cli.config_commands import config_app
from finetune.cli.data_commands import Json, data_app
from finetune.cli.evaluation_commands import evaluation_app
from finetune.cli.export_commands import export_app
from finetune.cli.floors import check_versions
from finetune.cli.inference_commands import using_app
from finetune.cli.inputs import check_inputs, option_names
from finetune.cli.report_commands import report_app
from finetune.cli.setup_commands import setup_app

app = typer.Typer(
    epilog="`finetune.py configs/lora.yaml` without a command trains. `finetune schema --markdown` "
    "describes every option of a configuration.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help pages answer three times as fast
    pretty_exceptions_enable=False,
)
app.add_typer(evaluation_app)
app.add_typer(config_app)
app.add_typer(data_app, name="data")
app.add_typer(export_app)
app.add_typer(report_app)
app.add_typer(setup_app)
app.add_typer(using_app)
app.add_typer(bench_app)


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
    hub: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Where names like owner/name come from: huggingface or modelscope; allowed anywhere.",
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """Fine-tune GLM-4: train, evaluate, predict, merge, chat."""
    check_versions()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The YAML file of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[section.key=value]...",
            help="Options that win over the file's.",
            autocompletion=option_names,
        ),
    ] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print every option's value, and stop there.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Everything but the steps: config, data, model, plan."),
    ] = False,
    trust_checkpoint: Annotated[
        bool,
        typer.Option(
            "--trust-checkpoint", help="Resume DeepSpeed states that another user wrote, too."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train; a run that was interrupted goes on where it stopped."""
    from finetune.config.load import config_tree, dump_config, load

    loaded = load(config, overrides or ())
    with console.json_output(as_json) as emit:
        for note in loaded.notes:
            console.warn(note)
        if show_config:
            emit(config_tree(loaded.config))
            if not as_json:
                console.say(dump_config(loaded.config).rstrip())
            return
        check_inputs(loaded)
        from finetune.training import run

        if dry_run:
            emit(run.dry_run(loaded.config, trust_checkpoint=trust_checkpoint))
        else:
            emit(run.train(loaded.config, trust_checkpoint=trust_checkpoint))
