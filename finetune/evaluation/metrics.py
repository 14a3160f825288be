"""One reply beside its reference -> BLEU-4, ROUGE-1/2/L, exact match, repetition, stop rate, tool calls.

Every number runs from 0 to 100, and a model's score is their mean over pairs. Words are jieba's. BLEU
is nltk's sentence BLEU and ROUGE is rouge_chinese's F1, to the last digit; `signatures` says so in
print. Scores that are no means over pairs are in `finetune.evaluation.table`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, Literal, TypeAlias

import numpy as np

from finetune.data.dialogue.conversation import Message
from finetune.data.dialogue.tool_calls import tool_name
from finetune.evaluation import tool_calls
from finetune.evaluation.corpus import is_chinese, plain_words

BleuUnit = Literal["word", "character"]
Scores: TypeAlias = dict[str, float | None]
"""Name -> 0..100; None where the question does not arise (tool-call validity without tools)."""

TEXT_METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "exact_match")
METRICS = (*TEXT_METRICS, "repetition_rate", "stop_rate", "tool_call_validity", *tool_calls.PARTS)
"""Those that are means over pairs."""
_REPEATED = 4
"""Words of what counts as repeated."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One generated reply beside the reply of the dataset."""

    reply: Message
    reference: Message
    stopped: bool | None = None
    """Whether a stop token ended the reply; None when it is not known."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The tools that the dialogue offers."""


def score(pairs: Iterable[Pair], *, bleu_unit: BleuUnit = "word") -> Scores:
    """Means over `pairs` of every metric in `METRICS`."""
    return mean([score_pair(pair, bleu_unit=bleu_unit) for pair in pairs])


def score_pair(pair: Pair, *, bleu_unit: BleuUnit = "word") -> Scores:
    """The scores of one pair; their means over all pairs are the scores of a model."""
    reply = text(pair.reply)
    return {
        **_score_text(reply, text(pair.reference), bleu_unit),
        "repetition_rate": repetition_rate(language_words(reply)),
        "stop_rate": None if pair.stopped is None else 100.0 * pair.stopped,
        "tool_call_validity": tool_call_validity(pair),
        **tool_calls.parts(pair.reply, pair.reference, pair.tools),
    }


def llama_factory_scores(reply: str, reference: str) -> dict[str, float]:
    """BLEU-4 and ROUGE of one pair as LLaMA-Factory computes them before it takes the mean.

    BLEU on characters, ROUGE on jieba words, the texts as they are with the white space around them,
    and every value rounded to four digits.
    """
    one, other = words(reply), words(reference)
    blank = not reply.split() or not reference.split()
    found = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), 0.0) if blank else rouge(one, other)
    found["bleu-4"] = bleu(list(reply), list(reference))
    return {name: round(value, 4) for name, value in found.items()}


def mean(scores: Sequence[Scores]) -> Scores:
    """Means name by name over the pairs for which a score exists."""
    means: Scores = {}
    for name in METRICS:
        values = [value for one in scores if (value := one[name]) is not None]
        means[name] = float(np.mean(values)) if values else None
    return means


def text(message: Message) -> str:
    """What is compared: a reply's text, or a call's name, a line break and its arguments."""
    metadata, content = message.metadata.strip(), message.content.strip()
    return f"{metadata}\n{content}" if metadata else content


def words(line: str) -> list[str]:
    """The words of a text, white space among them, as jieba's default dictionary cuts it."""
    return _scorers().words(line)


def language_words(line: str) -> list[str]:
    """The words of a text without white space: jieba's of a Chinese text, else split at signs."""
    if not is_chinese(line):
        return plain_words(line)
    return [word for word in words(line) if not word.isspace()]


def repetition_rate(line: Sequence[str]) -> float | None:
    """Share of a text's runs of four words that stood in it before; None without such a run."""
    runs = [tuple(line[i : i + _REPEATED]) for i in range(len(line) - _REPEATED + 1)]
    return 100.0 * (1 - len(set(runs)) / len(runs)) if runs else None


def bleu(reply: Sequence[str], reference: Sequence[str]) -> float:
    """Sentence BLEU with uniform 1- to 4-grams and smoothing method 3 (Chen and Cherry 2014)."""
    return 100.0 * _scorers().bleu(reply, reference)


def rouge(reply: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 (sets of n-grams) and ROUGE-L (longest common subsequence)."""
    scorers = _scorers()
    hypothesis, target = scorers.sentences(reply), scorers.sentences(reference)
    return {
        "rouge-1": 100.0 * scorers.rouge_n(hypothesis, target, 1),
        "rouge-2": 100.0 * scorers.rouge_n(hypothesis, target, 2),
        "rouge-l": 100.0 * scorers.rouge_l(hypothesis, target),
    }


def lcs_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, one machine word per 64 positions.

    The bit-parallel recurrence of Hyyrö (2004): a zero in `row` at bit i says that position i of
    `one` lengthens the subsequence. rouge_chinese fills a Python dict with len(one) x len(other)
    entries instead, gigabytes for two replies of 4,000 words.
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(one):
        positions[word] = positions.get(word, 0) | 1 << index
    every = (1 << len(one)) - 1
    row = every
    for word in other:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(one) - row.bit_count()


def tool_call_validity(pair: Pair) -> float | None:
    """100 if the reply is a call that could be run, 0 if not, None if no call is in question.

    A call is in question when the reference is one, or when tools are offered and the reply is
    one. It could be run when its name is among the tools, its arguments parse as a JSON object,
    and the required ones are present. The built-in tools take text, so their name is enough.
    """
    if not pair.reference.metadata and not (pair.tools and pair.reply.metadata):
        return None
    name = pair.reply.metadata.strip()
    tool = next((tool for tool in pair.tools if tool_name(tool) == name), None)
    if tool is None:
        return 0.0
    if "function" not in tool:
        return 100.0
    try:
        arguments = json.loads(pair.reply.content)
    except (ValueError, RecursionError):
        return 0.0
    required = (tool["function"].get("parameters") or {}).get("required") or []
    return 100.0 * (isinstance(arguments, dict) and all(key in arguments for key in required))


def signatures(*, bleu_unit: BleuUnit = "word") -> dict[str, str]:
    """For every metric one line that says how its number came about, to be printed beside it."""
    jieba, rouge_chinese, nltk = (
        f"{name} {version(name)}" for name in ("jieba", "rouge-chinese", "nltk")
    )
    unit, odd = "jieba words", "empty replies score 0"
    if bleu_unit == "character":
        unit, odd = "characters", f"{odd}, texts unstripped, pairs rounded to 4 digits"
    text_form = "calls as name, line break, arguments"
    rouge_form = f"f1, jieba words, mean over pairs, {odd}, {text_form} | {jieba} {rouge_chinese}"
    return {
        "bleu-4": f"sentence, {unit}, 1-4-grams, smoothing method3, mean over pairs, {odd}, "
        f"{text_form} | {jieba} {nltk}",
        "rouge-1": rouge_form,
        "rouge-2": rouge_form,
        "rouge-l": rouge_form,
        "exact_match": f"share of equal texts, white space around them removed, {text_form}",
        "repetition_rate": f"repeated runs of {_REPEATED} words in a reply, mean over replies that "
        "long, jieba words of Chinese texts, else split at signs",
        "stop_rate": "share of replies that a stop token ended",
        "tool_call_validity": "share of calls in question with a known name, JSON, required keys",
        "tool_call_accuracy": "share of right decisions whose call, if any, is right, over replies "
        "with tools",
        "tool_call_decision": "share of calls and texts where they were due, over replies with tools",
        "tool_call_name": "share of equal names, over references that are calls",
        "tool_call_arguments": "share of arguments equal as JSON, over references that are calls",
        "tool_call_schema": "share of calls valid under a tool's JSON schema, over calls made",
    }


def signature(*, bleu_unit: BleuUnit = "word") -> str:
    """What `signatures` says of BLEU and ROUGE, in one line."""
    said = signatures(bleu_unit=bleu_unit)
    return f"scale 0..100 | bleu-4: {said['bleu-4']} | rouge: {said['rouge-l']}"


def _score_text(reply: str, reference: str, bleu_unit: BleuUnit) -> dict[str, float]:
    exact = 100.0 * (reply == reference)
    if not reply or not reference:
        return dict.fromkeys(TEXT_METRICS, 0.0) | {"exact_match": exact}
    one, other = words(reply), words(reference)
    fine = bleu(one, other) if bleu_unit == "word" else bleu(list(reply), list(reference))
    return {"bleu-4": fine, **rouge(one, other), "exact_match": exact}


@dataclass(frozen=True)
class _Scorers:
    """The borrowed functions, opened once."""

    words: Callable[[str], list[str]]
    bleu: Callable[[Sequence[str], Sequence[str]], float]
    sentences: Callable[[Sequence[str]], list[str]]
    rouge_n: Callable[[list[str], list[str], int], float]
    rouge_l: Callable[[list[str], list[str]], float]


@cache
def _scorers() -> _Scorers:
    """nltk, jieba and rouge_chinese, without what the last two warn about while importing.

    jieba asks for the deprecated pkg_resources, and both hold escapes that Python 3.12 warns of.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge, rouge_score

    # A segmenter of our own, filled by hand: `jieba.cut` would log to stderr, take words that
    # anybody added to the global one, and trust (and leave) a marshal file in the shared /tmp.
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    method3 = SmoothingFunction().method3
    cut_sentences = Rouge().cut_sent

    def sentences(line: Sequence[str]) -> list[str]:
        return [" ".join(part.split()) for part in cut_sentences(" ".join(line)) if part]

    def split(parts: list[str]) -> list[str]:
        return [word for part in parts for word in part.split(" ")]

    def rouge_l(hypothesis: list[str], target: list[str]) -> float:
        one, other = split(hypothesis), split(target)
        common = lcs_length(one, other)
        return float(rouge_score.f_r_p_rouge_n(len(one), len(other), common)["f"])

    return _Scorers(
        words=lambda line: list(segmenter.cut(line)),
        bleu=lambda one, other: float(sentence_bleu([other], one, smoothing_function=method3)),
        sentences=sentences,
        rouge_n=lambda one, other, n: float(rouge_score.rouge_n(one, other, n)["f"]),
        rouge_l=rouge_l,
    )
