"""What was generated and measured, kept by content: asked again, nothing is computed again.

    <cache>/evaluations/<key>/
        answers.jsonl.part   grows window by window; a killed evaluation goes on behind it
        window-N-R.jsonl     groups of the window that process R finished
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from finetune.artifacts.base_record import recorded_base
from finetune.artifacts.names import ADAPTER_CONFIG
from finetune.artifacts.resolve import is_adapter
from finetune.artifacts.weights import model_fingerprint
from finetune.data.reading.files import expand
from finetune.errors import OutputInUseError
from finetune.evaluation.predictions import Prediction, read_unscored
from finetune.storage import folders, journal, manifest
from finetune.storage.cache import default_root
from finetune.storage.files import file_digest, json_line, whole_binary, write_file
from finetune.storage.lock import try_lock

if TYPE_CHECKING:
    from finetune.generation.generate import Reply

FORMAT = 2
"""Version of how replies are generated; results of another one are not used."""


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

    def num_kept(self, window: int) -> int:
        """Answers of an earlier attempt, whole windows of `window` only; what is torn is cut off."""
        return len(journal.recover(self._part, _is_whole, multiple=window))

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Adds a window; it is on the disk when this returns."""
        journal.append(self._part, (one.unscored_row for one in predictions))

    def log(self, window: int) -> WindowLog:
        """Finished groups of the window that begins with answer number `window`."""
        return WindowLog(self.folder, window)

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
        self._part.touch()
        self._part.replace(self.unscored)
        manifest.add(self.folder, self.unscored.name)
        self.write_note("done", facts)

    def scored(self, name: str, score: Callable[[Path, Path], object]) -> Path:
        """The answers with their scores under a name, by `score(answers, output)` when it is not whole."""
        file = self.folder / f"scored-{name}.jsonl"
        if not manifest.is_whole(self.folder, file.name):
            score(self.unscored, file)
            manifest.add(self.folder, file.name)
        return file


class WindowLog:
    """Groups of replies that were finished before their window was; every process writes a file.

    The form that `generate` takes its `log` in.
    """

    def __init__(self, folder: Path, window: int) -> None:
        self._folder, self._window = folder, window

    def known(self) -> dict[int, list[Reply]]:
        """The groups that are there, as the first process finds them."""
        from finetune.distributed.processes import broadcast_from_rank0

        return broadcast_from_rank0(self._read)

    def note(self, number: int, group: list[Reply]) -> None:
        """Keeps a group; it is on the disk when this returns."""
        from finetune.distributed.processes import rank_and_world

        line = {"group": number, "replies": [[one.index, one.ids, one.stopped] for one in group]}
        journal.append(self._folder / f"{self._name}{rank_and_world()[0]}.jsonl", [line])

    def forget(self) -> None:
        """Called when the window itself is on the disk."""
        for file in self._folder.glob(f"{self._name}*.jsonl"):
            file.unlink()

    @property
    def _name(self) -> str:
        return f"window-{self._window}-"

    def _read(self) -> dict[int, list[Reply]]:
        from finetune.generation.generate import Reply

        found = {}
        for file in sorted(self._folder.glob(f"{self._name}*.jsonl")):
            for row in journal.rows(file):
                found[row["group"]] = [
                    Reply(index, tuple(ids), stopped) for index, ids, stopped in row["replies"]
                ]
        return found


def _is_whole(row: Any) -> bool:
    """True for a prediction; KeyError or TypeError for anything else."""
    return bool(read_unscored(row).where)


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


def data_key(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Every file with the hash of its bytes."""
    return [(str(file), file_digest(file)) for path in paths for file in expand(path)]


def _texts(folder: Path) -> dict[str, str]:
    """The tokenizer, the chat template and an adapter's options, by the hash of their bytes."""
    patterns = ("tokenizer*", "chat_template*", ADAPTER_CONFIG)
    files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    return {file.name: file_digest(file) for file in files}
