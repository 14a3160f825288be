"""Files of replies that were made elsewhere -> predictions with our scores."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from finetune.data.dialogue.conversation import Message
from finetune.data.reading.files import BadRow, read_rows
from finetune.errors import DataError
from finetune.evaluation.answers import Answer
from finetune.evaluation.scoring import Scoring, score_file
from finetune.evaluation.slices import language
from finetune.storage.files import json_line

LAYOUTS = (("predict", "label"), ("prediction", "reference"))
"""What reply and reference are called: by LLaMA-Factory, and by us."""


def read_foreign(source: Path, output: Path, scoring: Scoring, *, like: Path | None) -> None:
    """Writes the predictions of `source` to `output`, row by row.

    Args:
        source: rows `{"prompt", "predict", "label"}` or `{"prompt", "prediction", "reference"}`.
        output: the file to write.
        scoring: how they are scored.
        like: predictions of another target; the rows must answer the same references, and are
            compared with them reply by reply.

    Raises:
        DataError: a row is neither; or the references are not those of `like`; names the rows.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    answers = _answers(source)
    if like is not None:
        answers = _placed(source, answers, like)
    with tempfile.TemporaryDirectory() as folder:
        unscored = Path(folder) / "answers.jsonl"
        with unscored.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json_line(answer.row) for answer in answers)
        score_file(unscored, output, scoring)


def _answers(source: Path) -> Iterator[Answer]:
    for row in read_rows(source):
        if isinstance(row, BadRow):
            raise DataError(f"{row.where}: {row.reason}")
        yield _answer(row.value, row.where)


def _answer(row: Any, where: str) -> Answer:
    names = next((names for names in LAYOUTS if isinstance(row, dict) and set(names) <= set(row)), None)  # fmt: skip
    if names is None:
        wanted = " or ".join(f'{{"{reply}", "{reference}"}}' for reply, reference in LAYOUTS)
        raise DataError(f"{where}: not a prediction; a row holds {wanted}, and perhaps the prompt")
    reply, reference = (row[name] for name in names)
    if not isinstance(reply, str) or not isinstance(reference, str):
        raise DataError(f"{where}: {names[0]} and {names[1]} must be text")
    stopped = row.get("stopped")
    slices = row.get("slices")
    return Answer(
        where=str(row.get("where", where)),
        message=row["message"] if isinstance(row.get("message"), int) else 0,
        prompt=str(row.get("prompt", "")),
        reply=Message("assistant", reply),
        reference=Message("assistant", reference),
        stopped=stopped if isinstance(stopped, bool) else None,
        slices=slices if isinstance(slices, dict) else {"language": language(reference)},
        images=tuple(row.get("images") or ()),
    )


def _placed(source: Path, answers: Iterator[Answer], like: Path) -> Iterator[Answer]:
    """The answers with the places and slices of another target's, whose references must be the same."""
    with like.open(encoding="utf-8") as lines:
        for number, (answer, line) in enumerate(zip_longest(answers, lines), 1):
            if answer is None or line is None:
                which = "more" if line is None else "fewer"
                raise DataError(f"{source} has {which} rows than there are replies to compare with")
            other = json.loads(line)
            if answer.reference.content.strip() != other["reference"].strip():
                raise DataError(
                    f"{source}: row {number} answers another reference than {other['where']}; give "
                    "predictions for the same data in the same order, or evaluate them alone"
                )
            yield replace(
                answer,
                where=other["where"],
                message=other["message"],
                prompt=other["prompt"],
                slices=other["slices"],
                images=tuple(other.get("images", ())),
            )
