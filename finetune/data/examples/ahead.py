"""Training data that is tokenised before a run, all of it or the files of one shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finetune.config.schema import DataSection, ModelSection
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.examples.dataset import load_examples
from finetune.data.examples.preparation import ExampleCounts, LengthPolicy, total
from finetune.data.examples.shards import of_shard
from finetune.data.reading.files import expand
from finetune.data.reading.section import reading_of, training_sources
from finetune.data.reading.sources import SourceSpec
from finetune.errors import ConfigError


def prepare_ahead(
    section: DataSection, model: ModelSection, seed: int, shard: str | None
) -> ExampleCounts:
    """The counts of the training examples of all files, or of each file of one shard, in the cache now.

    Raises:
        ConfigError: The data is streamed, or rows are chosen among those of all files.
    """
    sources = training_sources(section)
    if section.streaming:
        raise ConfigError(
            "data.streaming is true: a stream is tokenised while it is trained; leave this out"
        )
    if shard is not None and any(source.chosen for source in sources):
        raise ConfigError(
            "--shard takes files one by one, and data.validation as a share or max_rows choose among "
            "the rows of all: give files to both (`finetune data split` makes them)"
        )
    template = ChatTemplate(load_chat_tokenizer(model.path, model.revision))

    def counts(of: Sequence[SourceSpec]) -> ExampleCounts:
        policy = LengthPolicy(section.max_length, section.train_on, section.on_too_long)
        root = Path(section.cache_dir) if section.cache_dir else None
        reading = reading_of(section)
        return load_examples(
            of, template, policy, reading=reading, seed=seed, cache_root=root
        ).counts

    if shard is None:
        return counts(sources)
    files = [(source, path) for source in sources for path in expand(source.path)]
    mine = of_shard([path for _, path in files], shard)
    found = ExampleCounts()
    for source, path in files:
        if path in mine:
            found = total(found, counts([replace(source, path=str(path), weight=1.0)]))
    return found
