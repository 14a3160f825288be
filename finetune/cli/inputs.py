"""What can be checked before anything heavy is imported: do the files exist, and the model?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finetune.artifacts.resolve import is_folder, is_hub_id
from finetune.errors import ConfigError, DataError, FinetuneError, ModelError

if TYPE_CHECKING:
    from finetune.config.load import Loaded
    from finetune.config.schema import DataSection, RunConfig
    from finetune.planning.plan import Gpu, Plan
    from finetune.planning.run_memory import RunMemory


Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace a file that this program did not write, too."),
]
DeviceMap = Annotated[
    Literal["auto"] | None,
    typer.Option(
        "--device-map", help="auto: the layers are shared out over all GPUs of this machine."
    ),
]


def option_names(incomplete: str) -> list[str]:
    """`section.key=` of every option that begins like this, for a shell's completion."""
    from finetune.config.reference import option_keys

    return [f"{key}=" for key in option_keys() if key.startswith(incomplete)]


def check_inputs(loaded: Loaded) -> None:
    """Raises one error that names every path that leads nowhere, and a score that does not exist."""
    config = loaded.config
    problems = _data_problems(config.data, loaded)
    kinds: list[type[FinetuneError]] = [DataError] if problems else []
    path = config.model.path
    if not is_folder(path) and not is_hub_id(path):
        said = (
            f"not a directory, and not a hub id like org/name: {path} (seen from {Path.cwd()}); of a "
            "hub: hf://owner/name or ms://owner/name"
        )
        problems.append(loaded.problem(("model", "path"), said))
        kinds.append(ModelError)
    deepspeed = config.deepspeed.config if config.deepspeed else None
    if deepspeed is not None and not Path(deepspeed).is_file():
        said = f"{deepspeed} is not a file (seen from {Path.cwd()})"
        problems.append(loaded.problem(("deepspeed", "config"), said))
        kinds.append(ConfigError)
    from finetune.evaluation.scores.metrics import best_metric_problem

    if reason := best_metric_problem(config.evaluation.best_metric):
        problems.append(loaded.problem(("evaluation", "best_metric"), reason))
        kinds.append(ConfigError)
    if problems:
        raise kinds[0]("\n  ".join(problems))


def _data_problems(section: DataSection, loaded: Loaded) -> list[str]:
    from finetune.config.schema import held_out_share
    from finetune.data.reading.files import expand

    problems = []
    for name, sources in (("train", section.train), ("validation", section.validation or [])):
        if name == "validation" and held_out_share(section.validation) is not None:
            continue
        for number, source in enumerate([sources] if isinstance(sources, str) else sources):
            key = ("data", name) if isinstance(sources, str) else ("data", name, number)
            try:
                expand(source if isinstance(source, str) else source.path)
            except DataError as error:
                problems.append(loaded.problem(key, str(error)))
    return problems


def check_output_file(output: Path) -> None:
    """Raises ConfigError unless a file of this name, with an ending more, can be written."""
    try:
        if output.is_dir():
            raise ConfigError(f"--output: {output} is a folder; name a file")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name(f"{output.name}.part.batches").exists()  # its name may be too long
        if not os.access(output.parent, os.W_OK | os.X_OK):
            raise ConfigError(
                f"--output: {output} cannot be written (its folder is read-only); choose another place"
            )
    except OSError as error:
        raise ConfigError(
            f"--output: {output} cannot be written ({error.strerror}); choose another place"
        ) from error


def planned(config: RunConfig, gpu: Gpu) -> tuple[RunMemory, Plan]:
    """What a run holds on such GPUs; its rows are as long as `data.max_length`."""
    from finetune.config.load import settled
    from finetune.planning.run_memory import RunMemory

    config = settled(config, gpu.number)
    memory = RunMemory(
        config.model,
        config.method,
        config.training,
        config.deepspeed,
        config.evaluation if config.data.validation is not None else None,
        max_length=config.data.max_length,
        longest=config.data.max_length,
    )
    return memory, memory.plan(gpu)


def gigabytes(text: str) -> int:
    """Bytes of `24GB`, as `--gpu` says it."""
    number = text.upper().removesuffix("GB").removesuffix("G").strip()
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise ConfigError(f"--gpu {text!r} is no size of a GPU's memory; write --gpu 24GB")
    return int(size * 1e9)
