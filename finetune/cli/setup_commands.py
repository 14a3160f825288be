"""`finetune init | doctor | launch | help | completion`: a first configuration, is the machine ready, a run on all of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from finetune import console
from finetune.cli.data_commands import Json
from finetune.cli.inputs import check_output_file, gigabytes
from finetune.errors import ConfigError

setup_app = typer.Typer(rich_markup_mode=None)

COMPLETION = "_FINETUNE_COMPLETE"
"""The variable by which a shell asks how a line may go on."""


@setup_app.command()
def init(
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Your rows: a file, a glob or a folder.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model folder, or a hub id.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", min=1, help="How many GPUs.")] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of each, as 24GB.")
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="The configuration; must not be there yet.")
    ] = Path("my.yaml"),
) -> None:
    """Write a first configuration that fits.

    Looks at the data and counts what the model takes on the card. What is not given is asked for.
    """
    check_output_file(output)
    if output.exists():
        raise ConfigError(f"{output} exists already; choose another --output or remove it first")
    data = data or _ask("--data", "Data (a file, a glob or a folder)")
    model = model or _ask("--model", "Model", "THUDM/glm-4-9b-chat")
    gpus = gpus or int(_ask("--gpus", "GPUs", 1))
    size = gigabytes(gpu or _ask("--gpu", "Memory of each GPU", "24GB"))
    from finetune.cli.init import draft
    from finetune.planning.plan import Gpu
    from finetune.planning.words import in_short
    from finetune.storage.files import write_file

    found = draft(data, model, Gpu(bytes=size, number=gpus), output)
    write_file(output, found.text())
    console.say(f"{output}: {in_short(found.plan)} on each GPU")
    console.say(f"next: {found.command} --dry-run" if gpus == 1 else f"next: {found.command}")


def _ask(option: str, what: str, default: str | int | None = None) -> str:
    """What a person at the terminal says; ConfigError where there is none."""
    if not sys.stdin.isatty():
        raise ConfigError(f"{option} is not given, and there is no terminal to ask on; give it")
    return str(typer.prompt(what, default=default, err=True))


@setup_app.command()
def doctor(
    online: Annotated[
        bool, typer.Option("--online", help="Ask the model hub too; needs the network.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check versions, GPUs, disk and ports.

    Says what to do about whatever a run would stumble over; exit code 1 when there is something.
    """
    from finetune.cli.doctor import examine

    with console.json_output(as_json) as emit:
        findings = examine(hub=online)
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


@setup_app.command("help")
def help_topic(
    topic: Annotated[
        str | None, typer.Argument(metavar="TOPIC", help="A page, or a command; none lists them.")
    ] = None,
) -> None:
    """Show a page of the documentation.

    `finetune help masks`, `finetune help exit_codes`; of a command, `finetune help "data check"`.
    """
    from finetune.language import pages

    if topic is None:
        console.table(["topic", ""], [[name, title] for name, title in pages.topics().items()])
        return
    text = pages.topic(topic)
    if text is None:
        from finetune.cli import main

        _check_topic(topic)
        main([*topic.split(), "--help"])
    console.say(text or "")


def _check_topic(topic: str) -> None:
    """ConfigError unless the words are a command's."""
    from difflib import get_close_matches

    from finetune.cli.commands import app
    from finetune.language import pages

    command: Any = typer.main.get_command(app)
    for word in topic.split():
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            near = get_close_matches(topic, pages.topics(), n=1)
            said = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"there is no topic {topic!r}{said}; `finetune help` lists them")


@setup_app.command()
def completion(
    shell: Annotated[
        Literal["bash", "zsh", "fish", "powershell"], typer.Argument(help="Which shell.")
    ],
) -> None:
    """Print a script for completion by TAB.

    Bash: `finetune completion bash >> ~/.bashrc`; commands, options and `section.key=` are completed.
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    console.say(get_completion_script(prog_name="finetune", complete_var=COMPLETION, shell=shell))
