"""Files that were prepared one by one, on as many machines as there are, and the whole that they make.

`finetune data prepare CONFIG --shard 3/16` leaves an entry of its own in the cache for every sixteenth
file. Whoever then needs all files finds their entries and only copies them together, in the order of the
files: the examples, their order and counts are those of one preparation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.data.examples.preparation import ExampleCounts, total
from finetune.data.examples.store import EXAMPLES_FILE, copied
from finetune.errors import ConfigError
from finetune.storage.cache import Entry, known


def of_shard(files: Sequence[Path], shard: str) -> list[Path]:
    """The files that shard `i/n` prepares, counted from 1.

    Raises:
        ConfigError: It is not of that form, or there are fewer files than shards.
    """
    number, slash, parts = shard.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ConfigError(f"--shard {shard}: is not i/n with 1 <= i <= n, such as 3/16")
    if len(files) < int(parts):
        raise ConfigError(
            f"--shard {shard}: there are {len(files)} files, which are what is shared out; split them "
            "(split -n l/64 rows.jsonl part.), or take fewer shards"
        )
    return list(files[int(number) - 1 :: int(parts)])


def prepared_alone(
    files: Sequence[Sequence[Path]], key: Callable[[int, Path], str], root: Path
) -> list[tuple[int, Entry]] | None:
    """Every file's own entry with the number of its source; None unless all are there.

    Args:
        files: Of each source.
        key: The name of a file's own entry, by the number of its source.
        root: Where entries lie.
    """
    found = []
    numbered = [(number, path) for number, paths in enumerate(files) for path in paths]
    for number, path in numbered if len(numbered) > 1 else ():
        if (entry := known(root, key(number, path))) is None:
            return None
        found.append((number, entry))
    return found or None


def joined(parts: Sequence[tuple[int, Entry]], file: Path, sources: int) -> dict[str, Any]:  # fmt: skip
    """Write the examples of all parts, each with the number of its source, into a new `file`.

    Args:
        parts: In the order in which their files would be read.
        file: What is written.
        sources: How many there are.

    Returns:
        The facts that a preparation of all files at once would have counted.
    """
    copied([entry.folder / EXAMPLES_FILE for _, entry in parts], file)
    counts, kept = ExampleCounts(), [0] * sources
    for source, entry in parts:
        of_one = entry.facts["counts"]
        counts = total(counts, ExampleCounts(**{**of_one, "named": tuple(of_one["named"])}))
        kept[source] += of_one["kept"]
    return {"counts": asdict(counts), "kept_per_source": kept}
