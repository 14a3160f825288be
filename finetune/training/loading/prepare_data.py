"""The data section -> the examples of a run, prepared or found prepared. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finetune import console
from finetune.artifacts.resolve import check_no_adapter
from finetune.config.forgetting import KeepSection
from finetune.config.schema import DataSection, ModelSection, TrainingSection
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.examples.dataset import (
    Example,
    LengthPolicy,
    PreparedDataset,
    load_examples,
)
from finetune.data.examples.packing import PackedDataset, pack
from finetune.data.examples.selection import Selection
from finetune.data.examples.stream import ExampleStream, StreamSample, StreamSettings
from finetune.data.reading.section import (
    reading_of,
    sources_of,
    training_sources,
    validation_sources,
)
from finetune.data.reading.shards import shards_of
from finetune.data.reading.sources import SourceSpec
from finetune.generation.replay import replay_of
from finetune.training.run_data import RunData as RunData
from finetune.training.run_data import check_overlap, plan_of, report


def load_run_data(
    section: DataSection,
    training: TrainingSection,
    model: ModelSection,
    keep: KeepSection | None = None,
) -> RunData:
    """Prepare, or find prepared, what `section` names, for `model`; says what became of the rows.

    Replies that `data.replay` asks for are generated first, unless they are kept already.
    """
    check_no_adapter(model.path)
    template = ChatTemplate(load_chat_tokenizer(model.path, model.revision))
    held_out = validation_sources(section)
    # What is held out comes first, as it is kept out of the training data.
    own = Selection(deduplicate=section.deduplicate)
    validation = _examples(section, held_out, template, training.seed, own) if held_out else None
    replay, general = _replay(section, model, keep)
    kept = _examples(section, general, template, training.seed, own) if general else None
    if section.streaming:
        data = _streamed(section, training, template, validation, held_out)
        return replace(data, kept=kept, kept_sources=general)
    selection = Selection(section.stop, section.temperature, section.deduplicate, validation)
    sources = (*training_sources(section), *replay)
    train = _examples(section, sources, template, training.seed, selection)
    report("training", train.counts, len(train))
    items = _items(train, section, training.seed)
    plan = plan_of(items.lengths, section, training)
    console.say(f"padding: {100 * plan.padding():.1f} % of the tokens of an epoch")
    if validation is not None:
        report("validation", validation.counts, len(validation))
        check_overlap(train, validation, section.max_overlap)
    return RunData(
        train, items, plan, validation, held_out, reading_of(section), template, section.max_length,
        kept=kept, kept_sources=general,
    )  # fmt: skip


def _replay(
    section: DataSection, model: ModelSection, keep: KeepSection | None
) -> tuple[tuple[SourceSpec, ...], tuple[SourceSpec, ...]]:
    """The untuned model's replies that are trained, and the dialogues that must not be forgotten."""
    general = sources_of(section, keep.data) if keep and keep.data else ()
    if section.replay is None:
        return (), general
    files = replay_of(section.replay, model.path, model.revision, section.cache_dir)
    console.say(
        f"data.replay: {files.replies} replies of the untuned model, {files.cut} left out that did not end"
    )
    if keep is not None and not general:
        general = (SourceSpec(str(files.held_out), format="messages"),)
    return (SourceSpec(str(files.train), section.replay.weight, "messages"),), general


def _streamed(
    section: DataSection,
    training: TrainingSection,
    template: ChatTemplate,
    validation: PreparedDataset | None,
    held_out: tuple[SourceSpec, ...],
) -> RunData:
    """A stream of training examples, of which the first are read now."""
    sources, reading = training_sources(section), reading_of(section)
    policy = LengthPolicy(section.max_length, section.train_on, section.on_too_long)
    stream = ExampleStream(
        shards_of(sources),
        sources,
        template,
        StreamSettings(policy, reading, training.seed, section.shuffle_buffer, section.packing),
        held_out=None if validation is None else validation.stored.digests(),
        cache_root=Path(section.cache_dir) if section.cache_dir else None,
    )
    sample = StreamSample(stream)
    plan = plan_of(sample.lengths, section, training)
    data = RunData(
        sample, sample, plan, validation, held_out, reading, template, section.max_length, stream
    )
    console.say(
        f"training data: {data.size()}; of its first {len(sample):,} examples the longest has "
        f"{int(sample.lengths.max()):,} tokens, {sample.lengths.mean():,.0f} on average"
    )
    if validation is not None:
        report("validation", validation.counts, len(validation))
    return data


def _examples(
    section: DataSection,
    sources: Sequence[SourceSpec],
    template: ChatTemplate,
    seed: int,
    selection: Selection,
) -> PreparedDataset:
    return load_examples(
        sources,
        template,
        LengthPolicy(section.max_length, section.train_on, section.on_too_long),
        reading=reading_of(section),
        seed=seed,
        selection=selection,
        cache_root=Path(section.cache_dir) if section.cache_dir else None,
    )


def _items(
    examples: PreparedDataset, section: DataSection, seed: int
) -> PreparedDataset | PackedDataset[Example]:
    if not section.packing:
        return examples
    return PackedDataset(examples, pack(examples.lengths, section.max_length, seed))
