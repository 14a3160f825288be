"""A longer vocabulary that an adapter brings: its rows, what the config says of them, its tokenizer. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.artifacts.names import CHAT_TEMPLATE, SENTENCEPIECE, TOKENIZER, TOKENIZER_CONFIG
from finetune.artifacts.weights import TensorInfo
from finetune.errors import ConfigError, ModelError
from finetune.export.adapter import Adapter

EMBEDDING_AND_HEAD = (
    ("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"),
    ("model.embed_tokens.weight", "lm_head.weight"),
)
_SIZES = ("vocab_size", "padded_vocab_size")
_FILES = (
    *(TOKENIZER, TOKENIZER_CONFIG, SENTENCEPIECE, CHAT_TEMPLATE),
    *("special_tokens_map.json", "added_tokens.json"),
)


def added_rows(tuned: Adapter | None, present: Mapping[str, TensorInfo]) -> int:
    """How many tokens more the adapter's vocabulary has than the base's; 0 for most.

    Raises:
        ModelError: Only one of the two embeddings is longer.
    """
    if tuned is None:
        return 0
    more = {
        name: tensor.shape[0] - present[name].shape[0]
        for pair in EMBEDDING_AND_HEAD
        for name in pair
        if name in present and (tensor := tuned.replacements.get(name)) is not None
        and tensor.shape[1:] == present[name].shape[1:]
    }  # fmt: skip
    longer = {name: rows for name, rows in more.items() if rows > 0}
    if not longer:
        return 0
    rows = max(longer.values())
    other = [n for pair in EMBEDDING_AND_HEAD for n in pair if n in present and more.get(n) != rows]
    if other:
        raise ModelError(
            f"the adapter's vocabulary has {rows} tokens more than the base's in {next(iter(longer))} and not in "
            f"{other[0]}; train it with modules_to_save of both embeddings"
        )
    return rows


def check_can_open(rows: int, check: str) -> None:
    """ConfigError when `--check full` would have to open the adapter on a base that is shorter."""
    if rows and check == "full":
        raise ConfigError(
            f"--check full opens the adapter on its base, whose vocabulary has {rows} tokens less; "
            "choose --check tensors"
        )


def with_more_tokens(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The config of a model with so many tokens more."""
    return {
        key: value + rows if key in _SIZES and isinstance(value, int) else value
        for key, value in config.items()
    }


def tokenizer_of(adapter: Path, rows: int) -> tuple[dict[str, Path], list[str]]:
    """The tokenizer files that an adapter with more tokens brings, and what is to be said of them."""
    if not rows:
        return {}, []
    files = {name: adapter / name for name in _FILES if (adapter / name).is_file()}
    said = f"the vocabulary has {rows} tokens more than the base's"
    if TOKENIZER in files or SENTENCEPIECE in files:
        return files, [f"{said}; the tokenizer is the adapter's"]
    return {}, [
        f"{said}, and {adapter} brings no tokenizer: copy the one with these tokens into the merged folder"
    ]
