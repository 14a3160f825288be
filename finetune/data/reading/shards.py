"""The files of a stream: listed beforehand, opened when their turn comes, a hub's fetched then and removed.

So of a data set of a hub only the shards that are read at the moment lie on this disk.
"""

from __future__ import annotations

import fnmatch
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from zlib import crc32

from finetune.artifacts import hub
from finetune.artifacts.hub import Repository
from finetune.data.reading.files import data_files, expand
from finetune.data.reading.images import ImageFiles
from finetune.data.reading.sources import FileRows, Reading, SourceSpec
from finetune.errors import DataError
from finetune.storage.files import second_name
from finetune.storage.lock import is_running, locked

FOLDER = "streams"
"""Where shards of hubs lie while they are read, under the cache."""
_TRIES = 5


@dataclass(frozen=True)
class StreamShard:
    """One file of a stream."""

    source: int
    """Number of its source."""
    name: str
    """Its path, or its address at a hub."""
    size: int
    """Bytes."""
    repository: Repository | None = None
    """Where it is fetched from, at a commit; None for a file that lies here."""
    file: str = ""
    """Its path in the repository."""


def shards_of(sources: Sequence[SourceSpec]) -> tuple[StreamShard, ...]:
    """The files that the sources mean, in order; DataError for a source that means none."""
    return tuple(
        shard for number, source in enumerate(sources) for shard in _of(number, source.path)
    )


def _of(source: int, path: str) -> Iterator[StreamShard]:
    found = hub.repository(path) if "://" in path else None
    if found is None:
        for local in expand(path):
            yield StreamShard(source, str(local), local.stat().st_size)
        return
    there = hub.listed(found)
    pinned = _at_commit(found, there.commit)
    files = _chosen(found, list(there.sizes))
    if not files:
        what = f"no file {found.files}" if found.files else "no data files"
        raise DataError(f"{path}: the data set has {what}; correct the name")
    scheme = {"huggingface": "hf", "modelscope": "ms"}[found.hub]
    for file in files:
        address = f"{scheme}://{found.name}@{pinned.revision}/{file}"
        yield StreamShard(source, address, there.sizes[file], pinned, file)


def _at_commit(found: Repository, commit: str | None) -> Repository:
    """The repository at a commit, where there is one."""
    return found._replace(revision=commit or found.revision, files="")


def _chosen(found: Repository, paths: Sequence[str]) -> list[str]:
    """The data files of a repository, or those that its address names."""
    if not found.files:
        return [str(path) for path in data_files(map(PurePosixPath, paths))]
    return sorted(path for path in paths if _matches(path, found.files))


def _matches(path: str, pattern: str) -> bool:
    """As a pattern of a path matches: `*` within a folder, `**` any folders."""
    if "**" in pattern:
        return fnmatch.fnmatchcase(path, pattern.replace("**/", "*"))
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


class ShardReader:
    """Rows of shards, from any row on.

    Several processes may read the same shards of a hub: a shard is fetched once into a common folder,
    each reader has a link of its own to it, and who has read it first removes the common one.
    """

    def __init__(
        self,
        shards: Sequence[StreamShard],
        sources: Sequence[SourceSpec],
        reading: Reading,
        cache_root: Path,
    ) -> None:
        self._shards = shards
        self._sources = sources
        self._reading = reading
        self._root = cache_root / FOLDER
        self._links: dict[int, Path] = {}

    def open(self, shard: int, row: int) -> FileRows:
        """The rows of a shard behind the first `row`."""
        source = self._sources[self._shards[shard].source]
        alone = self._shards[shard].repository is not None
        images = ImageFiles(replace(self._reading.images, check=True, file_alone=alone))
        return FileRows(self._here(shard), source, self._reading, "train", images, skip=row)

    def close(self, shard: int) -> None:
        """Of a hub's shard nothing stays here."""
        link = self._links.pop(shard, None)
        if link is not None:
            link.unlink(missing_ok=True)
            self._common(shard).unlink(missing_ok=True)

    def _here(self, number: int) -> Path:
        shard = self._shards[number]
        if shard.repository is None:
            path = Path(shard.name)
            if not path.is_file() or path.stat().st_size != shard.size:
                raise DataError(
                    f"{path} was changed or removed since this run began; start the run anew, and leave "
                    "a stream's files as they are"
                )
            return path
        if number not in self._links:
            self._links[number] = self._fetched(number, shard, shard.repository)
        return self._links[number]

    def _fetched(self, number: int, shard: StreamShard, repository: Repository) -> Path:
        """A link of this reader to a shard that is fetched where it is not there."""
        own = self._own_folder() / f"{number}-{Path(shard.file).name}"
        for _ in range(_TRIES):
            # One at a time: the hub's library would write over a file that another reader has linked.
            lock = own.parents[1] / f"{crc32(shard.name.encode()):08x}.lock"
            with locked(lock, f"waiting for another process that is fetching {shard.name}"):
                common = hub.fetch_file(repository, shard.file, self._folder(repository))
                try:
                    return own if second_name(common, own) else common
                except FileNotFoundError:
                    continue  # another reader was done with it in this moment
        raise DataError(
            f"{shard.name}: it disappears from {self._root} as often as it is fetched; give the same command again"
        )

    def _folder(self, repository: Repository) -> Path:
        return self._root / f"{repository.name.replace('/', '--')}@{repository.revision}"

    def _common(self, number: int) -> Path:
        shard = self._shards[number]
        assert shard.repository is not None
        return self._folder(shard.repository) / shard.file

    def _own_folder(self) -> Path:
        """A folder of this process; those that killed ones have left are removed."""
        readers = self._root / "readers"
        own = readers / f"{socket.gethostname()}:{os.getpid()}"
        own.mkdir(parents=True, exist_ok=True)
        for folder in readers.iterdir():  # and locks, which have no host
            host, _, process = folder.name.rpartition(":")
            if host == socket.gethostname() and not is_running(int(process)):
                for link in folder.iterdir():
                    link.unlink(missing_ok=True)
                folder.rmdir()
        return own
