"""`finetune data split`: files -> a training and a held-out file, whole groups on one side."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.data.dialogue.conversation import RowError
from finetune.data.reading.files import expand
from finetune.data.reading.parts import Part
from finetune.data.reading.sources import Reading, SourceSpec, read_conversations
from finetune.errors import ConfigError, DataError
from finetune.storage.files import whole_file
from finetune.storage.outputs import check_output

TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"


@dataclass(frozen=True)
class SplitCounts:
    """Dialogues on either side."""

    train: int
    held_out: int


def split(
    sources: list[SourceSpec],
    output: Path,
    part: Part,
    reading: Reading,
    *,
    overwrite: bool = False,
) -> SplitCounts:
    """Writes the rows of `sources`, as they are, into two files of the folder `output`.

    Args:
        sources: Files, globs and folders.
        output: Gets `train.jsonl` and `held_out.jsonl`; both appear when all rows are written.
        part: How much is held out, and what makes a group.
        reading: How rows are read; a bad one is an error.
        overwrite: Whether the two files may be there already.

    Raises:
        ConfigError: The files are there, or are read.
        DataError: For bad rows, each named, and for rows without a group.
    """
    files = [output / TRAIN, output / HELD_OUT]
    there = [str(file) for file in files if file.exists()]
    if there and not overwrite:
        raise ConfigError(f"{' and '.join(there)} exist; give --overwrite, or another --output")
    read = [path for source in sources for path in (*expand(source.path), Path(source.path))]
    for file in files:
        check_output(
            file, filter(Path.exists, read), overwrite=overwrite, is_ours=lambda _: overwrite
        )
    output.mkdir(parents=True, exist_ok=True)
    stream = read_conversations(sources, reading)
    counts = [0, 0]
    with whole_file(files[0]) as train, whole_file(files[1]) as held_out:
        for conversation in stream:
            try:
                side = int(part.takes(stream.row, conversation))
            except RowError as error:
                raise DataError(f"{conversation.location}: {error}") from None
            text = json.dumps(stream.row, ensure_ascii=False, default=_as_json)
            (train, held_out)[side].write(text + "\n")
            counts[side] += 1
        if not all(counts):
            lacking = replace(part, held_out=not counts[1])
            empty = lacking.nothing_left(", ".join(s.path for s in sources), sum(counts))
            raise DataError(
                empty.replace("change data.validation, or give", "change --share, or take")
            )
    return SplitCounts(*counts)


def _as_json(value: Any) -> str:
    """Bytes of an image as a data URL; whatever else JSON lacks as text."""
    if isinstance(value, bytes):
        return f"data:image;base64,{base64.b64encode(value).decode()}"
    return str(value)
