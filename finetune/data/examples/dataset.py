"""Dialogues to examples: rendered in batches, shortened by whole turns, kept on disk, counted.

Nothing grows with the data but a few bytes per example: dialogues are streamed into an Arrow file
in the cache, and examples are read from its memory map.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune.data.examples.preparation import NAMED, ExampleCounts, LengthPolicy, write_examples
from finetune.data.examples.selection import AS_STORED, Selection, first_ones, mixed
from finetune.data.examples.shards import joined, prepared_alone
from finetune.data.examples.store import EXAMPLES_FILE, ExampleFile
from finetune.data.reading.files import expand
from finetune.data.reading.sources import AS_IS, Reading, SourceSpec, read_conversations
from finetune.errors import DataError
from finetune.storage import cache
from finetune.storage.files import file_digest
from finetune.storage.seen import SeenFiles, State, state_of

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.dialogue.conversation import Conversation

__all__ = [
    "IGNORED",
    "Example",
    "ExampleCounts",
    "LengthPolicy",
    "PreparedDataset",
    "load_examples",
    "prepare",
]

IGNORED = -100
"""The label of a token that carries no loss."""
FORMAT = 5
"""Version of the stored file and of the rules that fill it; another one never reads this one's."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One dialogue to learn from; T tokens."""

    input_ids: npt.NDArray[np.int32]
    """[T], read-only."""
    labels: npt.NDArray[np.int64]
    """[T]: the ids where they carry loss, elsewhere -100; not shifted."""
    loss_weights: npt.NDArray[np.float32] | None
    """[T], 0 where nothing is learned; None when all supervised tokens weigh 1."""
    index: int
    """Its place in the dataset."""
    location: str
    """`file:line`."""
    images: tuple[str, ...] = ()
    """Paths of the images that it shows, in reading order."""


def example_of(
    input_ids: npt.NDArray[np.int32],
    spans: Iterable[tuple[int, int, float]],
    *,
    index: int,
    location: str,
    images: Sequence[str],
) -> Example:
    """The example of some ids, learned inside `spans` with their weights."""
    labels = np.full(len(input_ids), IGNORED, dtype=np.int64)
    weights = np.zeros(len(labels), np.float32)
    is_plain = True
    for start, end, weight in spans:
        labels[start:end] = input_ids[start:end]
        weights[start:end] = weight
        is_plain = is_plain and weight == 1.0
    return Example(input_ids, labels, None if is_plain else weights, index, location, tuple(images))


class PreparedDataset:
    """Examples by index over a memory-mapped file.

    `view` maps an example to its stored row when the two differ, because a source is repeated or
    taken in part; nothing is stored twice.
    """

    def __init__(
        self,
        file: ExampleFile,
        counts: ExampleCounts,
        fingerprint: str,
        view: npt.NDArray[np.int64] | None = None,
        images: Mapping[str, State | None] | None = None,
    ) -> None:
        self.stored = file
        """All examples of the preparation, also those that no epoch holds."""
        self._images = images or {}
        self._view = view
        self.counts = counts
        """Counts of the stored rows, whatever their sources' weights."""
        self.fingerprint = fingerprint
        """Changes when any example or its place changes; independent of paths."""
        stored = file.lengths()
        self.lengths = stored if view is None else stored[view]
        """Tokens of every example, int32 [examples]."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        row = self._row(index)
        stored = self.stored[row]
        for image in stored.images:
            known = self._images.get(image)
            # One that is gone is named by whoever opens it.
            if known is not None and state_of(Path(image)) not in (known, None):
                raise DataError(
                    f"{self.stored.location(row)}: image {image} was replaced since this run "
                    "began; put it back, or start the run anew"
                )
        spans = zip(stored.starts, stored.ends, stored.weights, strict=True)
        location = self.stored.location(row)
        return example_of(
            stored.input_ids, spans, index=index, location=location, images=stored.images
        )

    def location(self, index: int) -> str:
        """The `file:line` of an example."""
        return self.stored.location(self._row(index))

    def images(self) -> list[str]:
        """Paths of all images that examples show, each once."""
        return self.stored.images()

    def shared_with(self, other: PreparedDataset) -> list[str]:
        """The `file:line` of every example that `other` holds too."""
        mine, others = self.stored.digests(), other.stored.digests()
        both = np.isin(mine, others if other._view is None else others[other._view])
        if self._view is not None:
            both &= np.isin(np.arange(len(mine)), self._view)
        return [self.stored.location(int(row)) for row in np.flatnonzero(both)]

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return index if self._view is None else int(self._view[index])


def load_examples(
    sources: Sequence[SourceSpec],
    template: ChatTemplate,
    policy: LengthPolicy,
    *,
    reading: Reading = AS_IS,
    seed: int = 0,
    selection: Selection = AS_STORED,
    cache_root: Path | None = None,
) -> PreparedDataset:
    """The examples of some files, from the cache when the same bytes were prepared before.

    `seed` chooses the rows of a source with a fractional weight. Raises DataError for paths, bad
    rows and lengths that do not fit, each listing all of them.
    """
    files = [expand(source.path) for source in sources]
    listed = [path for paths in files for path in paths]
    seen = SeenFiles.of(listed)
    method = _made_by(template, policy)
    made_by, key = _keys(sources, files, seen, reading, method)

    def key_alone(number: int, path: Path) -> str:
        return _keys([sources[number]], [[path]], seen, reading, method)[1]

    def build(folder: Path) -> dict[str, Any]:
        parts = None
        if not any(source.chosen for source in sources):
            parts = prepared_alone(files, key_alone, _folder(cache_root))
        facts = joined(parts, folder / EXAMPLES_FILE, len(sources)) if parts else read_all(folder)
        seen.check(listed, "they were read")
        paths = ExampleFile(folder / EXAMPLES_FILE).images()
        states = _image_states(paths)
        return facts | {
            "images": _key_of_states(states),
            "image_content": _image_content(paths),
        }

    def read_all(folder: Path) -> dict[str, Any]:
        stream = read_conversations(
            [replace(source, weight=1.0) for source in sources],
            replace(reading, images=replace(reading.images, check=True)).for_checkpoint(template),
        )
        numbered = ((stream.source, conversation) for conversation in stream)
        facts = write_examples(
            numbered, template, policy, folder / EXAMPLES_FILE, num_sources=len(sources)
        )
        bad = [f"{row.location}: {row.reason}" for row in stream.bad_rows[:NAMED]]
        counts = facts["counts"]
        counts |= {
            "rows": stream.rows - stream.elsewhere,
            "bad": stream.num_bad,
            "named": [*bad, *counts["named"]],
        }
        counts |= {"unread": dict(stream.unread), "doubts": dict(stream.doubts)}
        return facts

    entry = cache.open_or_build(_folder(cache_root), key, build)
    paths = ExampleFile(entry.folder / EXAMPLES_FILE).images()
    images = _image_states(paths)
    if _key_of_states(images) != entry.facts["images"]:
        found = _image_content(paths)
        if found != entry.facts["image_content"]:  # other images, under the same names
            key = cache.key_of({"key": key, "images": found})
            entry = cache.open_or_build(_folder(cache_root), key, build)
            images = _image_states(ExampleFile(entry.folder / EXAMPLES_FILE).images())
    if entry.facts["images"]:
        made_by |= {"images": entry.facts["image_content"]}
    weights = [source.weight for source in sources]
    view = _view(entry, key, weights, selection, seed, template.user_id)
    fingerprint = cache.key_of(
        made_by
        | {"weights": weights, "seed": seed if view.rows is not None else None}
        | selection.key
    )
    return _open(entry, fingerprint, view, images)


def _keys(
    sources: Sequence[SourceSpec],
    files: Sequence[Sequence[Path]],
    seen: SeenFiles,
    reading: Reading,
    method: Mapping[str, Any],
) -> tuple[dict[str, Any], str]:
    """What decides the examples of some files, and the name of their entry in the cache."""
    content = [
        {
            "files": [seen.states[path][1] for path in paths],
            "format": source.format,
            "columns": source.columns,
            **source.chosen,
        }
        for source, paths in zip(sources, files, strict=True)
    ]
    made_by = dict(method) | {
        "content": content,
        "columns": reading.columns,
        "rules": asdict(reading.rules),
    }
    # What is stored names rows by their paths, and is made under one policy on bad rows.
    paths = [[str(path) for path in of_one] for of_one in files]
    return made_by, cache.key_of(made_by | {"paths": paths, "reading": asdict(reading)})


class _View(NamedTuple):
    """The stored rows of an epoch; None for all of them, once."""

    rows: npt.NDArray[np.int64] | None = None
    duplicates: int = 0


_WHOLE = _View()


def _view(
    entry: cache.Entry,
    key: str,
    weights: Sequence[float],
    selection: Selection,
    seed: int,
    user_id: int,
) -> _View:
    kept = entry.facts["kept_per_source"]
    rows = np.arange(sum(kept))
    if selection.deduplicate:
        file = ExampleFile(entry.folder / EXAMPLES_FILE)
        rows = first_ones(file, key, selection, user_id, entry.folder.parent)
    duplicates = sum(kept) - len(rows)
    if not duplicates and not selection.stop and all(weight == 1.0 for weight in weights):
        return _WHOLE
    by_source = np.split(rows, np.searchsorted(rows, np.cumsum(kept)[:-1]))
    return _View(mixed(by_source, weights, selection, seed), duplicates)


def prepare(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    policy: LengthPolicy,
    *,
    key: str,
    cache_root: Path | None = None,
) -> PreparedDataset:
    """The examples of `conversations`, from the cache when `key` (a hash of their content) is known.

    Raises DataError when nothing is left to learn from, and with `on_too_long: error` listing
    every dialogue that is too long.
    """

    def build(folder: Path) -> dict[str, Any]:
        return write_examples(
            ((0, c) for c in conversations), template, policy, folder / EXAMPLES_FILE
        )

    full_key = cache.key_of(_made_by(template, policy) | {"key": key})
    return _open(cache.open_or_build(_folder(cache_root), full_key, build), full_key)


def _open(
    entry: cache.Entry,
    fingerprint: str,
    view: _View = _WHOLE,
    images: Mapping[str, State | None] | None = None,
) -> PreparedDataset:
    stored = entry.facts["counts"]
    counts = ExampleCounts(
        **{**stored, "named": tuple(stored["named"]), "duplicates": view.duplicates}
    )
    file = ExampleFile(entry.folder / EXAMPLES_FILE)
    return PreparedDataset(file, counts, fingerprint, view.rows, images)


def _image_states(paths: Sequence[str]) -> dict[str, State | None]:
    """What changes when an image is written to, replaced or goes."""
    return {path: state_of(Path(path)) for path in paths}


def _key_of_states(states: Mapping[str, State | None]) -> str:
    """Empty without images."""
    return cache.key_of({"states": list(states.values())}) if states else ""


def _image_content(paths: Sequence[str]) -> str:
    """A hash of the images' bytes."""
    digests = [file_digest(Path(path)) if Path(path).is_file() else "" for path in paths]
    return cache.key_of({"images": digests})


def _made_by(template: ChatTemplate, policy: LengthPolicy) -> dict[str, Any]:
    """What decides the stored rows besides the dialogues."""
    return {"format": FORMAT, "template": template.fingerprint, "policy": asdict(policy)}


def _folder(cache_root: Path | None) -> Path:
    return (cache_root or cache.default_root()) / "examples"
