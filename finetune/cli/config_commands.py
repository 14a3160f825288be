"""`finetune schema | migrate`: configurations: what there is to say in one, and other programs' ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune import console
from finetune.errors import ConfigError

config_app = typer.Typer(rich_markup_mode=None)


@config_app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The reference page for people instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of a configuration."""
    from finetune.config.load import json_schema, reference_page

    if markdown:
        console.say(reference_page().rstrip())
        return
    from finetune.evaluation.metrics import CHOOSING

    found = json_schema()
    found["$defs"]["EvaluationSection"]["properties"]["best_metric"]["enum"] = CHOOSING
    with console.json_output() as emit:
        emit(found)


@config_app.command()
def migrate(
    old: Annotated[
        Path, typer.Argument(metavar="OLD", help="The other program's YAML or JSON file.")
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The new configuration; printed without it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model, if OLD does not name it.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="The data, or the folder OLD's files lie in.")
    ] = None,
) -> None:
    """Convert a configuration of another program.

    Of the original GLM-4 demo, LLaMA-Factory, ms-swift, axolotl or TRL, with a word on every option.
    """
    from finetune.config.migrate import migrate as run
    from finetune.storage.files import whole_file

    found = run(old, model=model, data=data)
    if output is None:
        console.say(found.text().rstrip())
        return
    if output.exists():
        raise ConfigError(f"{output} exists already; choose another --output or remove it first")
    with whole_file(output) as file:
        file.write(found.text())
    console.say(f"{output}: {len(found.origins)} options of {found.program} are in it")
    for name, why in found.left.items():
        console.say(f"  not in it: {name}: {why}")
    for command in found.commands:
        console.say(f"  {command}")
    if found.to_fill_in:
        console.warn(f"write these into it: {', '.join(found.to_fill_in)}")
    console.say(f"next: torchrun finetune.py {output}")
