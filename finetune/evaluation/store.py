"""What was generated and measured, kept by content: asked again, nothing is computed again.

    <cache>/evaluations/<key>/
        answers.jsonl.part   grows window by window; a killed evaluation goes on behind it
        answers.jsonl.part.batches  finished batches of the next window
        answers.jsonl        all answers
        losses.npz           sums per example
        done.json            written last
        scored-<key>.jsonl   the answers with their scores
        manifest.json        sizes and hashes of what is whole; anything else is made again

The key is that of the model's weights, the data, the template and the settings; nothing in it depends
on where things lie, except the data's path, which stands in every row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.errors import OutputInUseError
from finetune.evaluation.predictions import read_unscored
from finetune.storage import folders, manifest
from finetune.storage.cache import default_root
from finetune.storage.files import json_line, whole_binary, write_file
from finetune.storage.journal import Journal
from finetune.storage.lock import try_lock


class Results:
    """The folder of one model on one set of data under one setting."""

    def __init__(self, root: Path | None, key: str) -> None:
        self.folder = (root or default_root()) / "evaluations" / key
        self.unscored = self.folder / "answers.jsonl"
        self._part = self.folder / "answers.jsonl.part"

    @property
    def facts(self) -> dict[str, Any] | None:
        """What `finish` noted; None while something is missing."""
        facts = self.note("done")
        return facts if manifest.is_whole(self.folder, self.unscored.name) else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder against another evaluation of the same; ends with the process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(self.folder / ".lock")
        if lock is None:
            raise OutputInUseError(
                f"another process evaluates the same model on the same data at this moment "
                f"({self.folder}); wait for it, its results will be used"
            )
        with lock:
            folders.sweep(self.folder)
            yield

    def num_kept(self, journal: Journal) -> int:
        """Answers of an earlier attempt, in whole windows; what is torn is cut off."""
        return len(journal.open(_is_whole))

    def journal(self, window: int) -> Journal:
        """Where answers grow, `window` at a time."""
        return Journal(self._part, window)

    def write_losses(self, name: str, losses: npt.NDArray[Any], weights: npt.NDArray[Any]) -> None:
        """Keeps sums per example under a name."""
        with whole_binary(self.folder / f"{name}.npz") as file:
            np.savez(file, losses=losses, weights=weights)
        manifest.add(self.folder, f"{name}.npz")

    def losses(self, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None:
        """What `write_losses` kept, unless a sum in it is no number."""
        if not manifest.is_whole(self.folder, f"{name}.npz"):
            return None
        with np.load(self.folder / f"{name}.npz", allow_pickle=False) as found:
            losses, weights = found["losses"], found["weights"]
        return (losses, weights) if np.isfinite(losses).all() else None

    def note(self, name: str) -> Any:
        """What `write_note` kept."""
        if not manifest.is_whole(self.folder, f"{name}.json"):
            return None
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def write_note(self, name: str, value: Any) -> None:
        """Keeps a value under a name."""
        write_file(self.folder / f"{name}.json", json_line(value))
        manifest.add(self.folder, f"{name}.json")

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Makes the results whole."""
        self.journal(1).finish(self.unscored)
        manifest.add(self.folder, self.unscored.name)
        self.write_note("done", facts)

    def scored(self, name: str, score: Callable[[Path, Path], object]) -> Path:
        """The answers with their scores under a name, by `score(answers, output)` when it is not whole."""
        file = self.folder / f"scored-{name}.jsonl"
        if not manifest.is_whole(self.folder, file.name):
            score(self.unscored, file)
            manifest.add(self.folder, file.name)
        return file


def _is_whole(row: Any) -> bool:
    """True for a prediction; KeyError or TypeError for anything else."""
    return bool(read_unscored(row).location)
