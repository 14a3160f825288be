"""The checkpoints of a run: which there are, which is the newest good one, which the best; rotation."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from finetune.artifacts.names import BEST
from finetune.artifacts.plain_files import LARGEST_JSON, check_plain
from finetune.errors import CheckpointError
from finetune.storage.files import write_file
from finetune.storage.folders import delete
from finetune.storage.manifest import is_untouched, verify

RESUMABLE, WEIGHTS = "checkpoint", "weights"
"""How the folders are called: with the states of the run, or with what was trained alone."""
_NAME = re.compile(rf"({RESUMABLE}|{WEIGHTS})-(\d+)")


def folder_name(step: int, *, resumable: bool = True) -> str:
    """The name of what is saved after a step."""
    return f"{RESUMABLE if resumable else WEIGHTS}-{step}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None when it is no checkpoint's name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[2]) if match else None


def is_resumable(folder: Path) -> bool:
    """Whether a checkpoint has more than weights, by its name; others' folders may."""
    match = _NAME.fullmatch(folder.name)
    return match is None or match[1] == RESUMABLE


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, good or not; of one step, weights alone come last."""
    if not run_dir.is_dir():
        return []
    found = [p for p in run_dir.iterdir() if step_of(p) is not None and p.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.name))


def of_step(run_dir: Path, step: int) -> Path | None:
    """The checkpoint of a step, with the states of the run if there is one with them."""
    folders = [run_dir / folder_name(step, resumable=with_states) for with_states in (True, False)]
    return next((folder for folder in folders if folder.is_dir()), None)


def newest_good(
    run_dir: Path, *, resumable: bool = False
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the newer ones passed over, each with the reason.

    With `resumable` only those from which a run can go on are looked at.
    """
    skipped: list[tuple[Path, str]] = []
    for folder in reversed(checkpoints(run_dir)):
        if resumable and not is_resumable(folder):
            continue
        problems = verify(folder)
        if not problems:
            return folder, skipped
        skipped.append((folder, "; ".join(problems)))
    return None, skipped


@dataclass(frozen=True)
class Rotation:
    """What a rotation did."""

    removed: tuple[Path, ...] = ()
    problem: str | None = None
    """Why nothing could be removed, though there are more checkpoints than are to be kept."""


def rotate(
    run_dir: Path, keep: int, protect: Collection[Path] = (), *, whole: Path | None = None
) -> Rotation:
    """Delete all but the newest ``keep`` checkpoints of either kind and the protected ones.

    Nothing is deleted unless the newest verifies, so a good one always remains; ``whole`` is one that
    was sealed just now: it is not read again, but nobody may have touched it since.
    """
    kept = {path.resolve() for path in protect}
    surplus: list[Path] = []
    for with_states in (True, False):
        folders = [path for path in checkpoints(run_dir) if is_resumable(path) is with_states]
        kept |= {path.resolve() for path in folders[-max(keep, 1) :]}
        older = [path for path in folders if path.resolve() not in kept]
        if not older or (folders[-1] == whole and is_untouched(whole)):
            surplus += older
            continue
        if problems := verify(folders[-1]):
            return Rotation(problem=f"{folders[-1]} is damaged ({'; '.join(problems)})")
        surplus += older
    for folder in surplus:
        delete(folder)
    return Rotation(removed=tuple(surplus))


def set_best(run_dir: Path, checkpoint: Path, metric: str, value: float) -> None:
    """Note which checkpoint is the best by ``metric``."""
    record = {"checkpoint": checkpoint.name, "metric": metric, "value": value}
    write_file(run_dir / BEST, json.dumps(record, indent=1) + "\n")


def forget_best(run_dir: Path) -> None:
    """No checkpoint is the best any more; the next score will be."""
    (run_dir / BEST).unlink(missing_ok=True)


def best(run_dir: Path) -> Path | None:
    """The checkpoint noted by ``set_best``, if it is still there."""
    check_plain(run_dir / BEST, largest=LARGEST_JSON)
    try:
        record = json.loads((run_dir / BEST).read_text(encoding="utf-8"))
        folder = run_dir / Path(str(record["checkpoint"])).name
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{run_dir / BEST} is damaged; delete it") from None
    return folder if step_of(folder) is not None and folder.is_dir() else None
