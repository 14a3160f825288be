"""Texts -> the words that scores count."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import cache

_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_WORD = re.compile(r"\w+|[^\w\s]")


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
