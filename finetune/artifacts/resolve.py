"""What is this path? A hub id, a base, a merged or fully tuned model, an adapter, or a run. No torch.

path or id  ->  kind_of       which of them it is
->  local_folder  the folder of a model, downloaded where it is a hub id
->  find_source   of a run, the checkpoint that stands for it
->  model_base    the weights that an adapter is opened on
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune import console
from finetune.artifacts import checkpoint, hub
from finetune.artifacts.base_record import read_base_record
from finetune.artifacts.names import (
    ADAPTER_CONFIG,
    BASE_RECORD,
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    MANIFEST,
    MODEL_CONFIG,
    OLDER_CHAT_TEMPLATE,
    PREPROCESSOR_CONFIG,
    SENTENCEPIECE,
    TOKENIZER,
    TOKENIZER_CONFIG,
)
from finetune.artifacts.plain_files import check_folder, read_json
from finetune.errors import CheckpointError, ConfigError, ModelError
from finetune.storage.manifest import verify

Kind = Literal["hub", "base", "merged", "full", "adapter", "run", "nothing"]

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", SENTENCEPIECE)
"""What is fetched of a hub id's repository; never code, never a pickle."""
TOKENIZER_FILES = (
    TOKENIZER, SENTENCEPIECE, TOKENIZER_CONFIG, CHAT_TEMPLATE, OLDER_CHAT_TEMPLATE, MODEL_CONFIG,
    GENERATION_CONFIG, PREPROCESSOR_CONFIG,
)  # fmt: skip
"""The few of them that laying out a dialogue needs."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the weights of something lie: a folder, or a hub id at a revision."""

    path: str
    revision: str | None = None


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there; False, and no error, for a name that no file system takes."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for a name that is too long


def is_hub_name(name: str) -> bool:
    """Whether it is of the form `owner/name`."""
    return hub.NAME.fullmatch(name) is not None


def pinned_revision(path: str, revision: str | None) -> str | None:
    """The commit that a hub id stands for now; `revision` itself where there is none."""
    if not is_hub_id(path):
        return revision
    return hub.commit_of(local_folder(path, revision, files=TOKENIZER_FILES)) or revision


def is_hub_id(path: str | Path) -> bool:
    """Whether it names a repository of a hub, and nothing of that name lies here."""
    return hub.repository(path) is not None and not os.path.lexists(path)


def is_adapter(path: str | Path) -> bool:
    """Whether it is an adapter, which needs a base."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def is_model_or_adapter(path: str | Path) -> bool:
    """Whether it can be opened as it is; a run cannot, one of its checkpoints can."""
    return is_adapter(path) or (Path(path) / MODEL_CONFIG).is_file()


def kind_of(path: str | Path) -> Kind:
    """Which of the kinds it is, by the files in it; of an adapter `methods` knows which method's."""
    folder = Path(path)
    if not is_folder(path):
        return "hub" if is_hub_id(path) else "nothing"
    if is_adapter(folder):
        return "adapter"
    if (folder / MODEL_CONFIG).is_file():
        if (folder / BASE_RECORD).is_file():
            return "full"
        return "merged" if (folder / MANIFEST).is_file() else "base"
    return "run" if checkpoint.checkpoints(folder) else "nothing"


def check_no_adapter(path: str | Path) -> None:
    """ModelError when it is an adapter, or a run with adapters, which nothing can be trained on top of alone."""
    kind = kind_of(path)
    found = checkpoint.checkpoints(Path(path)) if kind == "run" else []
    if kind == "adapter" or any(map(is_adapter, found)):
        raise ModelError(
            f"model.path: {path} is {'a run' if found else 'an adapter'}; to train its adapter further set "
            f"model.path to its base and model.adapter to {path}, or merge it first (finetune merge)"
        )
    if kind == "run":
        raise ModelError(
            f"model.path: {path} is a run; name one of its checkpoints, such as {found[-1]}"
        )


def adapter_config(folder: Path) -> dict[str, Any]:
    """What PEFT's adapter_config.json in `folder` says; ModelError when it is damaged."""
    return read_json(folder / ADAPTER_CONFIG)


def local_folder(
    path: str | Path, revision: str | None = None, *, files: Sequence[str] = MODEL_FILES
) -> Path:
    """The model's folder; of a hub id the snapshot, downloaded when it is not there.

    Args:
        path: A folder or a hub id.
        revision: The hub revision when `path` is a hub id.
        files: Patterns of the files that are fetched of a hub id.

    Raises:
        ModelError: It is neither, or cannot be fetched.
    """
    if is_folder(path):
        return Path(path)
    if not is_hub_id(path):
        raise ModelError(
            f"{path}: no such checkpoint folder, and not a hub id like org/name "
            f"(seen from {Path.cwd()}); correct the path or the name"
        )
    return hub.fetch(str(path), "model", files, revision)


def model_base(target: str | Path, base: str | None = None) -> Weights:
    """The weights to load for `target`: an adapter's base, or the whole model itself.

    Args:
        target: A model, a hub id, or an adapter.
        base: Of an adapter, where its base is now; wins over what the adapter says.
    """
    if not is_adapter(target):
        if base is not None:
            raise ModelError(f"{target} is a whole model, not an adapter: leave the base out")
        return Weights(str(target))
    if base:
        return Weights(base)
    config = adapter_config(Path(target))
    if not (path := config.get("base_model_name_or_path")):
        raise ModelError(
            f"{Path(target) / ADAPTER_CONFIG} names no base model; give it with --base"
        )
    return Weights(str(path), config.get("revision"))


def tokenizer_source(weights: Weights) -> Weights:
    """Where the tokenizer of a whole model lies: beside it, else with the base it was tuned from."""
    folder = Path(weights.path)
    there = any((folder / name).is_file() for name in (TOKENIZER, SENTENCEPIECE))
    if not folder.is_dir() or there or not (record := read_base_record(folder)):
        return weights
    return Weights(record.path, record.revision)


def find_source(path: Path) -> tuple[Path, list[str]]:
    """The folder that `path` stands for, and what a user is to be told about the choice.

    A model or an adapter stands for itself; a run for its best checkpoint, else its newest good one.
    Verified wherever there is a manifest.

    Raises:
        ConfigError: There is no such folder.
        CheckpointError: It is damaged, or holds nothing that can be used.
    """
    if not is_folder(path):
        raise ConfigError(f"not a directory: {path}; give a run, a checkpoint or an adapter")
    if is_model_or_adapter(path):
        problems = verify(path) if (path / MANIFEST).is_file() else []
        if problems:
            raise CheckpointError(
                f"{path} is damaged: {'; '.join(problems)}. Copy it again, or give another checkpoint"
            )
        return path, []
    best = checkpoint.best(path)
    if best is not None and not verify(best):
        return best, [f"took {best.name}, the best of {path}"]
    newest, skipped = checkpoint.newest_good(path)
    if newest is None:
        listed = "".join(f"\n  {folder.name}: {reason}" for folder, reason in skipped)
        raise CheckpointError(
            f"{path} holds no adapter, model or good checkpoint; `finetune status {path}` says how far a "
            f"run is{listed}"
        )
    notes = [f"passed over {folder.name}: {reason}" for folder, reason in skipped]
    return newest, [*notes, f"took {newest.name}, the newest good one of {path}"]


def model_in(target: str) -> str:
    """What a command's `target` stands for: itself, or a run's checkpoint, which is said.

    Raises:
        ModelError: It is neither a folder nor a hub id.
    """
    if not is_folder(target):
        if not is_hub_id(target):
            raise ModelError(
                f"not a directory: {target} (seen from {Path.cwd()}); correct the path"
            )
        return target
    if is_model_or_adapter(target):
        return target
    found, notes = find_source(Path(target))
    for note in notes:
        console.say(note)
    return str(found)


def models_in(targets: Sequence[str]) -> list[str]:
    """What an evaluation's `targets` stand for: of a run, all its good checkpoints, oldest first."""
    found = []
    for target in targets:
        folders = checkpoint.checkpoints(Path(target)) if is_folder(target) else []
        if not folders or is_model_or_adapter(target):
            found.append(model_in(target))
            continue
        steps = {
            checkpoint.step_of(folder) for folder in folders if checkpoint.is_resumable(folder)
        }
        for folder in folders:
            if not checkpoint.is_resumable(folder) and checkpoint.step_of(folder) in steps:
                continue  # the same weights
            if problems := verify(folder):
                console.say(f"passed over {folder.name}: {'; '.join(problems)}")
            else:
                found.append(str(folder))
    return found


def check_openable(target: str | Path) -> None:
    """Refuse a folder that is no model and no adapter; of a run, say which checkpoint to give."""
    folder = Path(target)
    if not folder.is_dir():
        return
    check_folder(folder)
    if is_model_or_adapter(folder):
        return
    if found := checkpoint.checkpoints(folder):
        raise ModelError(f"{folder} is a run; give one of its checkpoints, such as {found[-1]}")
    raise ModelError(
        f"{folder} has neither {MODEL_CONFIG} nor {ADAPTER_CONFIG}; give the folder of a model, "
        "an adapter or a checkpoint"
    )
