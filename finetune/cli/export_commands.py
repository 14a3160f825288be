"""`finetune merge | export | push`: checkpoints that open elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune import console
from finetune.cli.data_commands import Json
from finetune.cli.inputs import DeviceMap
from finetune.errors import ConfigError

export_app = typer.Typer()

Base = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="The base model, when it is not where the adapter says."),
]
Output = Annotated[
    Path, typer.Option(metavar="FOLDER", help="The folder to write; must not exist yet.")
]
Checked = Annotated[
    Literal["tensors", "full"],
    typer.Option(
        help="tensors: every changed row while it is written. full: forward passes too, which load "
        "the model twice."
    ),
]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Check nothing.")]
Dtype = Literal["bfloat16", "float16", "float32"]


@export_app.command()
def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help="An adapter, a checkpoint, or a run; several are added up, each as ADAPTER:WEIGHT.",
        ),
    ],
    output: Output,
    base: Base = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype to write; by default the base's.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Merge even when the base is not the adapter's own.")
    ] = False,
    check: Checked = "tensors",
    device_map: DeviceMap = None,
    no_check: NoCheck = False,
    as_json: Json = False,
) -> None:
    """Fold adapters into their base: a plain checkpoint."""
    with console.json_output(as_json) as emit:
        from finetune.export.merge import merge as run

        sources = [_weighted(adapter) for adapter in adapters]
        location = Path(base) if base else None
        chosen = "none" if no_check else check
        report = run(
            sources,
            output,
            base=location,
            dtype=dtype,
            force=force,
            check=chosen,
            device_map=device_map,
        )
        for note in report.notes:
            console.say(f"note: {note}")
        named = " + ".join(
            str(source) if weight == 1 else f"{weight:g} x {source}"
            for source, weight in report.source
        )
        console.say(
            f"{report.output}: {named} merged into {report.base}, {report.num_updated} "
            f"tensors updated, {report.num_bytes / 1e9:.2f} GB in {report.seconds:.0f} s"
        )
        _say_difference(report.largest_difference)
        emit(report)


@export_app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A model, an adapter, or a run.")
    ],
    layout: Annotated[
        Literal["published", "hf"],
        typer.Option(help="published: model_type chatglm. hf: transformers' glm."),
    ],
    output: Output,
    base: Base = None,
    new_base: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="The base in that layout, for an adapter to name."),
    ] = None,
    check: Checked = "tensors",
    no_check: NoCheck = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in the other layout.

    Of a GLM-4 text model or of its LoRA adapter.
    """
    with console.json_output(as_json) as emit:
        from finetune.export.convert import export as run

        chosen = "none" if no_check else check
        report = run(source, output, layout=layout, base=base, new_base=new_base, check=chosen)
        for note in report.notes:
            console.say(f"note: {note}")
        console.say(
            f"{report.output}: {report.source} in the {report.layout} layout, {report.num_tensors} "
            f"tensors, {report.num_bytes / 1e9:.2f} GB in {report.seconds:.0f} s"
        )
        _say_difference(report.largest_difference)
        emit(report)


@export_app.command()
def push(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of merge or export, an adapter, or a run.")
    ],
    repo: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="The model repository; made if need be.")
    ],
    yes: Annotated[
        bool, typer.Option("--yes", help="Send it. Without, only say what would be sent.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    base: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Of an adapter: its base's name on the hub."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload a checkpoint to the Hugging Face hub.

    Needs --yes, and a token in HF_TOKEN or of `hf auth login`.
    """
    with console.json_output(as_json) as emit:
        from finetune.export.push import push as run

        report = run(source, repo, send=yes, public=public, base=base)
        for note in report.notes:
            console.say(f"note: {note}")
        for name, size in report.files.items():
            console.say(f"  {name}  {size / 1e6:.2f} MB")
        kind = "private" if report.private else "public"
        total = sum(report.files.values()) / 1e9
        what = f"{len(report.files)} files, {total:.2f} GB, of {report.source}"
        if report.address is None:
            console.say(f"{what} would go to {repo} ({kind}); nothing was sent: add --yes")
        else:
            console.say(f"{what} are at {report.address} ({kind})")
        emit(report)


def _weighted(text: str) -> tuple[Path, float]:
    """`runs/a:0.5` as the folder and its weight; a folder of that very name wins."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).is_dir():
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise ConfigError(
            f"{text}: the weight must be a number, got {weight!r}; write ADAPTER:0.5"
        ) from None


def _say_difference(largest: float | None) -> None:
    if largest is not None:
        console.say(f"largest difference of the logits: {largest:.2e}")
