"""The table of scores: what each is, how it is counted, which way is better, where it is shown.

A score comes about in one of four ways. `per_reply`: the mean of a number that every reply has
(0..100). `counts`: numbers per reply whose sums over all replies give the score. `of_loss`: from the
mean loss over supervised tokens. `of_labels`: from how often each label was right, wanted and given,
where all references are labels. Everything else in the house (tables, intervals, comparisons, the
best checkpoint, the report) reads this table; a new score is one more entry of METRICS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from typing import Literal

import numpy as np

from finetune.evaluation.predictions import Prediction, Scores
from finetune.evaluation.scores import texts
from finetune.evaluation.scores.pairs import (
    DEFINITION,
    DEFINITIONS,
    REPEATED,
    Compared,
    DefinitionName,
    repetition_rate,
)
from finetune.evaluation.scores.texts import Numbers, icu_version

Better = Literal["higher", "lower", "neither"]
Source = Literal["replies", "labels", "loss", "general_loss"]
Shown = Literal["headline", "column", "page"]


@dataclass(frozen=True)
class ReplyCounts:
    """How a score comes about from numbers that are summed over replies."""

    width: int
    """Numbers per reply."""
    of_reply: Callable[[Compared], Sequence[float]]
    of_sums: Callable[[Numbers], Numbers]
    """Sums of R resamples [R, width] -> scores [R]; NaN where there is none."""


@dataclass(frozen=True)
class Metric:
    """One score."""

    name: str
    signature: str = ""
    """How the number comes about, to be printed beside it; `{…}` is filled from the definition."""
    better: Better = "higher"
    shown: Shown = "page"
    """`headline`: it may stand for all of them, the first that there is; it and a `column` stand in
    the terminal's table; the page shows every one."""
    digits: int = 1
    """Places that are shown."""
    source: Source = "replies"
    """What it needs."""
    per_reply: Callable[[Compared], float | None] | None = None
    counts: ReplyCounts | None = None
    of_loss: Callable[[Numbers], Numbers] | None = None
    of_labels: Callable[[Numbers, Numbers, Numbers], Numbers] | None = None
    """Hits, references and replies of every label, each [R, C] -> scores [R]."""

    @property
    def label(self) -> str:
        """Its name as people read it."""
        return self.name.replace("_", " ")

    @property
    def lower_is_better(self) -> bool:
        """Whether less of it is better."""
        return self.better == "lower"

    def goodness(self, value: float | None) -> float:
        """A number that is higher the better a score is; minus infinity where there is none."""
        if value is None or not math.isfinite(value):
            return -math.inf
        return -value if self.lower_is_better else value


def _overlap(name: str) -> Callable[[Compared], float | None]:
    return lambda pair: pair.overlap[name]


def _tool(name: str) -> Callable[[Compared], float | None]:
    return lambda pair: pair.tool_call[name]


def _stopped(pair: Compared) -> float | None:
    return None if pair.prediction.stopped is None else 100.0 * pair.prediction.stopped


def _length_ratio(sums: Numbers) -> Numbers:
    return _percent_of(sums[:, 0], sums[:, 1])


def _accuracy(hits: Numbers, wanted: Numbers, given: Numbers) -> Numbers:
    return _percent_of(hits.sum(axis=1), wanted.sum(axis=1))


def _macro_f1(hits: Numbers, wanted: Numbers, given: Numbers) -> Numbers:
    there = wanted + given > 0  # a label that a resample holds nowhere is not asked for
    each = np.where(there, _percent_of(2 * hits, wanted + given), 0.0)
    mean: Numbers = each.sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    return mean


def _percent_of(part: Numbers, whole: Numbers) -> Numbers:
    with np.errstate(divide="ignore", invalid="ignore"):
        share: Numbers = 100.0 * part / whole
    return share


_ROUGE = "f1, {rouge words}, mean over pairs, {odd}, {text} | {jieba} {rouge-chinese}"

METRICS: tuple[Metric, ...] = (
    Metric("rouge-l", _ROUGE, shown="headline", per_reply=_overlap("rouge-l")),
    Metric(
        "tool_call_accuracy",
        "share of right decisions whose call, if any, is right, over replies with tools",
        shown="headline",
        per_reply=_tool("tool_call_accuracy"),
    ),
    Metric(
        "exact_match",
        "share of equal texts, white space around them removed, {text}",
        shown="headline",
        per_reply=lambda pair: 100.0 * (pair.reply == pair.reference),
    ),
    Metric(
        "chrf",
        "{chrf}",
        shown="headline",
        counts=ReplyCounts(
            texts.CHRF_COUNTS,
            lambda pair: texts.chrf_counts(pair.reply, pair.reference),
            texts.chrf_of,
        ),
    ),
    Metric(
        "bleu-4",
        "sentence, {bleu words}, 1-4-grams (fewer than 4 words stay below 100), smoothing method3, "
        "mean over pairs, {odd}, {text} | "
        "{jieba} {nltk}",
        shown="headline",
        per_reply=_overlap("bleu-4"),
    ),
    Metric(
        "loss",
        "cross-entropy per supervised token of the references, natural logarithm",
        better="lower",
        shown="headline",
        digits=3,
        source="loss",
        of_loss=lambda loss: loss,
    ),
    Metric("perplexity", "exp(loss)", better="lower", digits=2, source="loss", of_loss=np.exp),
    Metric(
        "general_loss",
        "loss on the general set",
        better="lower",
        shown="column",
        digits=3,
        source="general_loss",
        of_loss=lambda loss: loss,
    ),
    Metric("rouge-1", _ROUGE, per_reply=_overlap("rouge-1")),
    Metric("rouge-2", _ROUGE, per_reply=_overlap("rouge-2")),
    Metric(
        "corpus_bleu",
        "{corpus bleu} (tok: {words})",
        counts=ReplyCounts(
            texts.BLEU_COUNTS, lambda pair: texts.bleu_counts(*pair.words), texts.bleu_of
        ),
    ),
    Metric(
        "label_accuracy",
        "share of right labels, where all references are labels; case and a full stop do not count",
        shown="column",
        source="labels",
        of_labels=_accuracy,
    ),
    Metric(
        "label_macro_f1",
        "mean of the F1 of every label that is wanted or given, where all references are labels",
        shown="column",
        source="labels",
        of_labels=_macro_f1,
    ),
    Metric(
        "json_validity",
        "share of replies that are JSON, over references that are a JSON object or list",
        shown="column",
        per_reply=lambda pair: pair.json["json_validity"],
    ),
    Metric(
        "json_match",
        "share of replies equal as JSON, over references that are a JSON object or list",
        per_reply=lambda pair: pair.json["json_match"],
    ),
    Metric(
        "json_schema_validity",
        "share of replies that are JSON under the schema of --check-schema (or --json-schema)",
        shown="column",
        per_reply=lambda pair: pair.json["json_schema_validity"],
    ),
    Metric(
        "length_ratio",
        "characters of all replies in per cent of those of all references",
        better="neither",
        counts=ReplyCounts(2, lambda pair: [len(pair.reply), len(pair.reference)], _length_ratio),
    ),
    Metric(
        "stop_rate",
        "share of replies that a stop token ended",
        shown="column",
        per_reply=_stopped,
    ),
    Metric(
        "repetition_rate",
        f"repeated runs of {REPEATED} words in a reply, mean over replies that long, {{words}}",
        better="lower",
        per_reply=lambda pair: repetition_rate(pair.words[0]),
    ),
    Metric(
        "tool_call_validity",
        "share of calls in question with a known name, JSON, required keys",
        per_reply=_tool("tool_call_validity"),
    ),
    Metric(
        "tool_call_decision",
        "share of calls and texts where they were due, over replies with tools",
        per_reply=_tool("tool_call_decision"),
    ),
    Metric(
        "tool_call_name",
        "share of equal names, over references that are calls",
        per_reply=_tool("tool_call_name"),
    ),
    Metric(
        "tool_call_arguments",
        "share of arguments equal as JSON, over references that are calls",
        per_reply=_tool("tool_call_arguments"),
    ),
    Metric(
        "tool_call_schema",
        "share of calls valid under a tool's JSON schema, over calls made",
        per_reply=_tool("tool_call_schema"),
    ),
)
"""In the order in which they are listed; headlines first."""
CHOOSING = [one.name for one in METRICS if one.source in ("replies", "loss")]
"""Those that `evaluation.best_metric` may name: what a run can compute of its own held-out data."""


_LOWER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")


def metric(name: str) -> Metric:
    """The score of that name; one of a user's own or of a public task is better when higher.

    But for a task's perplexities and the like, which its harness names alike everywhere.
    """
    known = _by_name().get(name)
    is_lower = name.rpartition("/")[2].startswith(_LOWER)
    return known or Metric(name, better="lower" if is_lower and "/" in name else "higher")


@cache
def _by_name() -> dict[str, Metric]:
    return {one.name: one for one in METRICS}


def of_source(source: Source) -> tuple[Metric, ...]:
    """The scores that need only this."""
    return tuple(one for one in METRICS if one.source == source)


def headline_of(names: Sequence[str]) -> str:
    """The one of `names` that stands for all of them."""
    known = (one.name for one in METRICS if one.shown == "headline" and one.name in names)
    return next(known, names[0])


def is_better(name: str, value: float, than: float | None) -> bool:
    """Whether `value` beats the best so far; a value that is no number never does."""
    one = metric(name)
    return math.isfinite(value) and one.goodness(value) > one.goodness(than)


def best_metric_problem(name: str) -> str | None:
    """What keeps a score from choosing the best checkpoint, in words; None when nothing does."""
    if name in CHOOSING:
        return None
    meant = get_close_matches(name, CHOOSING, n=1)
    hint = f"did you mean {meant[0]}?" if meant else f"choose {', '.join(CHOOSING)}"
    return f"{name!r} is no score of a run; {hint}"


def signatures(definition: DefinitionName = DEFINITION) -> dict[str, str]:
    """For every score one line that says how its number came about, to be printed beside it."""
    bleu, chrf = texts.sacrebleu_signatures()
    packages = {name: f"{name} {version(name)}" for name in ("jieba", "rouge-chinese", "nltk")}
    icu = icu_version() if definition == "default" else ""
    said = {
        **{name: text.format(icu=icu) for name, text in DEFINITIONS[definition].said.items()},
        **packages,
        "corpus bleu": bleu,
        "chrf": chrf,
        "text": "a call is its name, a line break and its arguments",
    }
    return {one.name: one.signature.format_map(said) for one in METRICS}


def numbers_of(
    prediction: Prediction, definition: DefinitionName = DEFINITION, schema: str = ""
) -> tuple[Scores, dict[str, list[float]]]:
    """The scores of one reply, whose means are a model's, and what it adds to sums over replies.

    Args:
        prediction: the reply beside its reference.
        definition: how texts are cut into words.
        schema: the JSON schema that replies shall be valid under, as text.
    """
    pair = Compared(prediction, DEFINITIONS[definition], schema)
    scores = {one.name: one.per_reply(pair) for one in METRICS if one.per_reply}
    return scores, {one.name: [*one.counts.of_reply(pair)] for one in METRICS if one.counts}
