"""Predictions -> predictions with their scores, on several processes when there are many.

    python -m finetune.evaluation.scoring UNSCORED FIRST LAST OUT OPTIONS

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from finetune.data.dialogue.conversation import Message
from finetune.data.reading.files import BadRow, read_rows
from finetune.errors import ConfigError, DataError
from finetune.evaluation.predictions import Prediction, language, read_unscored, text
from finetune.evaluation.scores.metrics import METRICS, numbers_of
from finetune.evaluation.scores.pairs import DEFINITION, DefinitionName
from finetune.storage.files import json_line, whole_file

FORMAT = 3
"""Version of what is computed; scores that were kept under another one are not used."""
LINES_PER_PROCESS = 500
"""Starting a process costs as much as scoring some 500 replies."""

PACKAGES = ("jieba", "nltk", "pyicu-wheels", "rouge-chinese", "sacrebleu", "numpy")
"""What decides the scores of given replies."""
LAYOUTS = (("predict", "label"), ("prediction", "reference"))
"""What reply and reference are called in replies made elsewhere: by LLaMA-Factory, and by us."""

UserMetric = Callable[[str, str], float | None]


@dataclass(frozen=True, slots=True)
class Scoring:
    """What decides the scores of given replies."""

    definition: DefinitionName = DEFINITION
    """How texts are cut into words."""
    own: tuple[str, ...] = ()
    """The user's metrics, each as `module:function`."""
    schema: str = ""
    """JSON schema that every reply shall be valid under, as text."""

    @property
    def told(self) -> dict[str, Any]:
        """What `evaluation.json` says of it."""
        schema = {"schema": sha256(self.schema.encode()).hexdigest()[:8]} if self.schema else {}
        return {"definition": self.definition, "own": [*self.own], **schema}

    @property
    def names(self) -> tuple[str, ...]:
        """What the user's metrics are called in tables: the names of their functions."""
        return tuple(one.partition(":")[2] for one in self.own)


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of installed packages by name."""
    return {name: version(name) for name in packages}


def score(prediction: Prediction, scoring: Scoring) -> Prediction:
    """The prediction with its scores."""
    scores, counts = numbers_of(prediction, scoring.definition, scoring.schema)
    reply, reference = text(prediction.reply), text(prediction.reference)
    for name in scoring.own:
        scores[name.partition(":")[2]] = _called(name, reply, reference, prediction.location)
    return replace(prediction, scores=scores, counts=counts)


def score_file(unscored: Path, output: Path, scoring: Scoring) -> int:
    """Writes the predictions of a file with their scores, in its order; returns their number."""
    for name in scoring.own:
        user_metric(name)  # what is wrong with it shows once, and now
    with unscored.open(encoding="utf-8") as file:
        total = sum(1 for _ in file)
    processes = min(os.cpu_count() or 1, math.ceil(total / LINES_PER_PROCESS))
    if processes < 2:
        with whole_file(output) as file:
            file.writelines(_scored_lines(unscored, 0, total, scoring))
        return total
    with tempfile.TemporaryDirectory() as folder, whole_file(output) as file:
        for part in _in_parallel(unscored, total, processes, Path(folder), scoring):
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
    if function in (one.name for one in METRICS):
        raise ConfigError(f"metric {name!r}: {function} is a built-in metric; rename the function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ConfigError(
            f"metric {name!r}: {error} (seen from {Path.cwd()}); correct the name, or start where the module is"
        ) from error
    except AttributeError as error:
        raise ConfigError(
            f"metric {name!r}: {module} has no {function}; correct the name"
        ) from error
    except (Exception, SystemExit) as error:  # whatever a user's module does
        raise ConfigError(
            f"metric {name!r}: {module} cannot be imported ({type(error).__name__}: {error}); correct it"
        ) from error
    if not callable(found):
        raise ConfigError(f"metric {name!r}: {function} is not a function; name a function")
    return found  # type: ignore[no-any-return]


def check_metrics(names: Sequence[str]) -> None:
    """Raises ConfigError for metrics of the user that cannot be called, or of which two are called alike."""
    functions = [name.partition(":")[2] for name in names]
    for name, function in zip(names, functions, strict=True):
        user_metric(name)
        if functions.count(function) > 1:
            raise ConfigError(
                f"metric {name!r}: another metric is called {function} too; rename one of the functions"
            )


def source_of(name: str) -> str:
    """The text of the module that a user's metric lies in, by which a changed one is told."""
    user_metric(name)
    file = sys.modules[name.partition(":")[0]].__file__
    return Path(file).read_text(encoding="utf-8") if file else ""


def score_external(source: Path, output: Path, scoring: Scoring, *, like: Path | None) -> None:
    """Writes the predictions of `source` to `output`, row by row.

    Args:
        source: rows `{"prompt", "predict", "label"}` or `{"prompt", "prediction", "reference"}`, or lines of
            `predict`, in which several replies to a dialogue count as one, by their mean.
        output: the file to write.
        scoring: how they are scored.
        like: predictions of another target; the rows must answer the same references, and are
            compared with them reply by reply.

    Raises:
        DataError: a row is neither; or the references are not those of `like`; names the rows.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    replies = _external(source)
    if like is not None:
        replies = _placed(source, replies, like)
    with tempfile.TemporaryDirectory() as folder:
        unscored = Path(folder) / "unscored.jsonl"
        with unscored.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json_line(one.unscored_row) for one in replies)
        score_file(unscored, output, scoring)


def _external(source: Path) -> Iterator[Prediction]:
    for row in read_rows(source):
        if isinstance(row, BadRow):
            raise DataError(f"{row.location}: {row.reason}")
        yield _prediction(row.value, row.location)


def _prediction(row: Any, location: str) -> Prediction:
    if isinstance(row, dict) and {"where", "messages", "stopped"} <= set(row):
        return _of_predict(row, location)
    names = next((names for names in LAYOUTS if isinstance(row, dict) and set(names) <= set(row)), None)  # fmt: skip
    if names is None:
        wanted = " or ".join(f'{{"{reply}", "{reference}"}}' for reply, reference in LAYOUTS)
        raise DataError(
            f"{location}: not a prediction; write {wanted} in each row, and perhaps the prompt"
        )
    reply, reference = (row[name] for name in names)
    if not isinstance(reply, str) or not isinstance(reference, str):
        raise DataError(f"{location}: {names[0]} and {names[1]} must be text")
    stopped = row.get("stopped")
    slices = row.get("slices")
    return Prediction(
        location=str(row.get("where", location)),
        message=row["message"] if isinstance(row.get("message"), int) else 0,
        prompt=str(row.get("prompt", "")),
        reply=Message("assistant", reply),
        reference=Message("assistant", reference),
        stopped=stopped if isinstance(stopped, bool) else None,
        slices=slices if isinstance(slices, dict) else {"language": language(reference)},
    )


def _of_predict(row: Mapping[str, Any], location: str) -> Prediction:
    """The prediction that a line of `finetune predict` is."""
    if "reference" not in row:
        raise DataError(
            f"{location}: the dialogue had no reply to compare with; give `predict` dialogues that end with one"
        )
    messages = row["messages"]
    begin = len(messages)
    while begin and messages[begin - 1]["role"] == "assistant":
        begin -= 1
    reply, reference = (
        Message("assistant", one["content"], one.get("metadata", ""))
        for one in (messages[begin], row["reference"])
    )
    return Prediction(
        location=row["where"],
        message=begin,
        prompt="\n".join(message["content"] for message in messages[:begin]),
        reply=reply,
        reference=reference,
        stopped=row["stopped"],
        tools=tuple(row.get("tools", ())),
        slices={"language": language(text(reference))},
    )


def _placed(source: Path, replies: Iterator[Prediction], like: Path) -> Iterator[Prediction]:
    """The replies with the places and slices of another target's, whose references must be the same."""
    with like.open(encoding="utf-8") as lines:
        for number, (one, line) in enumerate(zip_longest(replies, lines), 1):
            if one is None or line is None:
                which = "more" if line is None else "fewer"
                raise DataError(
                    f"{source} has {which} rows than there are replies to compare with; give predictions for the same data"
                )
            other = json.loads(line)
            if text(one.reference) != other["reference"].strip():
                raise DataError(
                    f"{source}: row {number} answers another reference than {other['where']}; give "
                    "predictions for the same data in the same order, or evaluate them alone"
                )
            yield replace(
                one,
                location=other["where"],
                message=other["message"],
                prompt=other["prompt"],
                slices=other["slices"],
                images=tuple(other.get("images", ())),
            )


def _called(name: str, reply: str, reference: str, location: str) -> float | None:
    try:
        value = user_metric(name)(reply, reference)
        number = None if value is None else float(value)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"metric {name!r} failed at {location} with {type(error).__name__}: {error}; write it to "
            "take the texts of reply and reference and return a number, or None where it does not apply"
        ) from error
    if number is not None and not math.isfinite(number):
        raise ConfigError(f"metric {name!r} returned {number} at {location}; return None instead")
    return number


def _in_parallel(
    unscored: Path, total: int, processes: int, folder: Path, scoring: Scoring
) -> Iterable[Path]:
    """The scored parts of the file, in order."""
    borders = [total * number // processes for number in range(processes + 1)]
    parts = [folder / str(number) for number in range(processes)]
    options = json.dumps(asdict(scoring))
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    children = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, unscored, str(first), str(last), part, options],
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
    for child, words in zip(children, said, strict=True):
        if child.returncode == ConfigError.exit_code:
            raise ConfigError(words.strip())
        if child.returncode:
            raise RuntimeError(
                f"a process that scores replies ended with {child.returncode}:\n{words}"
            )
    return parts


def _scored_lines(unscored: Path, first: int, last: int, scoring: Scoring) -> Iterator[str]:
    with unscored.open(encoding="utf-8") as file:
        for line in islice(file, first, last):
            yield json_line(score(read_unscored(json.loads(line)), scoring).row)


def _main(words: list[str]) -> None:
    unscored, first, last, output, options = words
    said = json.loads(options)
    scoring = Scoring(said["definition"], tuple(said["own"]), said["schema"])
    try:
        with Path(output).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(_scored_lines(Path(unscored), int(first), int(last), scoring))
    except ConfigError as error:
        sys.stderr.write(str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    _main(sys.argv[1:])
