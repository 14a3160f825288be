"""Files of the base that lie in a checkpoint beside what was trained."""

from __future__ import annotations

from pathlib import Path

from finetune import console
from finetune.artifacts.base_record import BaseRecord
from finetune.artifacts.names import GENERATION_CONFIG
from finetune.artifacts.resolve import TOKENIZER_FILES, local_folder
from finetune.errors import FinetuneError
from finetune.storage.hashed import hashed_copy

WITH_ADAPTER = ("tokenizer*", "chat_template*", "vocab*", "merges*")
"""What AutoTokenizer opens, as transformers' and TRL's trainers put it beside an adapter."""
WITH_MODEL = (*WITH_ADAPTER, GENERATION_CONFIG, "*processor*.json", "*.py")
"""What a folder needs besides weights and config to open on its own."""


def carry_model_files(base: BaseRecord, folder: Path) -> None:
    """Copy what belongs beside a whole model."""
    _copy(local_folder(base.path, base.revision), WITH_MODEL, folder)


def carry_tokenizer(base: BaseRecord, folder: Path) -> None:
    """Copy the tokenizer beside an adapter, which is whole without it: a base that has gone is said."""
    try:
        source = local_folder(base.path, base.revision, files=TOKENIZER_FILES)
    except FinetuneError as error:
        console.warn_once(f"no tokenizer lies beside the adapter: {error}")
        return
    _copy(source, WITH_ADAPTER, folder)


def _copy(source: Path, patterns: tuple[str, ...], folder: Path) -> None:
    for pattern in patterns:
        for carried in source.glob(pattern):
            hashed_copy(carried, folder / carried.name)
