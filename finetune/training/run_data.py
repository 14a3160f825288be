"""The data section -> what a run trains and is evaluated on. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from finetune import console, launcher
from finetune.artifacts import hub
from finetune.config.schema import DataSection, ModelSection, TrainingSection
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.examples.batch_plan import BatchPlan
from finetune.data.examples.dataset import (
    Example,
    ExampleCounts,
    LengthPolicy,
    PreparedDataset,
    load_examples,
)
from finetune.data.examples.packing import PackedDataset, pack
from finetune.data.examples.selection import Selection
from finetune.data.reading.section import reading_of, training_sources, validation_sources
from finetune.data.reading.sources import Reading, SourceSpec
from finetune.errors import ConfigError, DataError

BINS = 24
"""Of the lengths of examples, as data.json has them."""


@dataclass(frozen=True)
class RunData:
    """Examples to learn from and to be measured on."""

    train: PreparedDataset
    items: PreparedDataset | PackedDataset[Example]
    """The training examples, or rows of several of them."""
    plan: BatchPlan
    validation: PreparedDataset | None
    validation_sources: tuple[SourceSpec, ...]
    reading: Reading
    """How the rows of both are read."""
    template: ChatTemplate
    """The model's own."""

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several examples."""
        return self.items is not self.train

    def steps(self, training: TrainingSection) -> int:
        """Optimizer steps of the whole run."""
        if training.max_steps is not None:
            return training.max_steps
        return math.ceil(training.epochs * self.plan.steps_per_epoch)

    def mean_attended_length(self) -> float:
        """The length of the example that a token is in, on average over tokens."""
        lengths = self.train.lengths.astype(float)
        return float((lengths**2).sum() / lengths.sum())

    def first_tokens(self, count: int) -> list[int]:
        """The first `count` tokens of the training data, from dialogues without images.

        Fewer than `count` tokens are repeated; without any there are none.
        """
        found: list[int] = []
        for number in range(len(self.train)):
            if len(found) >= count:
                break
            example = self.train[number]
            found += [] if example.image else example.input_ids.tolist()
        return list(islice(cycle(found), count))

    def described(self) -> dict[str, Any]:
        """Counts, fingerprint and lengths of both kinds, for data.json in the run directory."""
        kinds = {"train": self.train, "validation": self.validation}
        described = {name: _described(kind) for name, kind in kinds.items() if kind is not None}
        return described | ({"fetched": dict(hub.fetched)} if hub.fetched else {})


def load_run_data(section: DataSection, training: TrainingSection, model: ModelSection) -> RunData:
    """Prepare, or find prepared, what `section` names, for `model`; says what became of the rows."""
    template = ChatTemplate(load_chat_tokenizer(model.path, model.revision))
    held_out = validation_sources(section)
    # What is held out comes first, as it is kept out of the training data.
    own = Selection(deduplicate=section.deduplicate)
    validation = _examples(section, held_out, template, training.seed, own) if held_out else None
    selection = Selection(section.stop, section.temperature, section.deduplicate, validation)
    train = _examples(section, training_sources(section), template, training.seed, selection)
    _report("training", train.counts, len(train))
    if section.packing and template.image is not None and not template.image.can_pack:
        raise ConfigError(
            "data.packing: this checkpoint's positions of images do not tell documents apart; leave it out"
        )
    items = _items(train, section, training.seed)
    plan = BatchPlan(
        items.lengths,
        training.batch_size,
        training.gradient_accumulation_steps,
        launcher.world_size(),
        training.seed,
        group_by_length=section.group_by_length and not section.packing,
    )
    console.say(f"padding: {100 * plan.padding():.1f} % of the tokens of an epoch")
    if validation is not None:
        _report("validation", validation.counts, len(validation))
        _check_overlap(train, validation, section.max_overlap)
    return RunData(train, items, plan, validation, held_out, reading_of(section), template)


def _check_overlap(
    train: PreparedDataset, validation: PreparedDataset, allowed: float | None
) -> None:
    """Says how many held-out dialogues are trained on; DataError above the share that is allowed."""
    shared = validation.shared_with(train)
    if not shared:
        return
    share = len(shared) / len(validation)
    said = (
        f"{len(shared)} of {len(validation)} held-out dialogues ({share:.0%}) are in the training "
        f"data too, first {shared[0]}: scores on them say nothing about new dialogues"
    )
    if allowed is not None and share > allowed:
        raise DataError(f"{said}. data.max_overlap allows {allowed:.0%}; take them out of one side")
    console.warn(said)


def _described(examples: PreparedDataset) -> dict[str, Any]:
    numbers, edges = np.histogram(examples.lengths, bins=BINS, range=(0, examples.counts.longest))
    return {
        "examples": len(examples),
        **asdict(examples.counts),
        "fingerprint": examples.fingerprint,
        "lengths": {"edges": [float(edge) for edge in edges], "numbers": numbers.tolist()},
    }


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


def _report(kind: str, counts: ExampleCounts, num_examples: int) -> None:
    """What became of the rows; every kind of loss is said with its number."""
    said = [
        f"{num_examples:,} examples from {counts.rows:,} rows",
        f"{counts.tokens:,} tokens, {counts.supervised_tokens:,} of them supervised",
        f"longest {counts.longest:,}",
    ]
    if counts.text_blocks:
        said.append(f"{counts.text_blocks:,} of them blocks of plain text")
    if counts.bad:
        said.append(f"{counts.bad:,} bad rows left out")
    if counts.duplicates:
        said.append(f"{counts.duplicates:,} left out because another says the same")
    if counts.truncated:
        said.append(f"{counts.truncated:,} lost their oldest turns")
    said += [f"{number:,} dropped: {reason}" for reason, number in counts.dropped.items()]
    console.say(f"{kind} data: " + "; ".join(said))
    for line in counts.named:
        console.say(f"  {line}")
    for note in counts.notes():
        console.warn(f"{kind} data: {note}")
