"""Predictions on disk: one JSON object a line, whole or absent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.evaluation.metrics import Scores
from finetune.storage.files import json_line, whole_file


@dataclass(frozen=True, slots=True)
class Prediction:
    """One generated reply with what it answers and how it scores."""

    where: str
    """`file:line` of the dialogue."""
    message: int
    """Which message of the dialogue is the reference."""
    prompt: str
    """The prompt as text, control tokens spelled out."""
    reference: str
    prediction: str
    stopped: bool | None
    """A stop token ended the reply; otherwise it was cut at `max_new_tokens`. None: not known."""
    scores: Scores
    counts: dict[str, list[float]] = field(default_factory=dict)
    """What is summed over replies for the scores that are no means: `table.COUNTS`."""
    slices: dict[str, str] = field(default_factory=dict)
    """Which parts of the data it belongs to."""
    images: tuple[str, ...] = ()
    """Paths of the images that the prompt shows."""

    @property
    def row(self) -> dict[str, Any]:
        """The line of a file of predictions."""
        row = asdict(self)
        if not self.images:
            del row["images"]
        return row


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Writes `predictions` as JSONL; the file appears when its last line is on the disk."""
    with whole_file(path) as file:
        for prediction in predictions:
            file.write(json_line(prediction.row))
