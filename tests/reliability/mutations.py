"""Safeguards that can be taken out, each with cases that must then fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Mutation:
    """One safeguard."""

    cases: str
    """`suite:group`, as on the command line."""
    remove: Callable[[], None]
    """Takes it out of this process."""


def no_fsync() -> None:
    """Nothing is forced to the disk."""
    import os

    from finetune.training import checkpoint, manifest

    without = SimpleNamespace(**{**vars(os), "fsync": lambda descriptor: None})
    manifest.os = checkpoint.os = without  # type: ignore[attr-defined]


def no_manifest_check() -> None:
    """Every checkpoint is believed."""
    from finetune.training import checkpoint, resume

    def believing(folder: Path) -> list[str]:
        return []

    checkpoint.verify = resume.verify = believing  # type: ignore[attr-defined]


def no_staging() -> None:
    """A checkpoint is written where it is to be."""
    from finetune.training import checkpoint

    def commit(stage: Path, final: Path, **_: Any) -> None:
        checkpoint.seal(stage)

    checkpoint.stage_path = lambda final: final  # type: ignore[assignment]
    checkpoint.commit = commit  # type: ignore[assignment]


MUTATIONS = {
    "fsync": Mutation("saves:power", no_fsync),
    "the manifest check": Mutation("saves:damage", no_manifest_check),
    "staging": Mutation("saves:crash", no_staging),
}
