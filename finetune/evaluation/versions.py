"""Versions of the packages that numbers depend on."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

GENERATING = ("torch", "transformers", "peft", "tokenizers")
"""What decides a model's replies."""
SCORING = ("jieba", "nltk", "rouge-chinese", "sacrebleu", "numpy")
"""What decides the scores of given replies."""


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of installed packages, by name."""
    return {name: version(name) for name in packages}
