"""The data section -> what a run trains and is evaluated on. No torch here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune import console, launcher
from finetune.artifacts import hub
from finetune.config.schema import DataSection, TrainingSection
from finetune.data.chat.template import ChatTemplate
from finetune.data.examples.batch_plan import BatchPlan, Lengths
from finetune.data.examples.dataset import (
    Example,
    ExampleCounts,
    PreparedDataset,
)
from finetune.data.examples.packing import PackedDataset
from finetune.data.examples.stream import ExampleStream, StreamSample
from finetune.data.reading.sources import Reading, SourceSpec
from finetune.errors import DataError

if TYPE_CHECKING:
    from finetune.training.loading.streams import StreamFeed

BINS = 24
"""Of the lengths of examples, as data.json has them."""


@dataclass(frozen=True)
class RunData:
    """Examples to learn from and to be measured on."""

    train: PreparedDataset | StreamSample
    """The training examples; of a stream the first ones."""
    items: PreparedDataset | PackedDataset[Example] | StreamSample
    """The training examples, or rows of several of them."""
    plan: BatchPlan
    validation: PreparedDataset | None
    validation_sources: tuple[SourceSpec, ...]
    reading: Reading
    """How the rows of both are read."""
    template: ChatTemplate
    """The model's own."""
    max_length: int
    """The longest that an example may be."""
    stream: ExampleStream | None = None
    """Where training examples come from if they are not prepared."""
    kept: PreparedDataset | None = None
    """General examples, whose loss tells what is forgotten."""
    kept_sources: tuple[SourceSpec, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest item, or as many as it may have."""
        return self.max_length if self.stream else int(self.items.lengths.max())

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several examples."""
        return self.items is not self.train or bool(self.stream and self.stream.settings.packed)

    def size(self) -> str:
        """How much there is to learn from, in words."""
        if self.stream is None:
            return f"{len(self.train):,}"
        shards = self.stream.shards
        return f"a stream of {len(shards):,} files, {sum(s.size for s in shards) / 1e9:,.3g} GB"

    def an_epoch(self) -> str:
        """How many steps an epoch has, to stand behind a number of steps; empty for a stream."""
        return "" if self.stream else f" ({self.plan.steps_per_epoch:,} an epoch)"

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
            found += [] if example.images else example.input_ids.tolist()
        return list(islice(cycle(found), count))

    def described(self, feed: StreamFeed | None = None) -> dict[str, Any]:
        """Counts, fingerprint and lengths of both kinds, for data.json in the run directory.

        Of a stream, what `feed` has read of it.
        """
        kinds = {"train": self.train, "validation": self.validation}
        described = {
            name: _described(kind)
            for name, kind in kinds.items()
            if isinstance(kind, PreparedDataset)
        }
        if self.stream is not None:
            counts = feed.read if feed else ExampleCounts()
            described["train"] = {
                "examples": counts.kept,
                **asdict(counts),
                "passes": feed.position.number_of_pass if feed else 0,
                "fingerprint": self.stream.fingerprint,
                "shards": [shard.name for shard in self.stream.shards],
            }
        return described | ({"fetched": dict(hub.fetched)} if hub.fetched else {})


def _described(examples: PreparedDataset) -> dict[str, Any]:
    numbers, edges = np.histogram(examples.lengths, bins=BINS, range=(0, examples.counts.longest))
    return {
        "examples": len(examples),
        **asdict(examples.counts),
        "fingerprint": examples.fingerprint,
        "lengths": {"edges": [float(edge) for edge in edges], "numbers": numbers.tolist()},
    }


def plan_of(lengths: Lengths, section: DataSection, training: TrainingSection) -> BatchPlan:
    """How the steps of a run take items of these lengths."""
    return BatchPlan(
        np.asarray(lengths),
        training.batch_size,
        training.gradient_accumulation_steps,
        launcher.world_size() // training.sequence_parallel,
        training.seed,
        group_by_length=section.group_by_length and not section.packing,
    )


def check_overlap(
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


def report(kind: str, counts: ExampleCounts, num_examples: int) -> None:
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
