"""What can be checked before anything heavy is imported: do the files exist, which model is meant?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune import console
from finetune.errors import ConfigError, DataError, FinetuneError, ModelError

if TYPE_CHECKING:
    from finetune.config.load import Loaded
    from finetune.config.schema import DataSection


Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace a file that this program did not write, too."),
]


def check_inputs(loaded: Loaded) -> None:
    """Raises one error that names every path that leads nowhere, and a score that does not exist."""
    config = loaded.config
    problems = _data_problems(config.data, loaded)
    kinds: list[type[FinetuneError]] = [DataError] if problems else []
    path = config.model.path
    if _is_local(path) and not _is_folder(path):
        said = f"{path} is not a folder (seen from {Path.cwd()})"
        problems.append(loaded.problem(("model", "path"), said))
        kinds.append(ModelError)
    deepspeed = config.deepspeed.config if config.deepspeed else None
    if deepspeed is not None and not Path(deepspeed).is_file():
        said = f"{deepspeed} is not a file (seen from {Path.cwd()})"
        problems.append(loaded.problem(("deepspeed", "config"), said))
        kinds.append(ConfigError)
    from finetune.evaluation.metrics import best_metric_problem

    if reason := best_metric_problem(config.evaluation.best_metric):
        problems.append(loaded.problem(("evaluation", "best_metric"), reason))
        kinds.append(ConfigError)
    if problems:
        raise kinds[0]("\n  ".join(problems))


def model_in(target: str) -> str:
    """What `target` means: of a run, its best or else its newest good checkpoint, and says which."""
    folder = Path(target)
    if not _is_folder(target):
        if _is_local(target):
            raise ModelError(f"{target} is not a folder (seen from {Path.cwd()})")
        return target
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return target
    from finetune.export.merge import find_source

    found, notes = find_source(folder)
    for note in notes:
        console.say(note)
    return str(found)


def models_in(targets: Sequence[str]) -> list[str]:
    """What `targets` mean for an evaluation: of a run, all its good checkpoints, oldest first."""
    from finetune.artifacts.checkpoint import checkpoints
    from finetune.storage.manifest import verify

    found = []
    for target in targets:
        folder = Path(target)
        whole = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
        if whole or not folder.is_dir() or not (there := checkpoints(folder)):
            found.append(model_in(target))
            continue
        for checkpoint in there:
            if problems := verify(checkpoint):
                console.say(f"passed over {checkpoint.name}: {'; '.join(problems)}")
            else:
                found.append(str(checkpoint))
    return found


def _data_problems(section: DataSection, loaded: Loaded) -> list[str]:
    from finetune.data.reading.files import expand

    problems = []
    for name, sources in (("train", section.train), ("validation", section.validation or [])):
        for number, source in enumerate([sources] if isinstance(sources, str) else sources):
            key = ("data", name) if isinstance(sources, str) else ("data", name, number)
            try:
                expand(source if isinstance(source, str) else source.path)
            except DataError as error:
                problems.append(loaded.problem(key, str(error)))
    return problems


def _is_folder(path: str) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for a name that is too long


def _is_local(path: str) -> bool:
    """True where a path cannot be a hub id, which is `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def check_output_file(output: Path) -> None:
    """Raises ConfigError unless a file of this name, with an ending more, can be written."""
    try:
        if output.is_dir():
            raise ConfigError(f"--output: {output} is a folder; name a file")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name(f"{output.name}.part.json").exists()  # its name may be too long
        if not os.access(output.parent, os.W_OK | os.X_OK):
            raise ConfigError(f"--output: {output} cannot be written (its folder is read-only)")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"--output: {output} cannot be written ({reason})") from error
