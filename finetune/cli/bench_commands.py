"""`finetune bench`: how fast a model is here."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune import console
from finetune.artifacts.resolve import model_in
from finetune.cli.data_commands import Json
from finetune.cli.export_commands import Base
from finetune.cli.inference_commands import Quantization, Target
from finetune.cli.inputs import DeviceMap

bench_app = typer.Typer(rich_markup_mode=None)


@bench_app.command()
def bench(
    target: Target,
    lengths: Annotated[
        str,
        typer.Option(metavar="LENGTHS", help="Tokens of the prompts, such as 1k..128k or 1k,8k."),
    ] = "1k..128k",
    new_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens that are written behind each.")
    ] = 64,
    base: Base = None,
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    as_json: Json = False,
) -> None:
    """Measure how fast a model reads and writes, and its memory."""
    with console.json_output(as_json) as emit:
        from finetune.evaluation.tasks.speed import bench as run
        from finetune.evaluation.tasks.speed import lengths_of
        from finetune.generation.settings import Placement

        asked = lengths_of(lengths)
        placement = Placement(device_map, quantization)
        emit(run(model_in(target), asked, new_tokens=new_tokens, base=base, placement=placement))
