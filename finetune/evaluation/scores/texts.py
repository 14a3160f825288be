"""Texts -> words -> how much two texts have in common, through jieba, ICU, nltk, rouge_chinese and sacrebleu.

BLEU-4 and ROUGE are of one pair. BLEU and chrF of a corpus are counts per pair whose sums give the
score, so that a bootstrap resamples counts and never counts again; `bleu_of` and `chrf_of` take sums
of many resamples at once and are held to sacrebleu's own by a test.

R resamples.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

BLEU_COUNTS = 10
"""Lengths of reply and reference, matching 1- to 4-grams, all 1- to 4-grams of the reply."""
CHRF_COUNTS = 18
"""For 1 to 6 characters: n-grams of the reply, of the reference, in both."""
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_HAN = re.compile(rf"{_CHINESE.pattern}+")
_KANA = re.compile(r"[\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f]")
_WORD = re.compile(r"\w+|[^\w\s]")
_PARTICLES = frozenset(
    [
        "は",
        "が",
        "を",
        "に",
        "で",
        "の",
        "と",
        "も",
        "へ",
        "や",
        "か",
        "し",
        "ね",
        "よ",
        "から",
        "まで",
        "より",
        "には",
        "では",
        "とは",
        "でも",
        "ので",
        "のに",
    ]
)
"""Japanese particles as ICU cuts them; Korean ones stay with their words, and these have none."""


def is_chinese(text: str) -> bool:
    """Whether a text holds a Chinese character."""
    return _CHINESE.search(text) is not None


def jieba_words(text: str) -> list[str]:
    """The words of a text, white space among them, as jieba's default dictionary cuts it."""
    return _jieba()(text)


def plain_words(text: str) -> list[str]:
    """Words of a text in a language with spaces: runs of letters and digits, and each other sign."""
    return _WORD.findall(text)


def language_words(text: str) -> list[str]:
    """The words of a text without white space: jieba's of a Chinese text, else split at signs."""
    if not is_chinese(text):
        return plain_words(text)
    return [word for word in jieba_words(text) if not word.isspace()]


def script_words(text: str) -> list[str]:
    """The words and signs of a text in any language, without white space.

    Runs of Chinese characters are cut by jieba, unless the text holds kana and is Japanese; all else
    by ICU: by dictionary for Japanese, Thai, Khmer, Lao and Burmese, by the word boundaries of Unicode
    (UAX 29) for the others, so that `3.5`, `it's` and `foo_bar` stay whole.

    >>> script_words("它是 GLM-4, 3.5 倍"), script_words("今日は")
    (['它', '是', 'GLM', '-', '4', ',', '3.5', '倍'], ['今日', 'は'])
    """
    if _KANA.search(text):
        return _icu()(text)
    words: list[str] = []
    end = 0
    for run in _HAN.finditer(text):
        words += _icu()(text[end : run.start()])
        words += jieba_words(run[0])
        end = run.end()
    return words + _icu()(text[end:])


def content_words(words: Sequence[str]) -> Sequence[str]:
    """The words that hold a letter or a digit and are no Japanese particle; all when none is.

    A full stop that two texts share makes them no more alike, and は or を does not either.
    """
    return [
        word for word in words if any(map(str.isalnum, word)) and word not in _PARTICLES
    ] or words


def icu_version() -> str:
    """The version of ICU, whose dictionaries and rules cut words."""
    import icu

    return f"ICU {icu.ICU_VERSION}"


@cache
def _icu() -> Callable[[str], list[str]]:
    import icu

    iterator = icu.BreakIterator.createWordInstance(icu.Locale.getRoot())

    def cut(text: str) -> list[str]:
        units = icu.UnicodeString(text)  # boundaries count UTF-16 units
        iterator.setText(units)
        words, begin = [], 0
        for end in iterator:
            word = str(units[begin:end])
            begin = end
            if not word.isspace():
                words.append(word)
        return words

    return cut


@cache
def _jieba() -> Callable[[str], list[str]]:
    """A segmenter of our own, without what jieba warns about while it is imported.

    `jieba.cut` would log to stderr, take words that anybody added to the global segmenter, and trust
    (and leave) a marshal file in the shared /tmp; so the dictionary is filled in by hand.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the deprecated pkg_resources, escapes of old Pythons
        import jieba

    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return lambda text: list(segmenter.cut(text))


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


def bleu_counts(reply: Sequence[str], reference: Sequence[str]) -> list[int]:
    """What corpus BLEU counts in one pair of word lists [BLEU_COUNTS]."""
    return _counted(_bleu(), " ".join(reply), " ".join(reference))


def chrf_counts(reply: str, reference: str) -> list[int]:
    """What chrF counts in one pair of texts [CHRF_COUNTS]."""
    return _counted(_chrf(), reply, reference)


def bleu_of(sums: Numbers) -> Numbers:
    """BLEU [R] of summed counts [R, BLEU_COUNTS]: uniform 1-4-grams, brevity penalty, smoothing exp."""
    reply, reference = sums[:, 0], sums[:, 1]
    matching, total = sums[:, 2:6], sums[:, 6:10]
    with np.errstate(divide="ignore", invalid="ignore"):
        penalty = np.where(reply < reference, np.exp(1 - reference / reply), 1.0)
        # A missing order counts half as much as the last missing one: 1/2, 1/4, … of a match.
        halved = 0.5 ** np.cumsum(matching == 0, axis=1)
        precision = np.where(matching == 0, halved, matching) / total
        # Replies that are all shorter than n words have no n-grams, and are not asked for any.
        there = total > 0
        logs = np.where(there, np.log(precision), 0.0).sum(axis=1) / there.sum(axis=1)
        score = 100.0 * penalty * np.exp(logs)
    possible = matching.any(axis=1)
    return np.where(possible, score, 0.0)


def chrf_of(sums: Numbers) -> Numbers:
    """chrF2 [R] of summed counts [R, CHRF_COUNTS]: 1-6 characters, beta 2, white space left out."""
    counts = sums.reshape(-1, CHRF_COUNTS // 3, 3)
    reply, reference, both = counts[..., 0], counts[..., 1], counts[..., 2]
    used = (reply > 0) & (reference > 0)
    orders = np.maximum(used.sum(axis=1), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(used, both / reply, 0.0).sum(axis=1) / orders
        recall = np.where(used, both / reference, 0.0).sum(axis=1) / orders
        score = 100.0 * 5.0 * precision * recall / (4.0 * precision + recall)
    return np.where(precision + recall > 0, score, 0.0)


@cache
def sacrebleu_signatures() -> tuple[str, str]:
    """Sacrebleu's own signatures of BLEU and chrF."""
    for metric in (_bleu(), _chrf()):
        _counted(metric, "", "")  # it learns the number of references by counting
    return str(_bleu().get_signature()), str(_chrf().get_signature())


def _counted(metric: Any, reply: str, reference: str) -> list[int]:
    [counts] = metric._extract_corpus_statistics([reply], [[reference]])
    return [int(count) for count in counts]


@cache
def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="none", force=True, effective_order=True)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@dataclass(frozen=True)
class _Scorers:
    """The functions of nltk and rouge_chinese, opened once."""

    bleu: Callable[[Sequence[str], Sequence[str]], float]
    sentences: Callable[[Sequence[str]], list[str]]
    rouge_n: Callable[[list[str], list[str], int], float]
    rouge_l: Callable[[list[str], list[str]], float]


@contextmanager
def _any_home() -> Iterator[None]:
    """Nltk ends its import when a user without an entry in the user database has no HOME either."""
    is_missing = "HOME" not in os.environ
    if is_missing:
        os.environ["HOME"] = tempfile.gettempdir()
    try:
        yield
    finally:
        if is_missing:
            del os.environ["HOME"]


@cache
def _scorers() -> _Scorers:
    with _any_home(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rouge_chinese holds escapes that Python 3.12 warns of
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge, rouge_score

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
        bleu=lambda one, other: float(sentence_bleu([other], one, smoothing_function=method3)),
        sentences=sentences,
        rouge_n=lambda one, other, n: float(rouge_score.rouge_n(one, other, n)["f"]),
        rouge_l=rouge_l,
    )
