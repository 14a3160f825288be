"""Metrics of a whole corpus: counts per pair whose sums give the score, through sacrebleu.

Pairs are counted one by one and the counts are summed, so that a bootstrap resamples counts and
never counts again. `bleu_of` and `chrf_of` take sums of many resamples at once and are held to
sacrebleu's own by a test.

R resamples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
_WORD = re.compile(r"\w+|[^\w\s]")


def is_chinese(text: str) -> bool:
    """Whether a text is cut into words by jieba: it holds a Chinese character."""
    return _CHINESE.search(text) is not None


def plain_words(text: str) -> list[str]:
    """Words of a text in a language with spaces: runs of letters and digits, and each other sign."""
    return _WORD.findall(text)


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
        score = 100.0 * penalty * np.exp(np.log(precision).mean(axis=1))
    possible = matching.any(axis=1) & (total > 0).all(axis=1)
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


def signatures() -> dict[str, str]:
    """Sacrebleu's own signatures, with the words that were given to it."""
    for metric in (_bleu(), _chrf()):
        _counted(metric, "", "")  # it learns the number of references by counting
    return {
        "corpus_bleu": f"{_bleu().get_signature()} (tok: jieba where a text holds Chinese "
        "characters, else letters and digits apart from signs)",
        "chrf": str(_chrf().get_signature()),
    }


def _counted(metric: Any, reply: str, reference: str) -> list[int]:
    [counts] = metric._extract_corpus_statistics([reply], [[reference]])
    return [int(count) for count in counts]


@cache
def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="none", force=True)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()
