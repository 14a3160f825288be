"""What can be checked before anything heavy is imported: do the files exist, which model is meant?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune import console
from finetune.errors import ConfigError, DataError, FinetuneError, ModelError

if TYPE_CHECKING:
    from finetune.config import DataSection, RunConfig


def check_inputs(config: RunConfig) -> None:
    """Raises one error that names every path of the configuration that leads nowhere."""
    problems = _data_problems(config.data)
    kinds: list[type[FinetuneError]] = [DataError] if problems else []
    path = config.model.path
    if _is_local(path) and not Path(path).is_dir():
        problems.append(f"model.path: {path} is not a folder (seen from {Path.cwd()})")
        kinds.append(ModelError)
    deepspeed = config.deepspeed.config if config.deepspeed else None
    if deepspeed is not None and not Path(deepspeed).is_file():
        problems.append(f"deepspeed.config: {deepspeed} is not a file (seen from {Path.cwd()})")
        kinds.append(ConfigError)
    if problems:
        raise kinds[0]("\n  ".join(problems))


def model_in(target: str) -> str:
    """What `target` means: of a run, its best or else its newest good checkpoint, and says which."""
    folder = Path(target)
    if not folder.is_dir():
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


def _data_problems(section: DataSection) -> list[str]:
    from finetune.data.files import expand

    problems = []
    for key, sources in (("train", section.train), ("validation", section.validation or [])):
        for source in [sources] if isinstance(sources, str) else sources:
            try:
                expand(source if isinstance(source, str) else source.path)
            except DataError as error:
                problems.append(f"data.{key}: {error}")
    return problems


def _is_local(path: str) -> bool:
    """True where a path cannot be a hub id, which is `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1
