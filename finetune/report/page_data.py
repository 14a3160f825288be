"""Predictions -> what the page's script shows: samples, their scores, pictures, and lengths."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from finetune.errors import DataError
from finetune.evaluation.schema import (
    PICTURE_BYTES,
    Evaluation,
    Sample,
    common_rows,
    picture,
    samples,
)
from finetune.evaluation.scores.metrics import METRICS
from finetune.language import sentence, word
from finetune.report.sentences import verdict
from finetune.webpages import encodable

ASSETS = Path(__file__).parent / "assets"
MOST_SAMPLES = 5000
"""Samples that a page carries; of more, as many evenly spaced ones."""


@dataclass
class Content:
    """The samples of a page, column by column, and the lengths of all replies."""

    num_samples: int
    """That all targets were asked for; the page may carry fewer."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    """Those that a single reply has, in order."""
    prompt_lengths: list[int] = field(default_factory=list)
    reference_lengths: list[int] = field(default_factory=list)
    reply_lengths: list[list[int]] = field(default_factory=list)
    """Characters, target by target."""


def read_content(folder: Path, evaluation: Evaluation) -> Content:
    """Everything that the page needs of the predictions, read once."""
    common = common_rows(folder, evaluation)
    count = len(common)
    content = Content(count, reply_lengths=[[] for _ in evaluation.targets])
    pictures = _Pictures(folder)
    for number, sample in enumerate(samples(folder, evaluation, common)):
        content.prompt_lengths.append(len(str(sample.row.get("prompt", ""))))
        content.reference_lengths.append(len(str(sample.row.get("reference", ""))))
        for lengths, reply in zip(content.reply_lengths, sample.replies, strict=True):
            lengths.append(len(reply))
        if (number + 1) * MOST_SAMPLES // count > number * MOST_SAMPLES // count:
            content.samples.append(_packed(number, sample, pictures))
    content.metrics = _metrics(content.samples, evaluation)
    for packed in content.samples:
        packed["scores"] = [[one.get(name) for name in content.metrics] for one in packed["scores"]]
    content.pictures = pictures.found
    return content


def page_data(evaluation: Evaluation, content: Content, colours: Sequence[int]) -> Markup:
    """The JSON that the page's script reads, inert inside a <script> element."""
    base, headline = evaluation.base, evaluation.headline
    names = [target.name for target in evaluation.targets]
    data = {
        "targets": [
            {"name": target.name, "kind": target.kind, "colour": colour}
            for target, colour in zip(evaluation.targets, colours, strict=True)
        ],
        "base": names.index(base.name) if base else None,
        "best": names.index(evaluation.best(headline).name),
        "metrics": content.metrics,
        "headline": headline if headline in content.metrics else next(iter(content.metrics), None),
        "lower": [one.name for one in METRICS if one.lower_is_better],
        "neither": [one.name for one in METRICS if one.better == "neither"],
        "comparisons": [
            [
                names.index(one.a),
                names.index(one.b),
                one.metric,
                one.difference,
                one.verdict,
                sentence(verdict(one)),
            ]
            for one in evaluation.comparisons
            if one.a in names and one.b in names
        ],
        "slices": evaluation.model_dump(include={"slices"})["slices"],
        "sliceMetrics": evaluation.metrics,
        "sliceMetric": headline,
        "pictures": content.pictures,
        "words": _words(),
        "samples": content.samples,
    }
    return inert_json(data)


def _words() -> dict[str, str]:
    """The texts of the page's scripts in the user's language; none in English."""
    scripts = "".join(file.read_text(encoding="utf-8") for file in sorted(ASSETS.glob("*.js")))
    texts = re.findall(r'\bt\("([^"]+)"\)', scripts)
    return {text: word(text) for text in texts if word(text) != text}


def inert_json(value: Any) -> Markup:
    """JSON that cannot end the element it stands in, nor begin a comment there."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(encodable(text))


def _packed(number: int, sample: Sample, pictures: _Pictures) -> dict[str, Any]:
    row = sample.row
    message = row.get("message")
    slices = row.get("slices")
    location = str(row.get("where", "")) + (f" message {message + 1}" if isinstance(message, int) else "")  # fmt: skip
    packed: dict[str, Any] = {
        "number": number + 1,
        "where": location,
        "prompt": str(row.get("prompt", "")),
        "reference": str(row.get("reference", "")),
        "replies": list(sample.replies),
        "scores": list(sample.scores),
        "slices": {str(k): str(v) for k, v in slices.items() if v != ""}
        if isinstance(slices, dict)
        else {},
    }
    images = row.get("images")
    if isinstance(images, list) and images:
        packed["images"] = [pictures.place(str(image)) for image in images]
    return packed


def _metrics(packed: Iterable[dict[str, Any]], evaluation: Evaluation) -> list[str]:
    names = {name for one in packed for scores in one["scores"] for name in scores}
    known = [name for name in evaluation.metrics if name in names]
    return known + sorted(names - set(known))


class _Pictures:
    """Pictures as data URIs, each once, until the page has no more room."""

    def __init__(self, folder: Path) -> None:
        self.found: list[str] = []
        self._folder = folder
        self._places: dict[str, int | str] = {}
        self._bytes = 0

    def place(self, image: str) -> int | str:
        """Where in `found` a picture is, or a sentence that says why it is not there."""
        if image not in self._places:
            self._places[image] = self._add(image)
        return self._places[image]

    def _add(self, image: str) -> int | str:
        if self._bytes > PICTURE_BYTES:
            return f"{image} (not in this page, which has its {PICTURE_BYTES // 10**6} MB of pictures)"  # fmt: skip
        try:
            data = picture(self._folder, image)
        except DataError:
            return f"{image} (this folder keeps no picture of it)"
        text = "data:image/webp;base64," + base64.b64encode(data).decode("ascii")
        self._bytes += len(text)
        self.found.append(text)
        return len(self.found) - 1
