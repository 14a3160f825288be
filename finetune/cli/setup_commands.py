"""`finetune doctor | launch`: is the machine ready, and a run on several processes of it."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune import console
from finetune.cli.data_commands import Json

setup_app = typer.Typer(rich_markup_mode=None)


@setup_app.command()
def doctor(
    hub: Annotated[
        bool, typer.Option("--hub", help="Ask the model hub too; needs the network.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check versions, GPUs, disk and ports.

    Says what to do about whatever a run would stumble over; exit code 1 when there is something.
    """
    from finetune.cli.doctor import examine

    with console.json_output(as_json) as emit:
        findings = examine(hub=hub)
        console.table(
            ["", "found", ""], [[f.what, f.found, "ok" if f.is_well else "!"] for f in findings]
        )
        for finding in findings:
            if not finding.is_well:
                console.warn(f"{finding.what}: {finding.found}: {finding.remedy}")
        emit([{"what": f.what, "found": f.found, "remedy": f.remedy} for f in findings])
    if any(not finding.is_well for finding in findings):
        raise typer.Exit(1)


@setup_app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    context: typer.Context,
    processes: Annotated[
        str,
        typer.Option("--processes", "-n", metavar="N", help="Processes here; `gpu`: one a GPU."),
    ] = "gpu",
) -> None:
    """Train on all GPUs of this machine.

    `finetune launch configs/lora.yaml` is `torchrun --standalone --nproc_per_node=gpu finetune.py
    configs/lora.yaml`, but one error is one message, and the exit code is the run's own. Other
    options of torchrun (`--nnodes`, `--rdzv-endpoint` …) go in front of the configuration.
    """
    from finetune.cli.launch import launch as run

    raise typer.Exit(run(processes, context.args))
