"""Which stored examples an epoch holds: those that repeat another left out, sources mixed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from finetune import console
from finetune.data.examples.store import ExampleFile
from finetune.data.reading.sources import weighted
from finetune.errors import DataError
from finetune.storage import cache

if TYPE_CHECKING:
    from finetune.data.examples.dataset import PreparedDataset

Rows = npt.NDArray[np.int64]

SIMILAR = 0.8
"""Share of common runs of `_RUN` tokens from which two examples count as the same, estimated."""
_RUN = 5
_HASHES = 128
_NEAR_VERSION = 1


@dataclass(frozen=True)
class Selection:
    """How an epoch is made of the stored examples."""

    stop: Literal["first", "all"] | None = None
    """With it weights are shares of the mixture; see `data.stop`."""
    temperature: float | None = None
    """Shares follow the sources' sizes to the power of 1 / temperature."""
    deduplicate: Literal["exact", "near"] | None = None
    """Which examples are left out because an earlier or a held-out one says the same."""
    held_out: PreparedDataset | None = None
    """What `deduplicate` keeps out of the training data."""

    @property
    def key(self) -> dict[str, Any]:
        """What decides the epoch besides the stored examples; empty for all of them as they are."""
        said: dict[str, Any] = {
            "stop": self.stop,
            "temperature": self.temperature,
            "deduplicate": self.deduplicate,
        }
        if self.deduplicate and self.held_out is not None:
            said["held out"] = self.held_out.fingerprint
        said = {name: value for name, value in said.items() if value is not None}
        return {"selection": said} if said else {}


AS_STORED = Selection()
"""All of them, once."""


def repeats(sizes: Sequence[int], weights: Sequence[float], selection: Selection) -> list[float]:
    """How often each source's examples are seen per epoch.

    >>> repeats([1000, 100], [1.0, 1.0], Selection(stop="first"))
    [0.1, 1.0]
    >>> repeats([1000, 100], [1.0, 1.0], Selection(stop="all"))
    [1.0, 10.0]
    """
    if selection.stop is None:
        return list(weights)
    power = 1 / selection.temperature if selection.temperature else 0.0
    shares = [weight * size**power for size, weight in zip(sizes, weights, strict=True)]
    given = [size / share for size, share in zip(sizes, shares, strict=True) if size]
    scale = (min if selection.stop == "first" else max)(given, default=0.0)
    return [
        share * scale / size if size else 0.0 for size, share in zip(sizes, shares, strict=True)
    ]


def mixed(
    sources: Sequence[Rows], weights: Sequence[float], selection: Selection, seed: int
) -> Rows:
    """The rows of every source as often as it is seen per epoch; DataError when none is left."""
    often = repeats([len(rows) for rows in sources], weights, selection)
    view = np.concatenate(
        [
            np.fromiter(weighted(rows, repeat, f"{seed}:{number}"), dtype=np.int64)
            for number, (rows, repeat) in enumerate(zip(sources, often, strict=True))
        ]
    )
    if not len(view):
        raise DataError(
            "the weights of data.train are so small that no example is left; raise them"
        )
    return view


def first_ones(
    file: ExampleFile, key: str, selection: Selection, user_id: int, cache_root: Path
) -> Rows:
    """The rows that repeat no earlier and no held-out one.

    Args:
        file: The stored examples.
        key: Changes when they do.
        selection: Says what counts as a repeat.
        user_id: The token that dialogues' own text begins with, behind tools and system text.
        cache_root: Where the answer for `near`, which takes its time, is kept.
    """
    held_out = selection.held_out.stored if selection.held_out is not None else None
    if selection.deduplicate == "exact":
        digests = file.digests()
        rows = np.sort(np.unique(digests, return_index=True)[1]).astype(np.int64)
        return rows if held_out is None else rows[~np.isin(digests[rows], held_out.digests())]

    def build(folder: Path) -> dict[str, Any]:
        np.save(folder / "rows.npy", _near(file, held_out, user_id))
        return {}

    near = cache.key_of({"key": key, "near": _NEAR_VERSION, **selection.key})
    entry = cache.open_or_build(cache_root, near, build)
    rows = np.load(entry.folder / "rows.npy", allow_pickle=False)
    return np.asarray(rows, dtype=np.int64)


def _near(file: ExampleFile, held_out: ExampleFile | None, user_id: int) -> Rows:
    """The rows of which no earlier or held-out one shares SIMILAR of the runs of tokens.

    Memory grows by some kilobytes a row: MinHash signatures are held in an index.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise DataError(
            'data.deduplicate: near needs datasketch; pip install "glm4-finetune[near]"'
        ) from None
    index = MinHashLSH(threshold=SIMILAR, num_perm=_HASHES)

    def signature(runs: list[bytes]) -> MinHash:
        signed = MinHash(num_perm=_HASHES, seed=1)
        signed.update_batch(runs)
        return signed

    for number, runs in enumerate(_runs(held_out, user_id) if held_out is not None else ()):
        index.insert(f"held out {number}", signature(runs))
    kept = []
    with console.progress(len(file), "looking for near duplicates") as meter:
        for row, runs in enumerate(_runs(file, user_id)):
            signed = signature(runs)
            if not index.query(signed):
                index.insert(str(row), signed)
                kept.append(row)
            meter.advance(1)
    return np.array(kept, dtype=np.int64)


def _runs(file: ExampleFile, user_id: int) -> Iterator[list[bytes]]:
    """The different runs of five tokens of every row, from its first user message on."""
    for row in range(len(file)):
        example = file[row]
        start = int(np.argmax(example.input_ids == user_id))
        ids = example.input_ids[start:]
        windows = np.lib.stride_tricks.sliding_window_view(ids, min(_RUN, len(ids)))
        shown = "\0".join(example.images).encode()  # other images, other examples
        yield [shown + run.tobytes() for run in np.unique(windows, axis=0)]
