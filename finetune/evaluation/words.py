"""Texts -> the words that scores count."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache

_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_HAN = re.compile(rf"{_CHINESE.pattern}+")
_KANA = re.compile(r"[\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f]")
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


def without_signs(words: Sequence[str]) -> Sequence[str]:
    """The words that hold a letter or a digit; all of them when none does.

    A full stop that two texts share makes them no more alike.
    """
    return [word for word in words if any(map(str.isalnum, word))] or words


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
