"""What is to be compared: base, checkpoints, merged models and files of predictions, each with a name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Literal

from finetune.artifacts.base_record import recorded_base
from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.resolve import adapter_config, kind_of
from finetune.artifacts.weights import model_fingerprint
from finetune.errors import DataError, ModelError
from finetune.methods import of_adapter

Kind = Literal["base", "adapter", "prefix", "merged", "full", "predictions"]


@dataclass(frozen=True, slots=True)
class Target:
    """One thing that is scored."""

    name: str
    """Unique, and good for a file name."""
    path: str
    kind: Kind
    step: int | None = None
    """Of a checkpoint, its optimizer step."""
    run: str | None = None
    """Of a checkpoint, its run directory."""
    base: str | None = None
    """Where the base of an adapter lies when that is not where its own record says."""
    like: str | None = None
    """Of a base, the checkpoint whose number format it is computed in."""


def find_targets(
    models: Sequence[str], predictions: Sequence[str] = (), *, with_base: bool
) -> list[Target]:
    """The targets in the order in which they are compared, the base first.

    Args:
        models: model folders, adapters and checkpoints, or hub ids.
        predictions: files of replies made elsewhere.
        with_base: whether the untuned model is scored too.

    Raises:
        ModelError: a base cannot be found.
        DataError: a file of predictions does not exist.
    """
    tuned = [_target(path, models) for path in models]
    if with_base:
        tuned = _bases(tuned) + tuned
    for file in predictions:
        if not Path(file).is_file():
            raise DataError(
                f"{file} is no file of predictions (seen from {Path.cwd()}); correct the path"
            )
    files = [Target(Path(file).stem, str(file), "predictions") for file in predictions]
    unique: dict[tuple[str, str], Target] = {}
    for one in [*tuned, *files]:
        unique.setdefault((one.kind, str(Path(one.path).absolute())), one)
    return _named(list(unique.values()))


def _target(path: str, models: Sequence[str]) -> Target:
    folder = Path(path)
    kind = _kind(path)
    step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    run = str(folder.parent) if step else None
    name = f"{folder.absolute().parent.name}-{folder.name}" if step else folder.absolute().name
    moved = _moved_base(folder, models) if kind in ("adapter", "prefix") else None
    return Target(name, path, kind, int(step[1]) if step else None, run, moved)


def _kind(path: str) -> Kind:
    found = kind_of(path)
    if found == "adapter":
        return of_adapter(adapter_config(Path(path)).get("peft_type"), Path(path)).result
    return found if found in ("full", "merged") else "base"


def _moved_base(folder: Path, models: Sequence[str]) -> str | None:
    """A whole model among the targets that is the adapter's own base, when that has moved."""
    path, fingerprint = recorded_base(folder)
    if fingerprint is None or (path and Path(path).is_dir()):
        return None
    whole = [one for one in models if (Path(one) / MODEL_CONFIG).is_file()]
    return next((one for one in whole if model_fingerprint(one) == fingerprint), None)


def _bases(targets: Sequence[Target]) -> list[Target]:
    """The untuned models of the targets, each once."""
    found: dict[str, Target] = {}
    for one in targets:
        if one.kind not in ("adapter", "prefix", "full"):
            continue
        path = one.base or recorded_base(Path(one.path))[0]
        if path:
            found.setdefault(path, Target("base", path, "base", like=one.path))
    if not found and not any(one.kind == "base" for one in targets):
        raise ModelError("--include-base: none of the targets says which model it was tuned from; name it as a target")  # fmt: skip
    return list(found.values())


def _named(targets: list[Target]) -> list[Target]:
    """The targets with names that are unique and hold nothing odd."""
    names: list[str] = []
    for one in targets:
        plain = re.sub(r"[^\w.-]+", "-", one.name).strip("-.") or "target"
        numbered = (f"{plain}-{number}" for number in count(2))
        names.append(next(name for name in chain([plain], numbered) if name not in names))
    return [replace(one, name=name) for one, name in zip(targets, names, strict=True)]
