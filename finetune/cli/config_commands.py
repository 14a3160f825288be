"""`finetune schema | migrate`: configurations: what there is to say in one, and other programs' ones."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from finetune import console
from finetune.cli.inputs import gigabytes, planned
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
    from finetune.evaluation.scores.metrics import CHOOSING

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
    console.say(f"next: torchrun finetune.py {shlex.quote(str(output))}")


@config_app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE ...]", help="Changes to it.")
    ] = None,
    gpu: Annotated[str, typer.Option(metavar="SIZE", help="Memory of a GPU, as 24GB.")] = "80GB",
    gpus: Annotated[int, typer.Option(metavar="N", min=1, help="How many there are.")] = 1,
    peak: Annotated[
        float, typer.Option(metavar="TFLOPS", min=1, help="bf16 TFLOP/s of a GPU (an H100's).")
    ] = 989.0,
    share: Annotated[
        float, typer.Option(metavar="SHARE", min=0.01, max=1, help="Of the peak that is reached.")
    ] = 0.4,
    bf16: Annotated[
        bool, typer.Option(help="Whether the GPU has bfloat16 in hardware; V100 and T4 have not.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead.")] = False,
) -> None:
    """What a run will take: memory of a GPU, tokens, time and disk. Counted in seconds, on any machine.

    The model's folder needs no more than a config.json.
    """
    from finetune.config.load import load_config
    from finetune.planning import words
    from finetune.planning.evaluating import planned_evaluation
    from finetune.planning.plan import Gpu

    size, flops = gigabytes(gpu), 1e12 * peak
    machine = Gpu(size, number=gpus, peak_flops=flops, share=share, native_bf16=bf16)
    asked = load_config(config, overrides or [])
    memory, found = planned(asked, machine)
    evaluation = planned_evaluation(found, asked.model, asked.data, asked.evaluation)
    if as_json:
        with console.json_output() as emit:
            emit(found.numbers() | (evaluation.numbers() if evaluation else {}))
        return
    more = evaluation.rows() if evaluation else []
    console.table([str(config), f"{gpus} x {gpu}"], [*words.rows(found), *more])
    for knob in words.knobs(found, memory.less()):
        console.say(knob)
