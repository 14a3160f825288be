"""Answers -> predictions with their scores, on several processes when there are many.

    python -m finetune.evaluation.scoring ANSWERS FIRST LAST OUT OPTIONS

scores the lines FIRST to LAST of a file. Such processes import neither torch nor the program that
started them.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.evaluation import metrics, table
from finetune.evaluation.answers import Answer, answer_of
from finetune.evaluation.metrics import BleuUnit, Pair
from finetune.evaluation.predictions import Prediction
from finetune.storage.files import json_line, whole_file

FORMAT = 1
"""Version of what is computed; scores that were kept under another one are not used."""
LINES_PER_PROCESS = 500
"""Starting a process costs as much as scoring some 500 replies."""

UserMetric = Callable[[str, str], float | None]


@dataclass(frozen=True, slots=True)
class Scoring:
    """What decides the scores of given answers."""

    bleu_unit: BleuUnit = "word"
    """`character`: BLEU and ROUGE as LLaMA-Factory computes them."""
    own: tuple[str, ...] = ()
    """The user's metrics, each as `module:function`."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the user's metrics are called in tables: the names of their functions."""
        return tuple(one.partition(":")[2] for one in self.own)


def score(answer: Answer, scoring: Scoring) -> Prediction:
    """The answer with its scores."""
    pair = Pair(answer.reply, answer.reference, answer.stopped, answer.tools)
    scores = metrics.score_pair(pair)
    if scoring.bleu_unit == "character":
        scores |= metrics.llama_factory_scores(_whole(answer.reply), _whole(answer.reference))
    reply, reference = metrics.text(answer.reply), metrics.text(answer.reference)
    for name in scoring.own:
        scores[name.partition(":")[2]] = _called(name, reply, reference, answer.where)
    return Prediction(
        where=answer.where,
        message=answer.message,
        prompt=answer.prompt,
        reference=reference,
        prediction=reply,
        stopped=answer.stopped,
        scores=scores,
        counts=table.counts_of(pair),
        slices=answer.slices,
        images=answer.images,
    )


def score_file(answers: Path, output: Path, scoring: Scoring) -> int:
    """Writes the predictions of a file of answers, in its order; returns their number."""
    for name in scoring.own:
        user_metric(name)  # what is wrong with it shows once, and now
    with answers.open(encoding="utf-8") as file:
        total = sum(1 for _ in file)
    processes = min(os.cpu_count() or 1, math.ceil(total / LINES_PER_PROCESS))
    if processes < 2:
        with whole_file(output) as file:
            file.writelines(_scored_lines(answers, 0, total, scoring))
        return total
    with tempfile.TemporaryDirectory() as folder, whole_file(output) as file:
        for part in _in_parallel(answers, total, processes, Path(folder), scoring):
            with part.open(encoding="utf-8") as lines:
                shutil.copyfileobj(lines, file)
    return total


@cache
def user_metric(name: str) -> UserMetric:
    """The function of `module:function`, seen from the working directory.

    Raises:
        ConfigError: There is no such module or function, or importing it fails.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(f"metric {name!r}: write module:function, such as my_metrics:politeness")
    if function in (*metrics.METRICS, *table.COUNTS):
        raise ConfigError(f"metric {name!r}: {function} is a metric of ours; rename the function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ConfigError(f"metric {name!r}: {error} (seen from {Path.cwd()})") from error
    except AttributeError as error:
        raise ConfigError(f"metric {name!r}: {module} has no {function}") from error
    if not callable(found):
        raise ConfigError(f"metric {name!r}: {function} is no function")
    return found  # type: ignore[no-any-return]


def source_of(name: str) -> str:
    """The text of the module that a user's metric lies in, by which a changed one is told."""
    user_metric(name)
    file = sys.modules[name.partition(":")[0]].__file__
    return Path(file).read_text(encoding="utf-8") if file else ""


def _called(name: str, reply: str, reference: str, where: str) -> float | None:
    try:
        value = user_metric(name)(reply, reference)
        number = None if value is None else float(value)
    except Exception as error:
        raise ConfigError(
            f"metric {name!r} failed at {where} with {type(error).__name__}: {error}; it takes the "
            "texts of reply and reference and returns a number, or None where it does not apply"
        ) from error
    if number is not None and not math.isfinite(number):
        raise ConfigError(f"metric {name!r} returned {number} at {where}; return None instead")
    return number


def _whole(message: Any) -> str:
    """The text as it came, with the white space around it."""
    return f"{message.metadata}\n{message.content}" if message.metadata else str(message.content)


def _in_parallel(
    answers: Path, total: int, processes: int, folder: Path, scoring: Scoring
) -> Iterable[Path]:
    """The scored parts of the file, in order."""
    borders = [total * number // processes for number in range(processes + 1)]
    parts = [folder / str(number) for number in range(processes)]
    options = json.dumps(asdict(scoring))
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    children = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, answers, str(first), str(last), part, options],
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # a signal to the group is for this process, which ends them
        )
        for first, last, part in zip(borders, borders[1:], parts, strict=False)
    ]
    try:
        said = [child.communicate()[1] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, text in zip(children, said, strict=True):
        if child.returncode == ConfigError.exit_code:
            raise ConfigError(text.strip())
        if child.returncode:
            raise RuntimeError(
                f"a process that scores replies ended with {child.returncode}:\n{text}"
            )
    return parts


def _scored_lines(answers: Path, first: int, last: int, scoring: Scoring) -> Iterator[str]:
    with answers.open(encoding="utf-8") as file:
        for line in islice(file, first, last):
            yield json_line(score(answer_of(json.loads(line)), scoring).row)


def _main(words: list[str]) -> None:
    answers, first, last, output, options = words
    said = json.loads(options)
    scoring = Scoring(said["bleu_unit"], tuple(said["own"]))
    try:
        with Path(output).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(_scored_lines(Path(answers), int(first), int(last), scoring))
    except ConfigError as error:
        sys.stderr.write(str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    _main(sys.argv[1:])
