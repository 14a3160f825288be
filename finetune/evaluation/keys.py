"""What tells one result from another, by content: nothing depends on where things lie."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.artifacts.base_record import recorded_base
from finetune.artifacts.names import ADAPTER_CONFIG
from finetune.artifacts.resolve import is_adapter
from finetune.artifacts.weights import model_fingerprint
from finetune.data.reading.files import expand
from finetune.distributed import hardware
from finetune.evaluation.options import GENERATING, Options, request
from finetune.evaluation.scoring import versions
from finetune.evaluation.targets import Target
from finetune.evaluation.tasks import plan
from finetune.evaluation.tasks.harness import harness_version
from finetune.evaluation.tasks.plan import Task
from finetune.generation.settings import Placement, Settings, settings_of
from finetune.storage.cache import key_of
from finetune.storage.files import file_digest
from finetune.storage.seen import SeenFiles

FORMAT = 3
"""Version of how replies are generated; results of another one are not used."""
_TASK_FILES = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
"""Endings of what a task of the user's own may read beside its YAML."""


def evaluation_key(target: Target, settings: Settings, options: Options, seen: SeenFiles) -> str:
    """Changes with whatever decides the replies and losses of a model."""
    key: dict[str, Any] = {
        "format": FORMAT,
        "model": model_key(target.path, target.base),
        "data": [(str(file), digest) for file, (_, digest) in seen.states.items()],
        "sources": [asdict(source) for source in settings.sources],
        "reading": asdict(settings.reading),
        "asked": request(settings, options),
        "loss": [settings.loss_batch_size, settings.seed],
        "number format": _number_format(target, options.placement),
        "versions": versions(GENERATING),
    }
    # What a hub id or a server stands for may change.
    if key["model"] is None or options.by.endpoint:
        key["process"] = time.time_ns()
    return key_of(key)


def model_key(path: str, base: str | None) -> dict[str, Any] | None:
    """What tells one model from another by content; None for one that is not on this disk."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    key: dict[str, Any] = {"texts": _texts(folder)}
    if not is_adapter(folder):
        return key | {"weights": model_fingerprint(folder)}
    key["weights"] = {f.name: file_digest(f) for f in sorted(folder.glob("adapter_model*"))}
    recorded, _ = recorded_base(folder)
    inner = model_key(base or recorded or "", None)
    return key | {"base": inner} if inner else None


def tasks_key(names: Sequence[str], most: int | None, data: str | None = None) -> str:
    """Changes with the tasks that are asked, their files, the number of their questions and their harness."""
    key = {
        "format": 3,
        "tasks": [[*asdict(task).values(), _task_files(task)] for task in plan.read_tasks(names)],
        "most": most,
        "data": data,
        "harness": harness_version(),
    }
    return f"tasks-{key_of(key)[:16]}"


def _task_files(task: Task) -> list[tuple[str, str]]:
    """The files of a user's own task, those with its functions and data among them, or of the leaderboard."""
    place = Path(task.name)
    if task.kind == "calls":
        files = sorted(place.rglob("BFCL_*.json"))
    elif task.label != task.name and place.is_file():
        files = sorted(file for file in place.parent.iterdir() if file.suffix in _TASK_FILES)
    else:
        files = []
    return [(str(file), file_digest(file)) for file in files if file.is_file()]


def data_key(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Every file with the hash of its bytes."""
    return [(str(file), file_digest(file)) for path in paths for file in expand(path)]


def _texts(folder: Path) -> dict[str, str]:
    """The tokenizer, the chat template and an adapter's options, by the hash of their bytes."""
    patterns = ("tokenizer*", "chat_template*", ADAPTER_CONFIG)
    files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    return {file.name: file_digest(file) for file in files}


def _number_format(target: Target, placement: Placement) -> list[str]:
    """What the numbers of a model depend on besides its weights."""
    saved = settings_of(target.like or target.path)
    bits = placement.quantization or saved.quantization or ""
    return [saved.dtype, saved.attention, saved.kernels, bits, hardware.likely_kind()]
