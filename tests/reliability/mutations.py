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

    from finetune.storage import files, manifest

    without = SimpleNamespace(**{**vars(os), "fsync": lambda descriptor: None})
    manifest.os = files.os = without  # type: ignore[attr-defined]


def no_manifest_check() -> None:
    """Every checkpoint is believed."""
    from finetune.storage import folders
    from finetune.training import resume

    def believing(folder: Path) -> list[str]:
        return []

    folders.verify = resume.verify = believing  # type: ignore[attr-defined]


def no_staging() -> None:
    """A checkpoint is written where it is to be."""
    from finetune.storage import folders

    stage_path, commit_whole = folders.stage_path, folders.commit

    def is_checkpoint(final: Path) -> bool:
        return final.name.startswith("checkpoint-")

    def commit(stage: Path, final: Path, **options: Any) -> None:
        if is_checkpoint(final):
            folders.seal(stage)
        else:
            commit_whole(stage, final, **options)

    folders.stage_path = lambda final: final if is_checkpoint(final) else stage_path(final)
    folders.commit = commit  # type: ignore[assignment]


def no_plain_tokenizer() -> None:
    """Text from data goes through the tokenizer that knows control strings."""
    from finetune.data.chat import tokenizer

    tokenizer._without_added_tokens = lambda backend: backend  # type: ignore[assignment]


def no_guard() -> None:
    """Losses and gradients are learned whatever they are."""
    from finetune.training.trainer import FineTuner

    FineTuner._guard = lambda *_: None  # type: ignore[method-assign]


def no_base_check() -> None:
    """An adapter may be opened on any base, a merge is given any."""
    from finetune.export import merge
    from finetune.methods import lora, ptuning_v2

    def believing(*_: Any, **__: Any) -> list[str]:
        return []

    lora.check_base = ptuning_v2.check_base = merge.check_base = believing  # type: ignore[attr-defined]


def no_safe_loading() -> None:
    """torch.load opens what it is given."""
    import torch

    original = torch.load
    torch.load = lambda *a, **o: original(*a, **{**o, "weights_only": False})


MUTATIONS = {
    "a tokenizer for text": Mutation("inputs:controls", no_plain_tokenizer),
    "the guard of numbers": Mutation("inputs:numbers", no_guard),
    "the check of the base": Mutation("artifacts:bases", no_base_check),
    "weights_only": Mutation("security:pickles", no_safe_loading),
    "fsync": Mutation("saves:power", no_fsync),
    "the manifest check": Mutation("saves:damage", no_manifest_check),
    "staging": Mutation("saves:crash", no_staging),
}
