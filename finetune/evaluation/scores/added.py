"""Files of predictions -> the same with the scores of a judge or an embedding model in every row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.evaluation.scores import embeddings, judge
from finetune.evaluation.scores.embeddings import Embedder
from finetune.evaluation.scores.judge import Judge
from finetune.storage.files import json_line, whole_file

Values = Iterator[Mapping[str, float | None]]


@dataclass(frozen=True, slots=True)
class ByModels:
    """Scores that other models give; nothing by default."""

    judge: str = ""
    """`openai:MODEL@URL`."""
    bert_score: str = ""
    """Folder or hub id of a model that embeds words."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the scores are called."""
        return (judge.NAMES if self.judge else ()) + ((embeddings.NAME,) if self.bert_score else ())


def check(asked: ByModels, root: Path) -> None:
    """ConfigError for a judge that is no judge, before anything is generated."""
    if asked.judge:
        Judge.of(asked.judge, root)


def add_scores(
    asked: ByModels, files: Sequence[tuple[str, str, Path]], root: Path
) -> dict[str, str]:
    """Writes the scores into the rows of every file; returns the signature of each score.

    Args:
        asked: which scores.
        files: name, kind and predictions of every target, those of the same prompts in the same order.
        root: the cache's folder.
    """
    signatures: dict[str, str] = {}
    if asked.judge:
        who = Judge.of(asked.judge, root)
        base = next((file for _, kind, file in files if kind == "base"), None)
        if base and any(_places(file) != _places(base) for _, _, file in files):
            base = None  # other prompts fit into the context, and nothing is compared
        for _, _, file in files:
            # Against itself the base is level, so that the others compare with it as with any model.
            _rewrite(file, _level(file) if file == base else who.win_rates(_pairs(file, base)))
        signatures |= judge.signature(who, "the base" if base else "the data")
    if asked.bert_score:
        model = Embedder.of(asked.bert_score)
        for _, _, file in files:
            texts = ((row["prediction"], row["reference"]) for row in _rows(file))
            _rewrite(file, model.similarities(texts))
        signatures |= model.signature
    return signatures


def _level(file: Path) -> Values:
    return ({judge.WIN: judge.LEVEL, judge.AGREE: None} for _ in _rows(file))


def _pairs(file: Path, base: Path | None) -> Iterator[judge.Pair]:
    """Prompt, reference, reply and rival of every row; without a base the rival is the reference."""
    if base is None:
        for row in _rows(file):
            yield row["prompt"], "", row["prediction"], row["reference"]
        return
    for row, other in zip(_rows(file), _rows(base), strict=True):
        yield row["prompt"], row["reference"], row["prediction"], other["prediction"]


def _places(file: Path) -> list[tuple[str, int]]:
    return [(row["where"], row["message"]) for row in _rows(file)]


def _rewrite(file: Path, values: Values) -> None:
    """The file with more scores in every row."""
    with whole_file(file) as opened:
        for row, found in zip(_rows(file), values, strict=True):
            opened.write(json_line(row | {"scores": row["scores"] | found}))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
