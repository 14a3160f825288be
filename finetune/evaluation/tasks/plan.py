"""What `--tasks` names: tasks of lm-evaluation-harness, tables of GLM-4's README, tool calls in a folder.

mmlu,gsm8k           two tasks, asked as a chat model is asked
text:mmlu            the same without the chat template, as a base model is asked
my_task.yaml         a task of the user's own
calls:FOLDER         the Berkeley leaderboard's files in a folder
needle:4k..128k      a sentence hidden in texts of these lengths
writing:500..4000    texts of so many words, to be written
glm4-base glm4-chat multilingual      the README's tables
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.errors import ConfigError

TEXT, CALLS, NEEDLE, WRITING = "text:", "calls:", "needle:", "writing:"
_RANGE = re.compile(r"(\d+)([km]?)(?:\.\.(\d+)([km]?))?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1024, "m": 1024**2}
RUNS_CODE = "humaneval"
"""Its questions are answered with programs, which are run."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task."""

    name: str
    """Of the harness, or a YAML file; of `calls` the folder, of `needle` and `writing` the lengths."""
    kind: Literal["chat", "text", "calls", "needle", "writing"]

    @property
    def label(self) -> str:
        """What its scores are called before the slash."""
        return Path(self.name).stem if self.name.endswith((".yaml", ".yml")) else self.name


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of GLM-4's README, beside which a score of ours may stand."""

    score: str
    value: float
    model: str
    task: str
    """As it is typed."""


PRESETS: dict[str, tuple[Figure, ...]] = {
    "glm4-base": tuple(
        Figure(score, value, "GLM-4-9B", f"text:{score.partition('/')[0]}")
        for score, value in (
            ("mmlu/acc", 74.7),
            ("ceval-valid/acc", 77.1),
            ("gpqa_main_n_shot/acc", 34.3),
            ("gsm8k/exact_match:flexible-extract", 84.0),
            ("hendrycks_math/exact_match", 30.4),
            ("humaneval/pass@1:create_test", 70.1),
        )
    ),
    "glm4-chat": tuple(
        Figure(score, value, "GLM-4-9B-Chat", score.partition("/")[0])
        for score, value in (
            ("ifeval/prompt_level_loose_acc", 69.0),
            ("mmlu/acc", 72.4),
            ("ceval-valid/acc", 75.6),
            ("gsm8k/exact_match:flexible-extract", 79.6),
            ("hendrycks_math/exact_match", 50.6),
            ("humaneval_instruct/pass@1:create_test", 71.8),
        )
    ),
    "multilingual": tuple(
        Figure(score, value, "GLM-4-9B-Chat", score.partition("/")[0])
        for score, value in (
            ("m_mmlu/acc", 56.6),
            ("mgsm_direct/exact_match:flexible-extract", 65.3),
            ("xwinograd/acc", 73.1),
            ("xstorycloze/acc", 90.7),
            ("xcopa/acc", 80.1),
        )
    ),
}
"""The tables of GLM-4's README as far as the harness has the tasks; prompts and shots are the harness's
own, so a difference of a few points from the published figure is no fault of a model."""


ALSO = {"ceval": "ceval-valid"}
"""Names that people type, and the harness's own."""


def lengths_of(task: Task) -> list[int]:
    """The lengths of `4k..32k`, doubling; ConfigError for what is no range."""
    typed = f"--tasks {task.kind}:{task.name}"
    found = _RANGE.fullmatch(task.name)
    if not found:
        raise ConfigError(f"{typed}: write a length or a range, such as 4k or 4k..128k")
    first = int(found[1]) * _UNITS[found[2].lower()]
    last = int(found[3]) * _UNITS[found[4].lower()] if found[3] else first
    if not 256 <= first <= last:
        raise ConfigError(f"{typed}: write lengths that rise, of 256 or more")
    lengths = [first]
    while lengths[-1] * 2 <= last:
        lengths.append(lengths[-1] * 2)
    return lengths


def runs_code() -> bool:
    """Whether the user allows that programs which a model writes are run."""
    return os.environ.get("HF_ALLOW_CODE_EVAL") == "1"


def read_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks that the words of `--tasks` mean, each once."""
    words = [word for name in names for word in _split(name)]
    return list(dict.fromkeys(task for word in words for task in _tasks(word)))


def published(names: Sequence[str]) -> list[Figure]:
    """The published figures of the presets among the words of `--tasks`."""
    words = [word for name in names for word in _split(name)]
    return [figure for word in words for figure in PRESETS.get(word, ())]


def left_out(names: Sequence[str]) -> list[str]:
    """Tasks of presets that are not asked because they run programs."""
    asked = {task.name for task in read_tasks(names)}
    found = (figure.task.removeprefix(TEXT) for figure in published(names))
    return [name for name in dict.fromkeys(found) if name not in asked]


def _split(name: str) -> list[str]:
    """The words of `mmlu,gsm8k`; a folder or a file may hold commas."""
    return [name] if name.startswith(CALLS) or Path(name).exists() else name.split(",")


def _tasks(word: str) -> Iterator[Task]:
    word = ALSO.get(word, word)
    if word in PRESETS:
        for figure in PRESETS[word]:
            if runs_code() or not figure.score.startswith(RUNS_CODE):
                yield from _tasks(figure.task)
    elif word.startswith(CALLS):
        yield Task(word.removeprefix(CALLS), "calls")
    elif word.startswith(NEEDLE):
        yield Task(word.removeprefix(NEEDLE), "needle")
    elif word.startswith(WRITING):
        yield Task(word.removeprefix(WRITING), "writing")
    elif word.startswith(TEXT):
        yield Task(word.removeprefix(TEXT), "text")
    elif word:
        yield Task(word, "chat")
