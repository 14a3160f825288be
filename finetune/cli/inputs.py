"""What can be checked before anything heavy is imported: do the files of a run exist?"""

from __future__ import annotations

from pathlib import Path

from finetune.config import DataSection, RunConfig
from finetune.errors import DataError, FinetuneError, ModelError


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
        kinds.append(FinetuneError)
    if problems:
        raise kinds[0]("\n  ".join(problems))


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
