"""What is trained on, and the loader of one process's micro-batches, as `data.examples.batch_plan` deals them.

A process that is left without an example in a forward pass gets a blank: two tokens of which nothing
is learned, so that every process runs as often as the others and no example is seen twice.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Sampler

from finetune.config.schema import DataSection
from finetune.data.examples.batch_plan import BLANK, BatchPlan
from finetune.data.examples.collate import Collator
from finetune.data.examples.dataset import IGNORED, Example
from finetune.distributed.device import pins_memory
from finetune.distributed.signals import SIGNALS
from finetune.models.vision.feature_cache import vision_cache
from finetune.storage.cache import default_root
from finetune.training.objective import Objective, SupervisedTokens
from finetune.training.prepare_model import PreparedModel
from finetune.training.run_data import RunData

if TYPE_CHECKING:
    from finetune.training.loading.streams import StreamFeed

Item: TypeAlias = "Example | Sequence[Example]"
Collate: TypeAlias = Callable[[Sequence[Item]], dict[str, torch.Tensor]]


class Items(Protocol):
    """Examples, or packed rows of examples, by index."""

    lengths: npt.NDArray[np.int32]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


@dataclass(frozen=True)
class TrainingData:
    """What is trained on."""

    items: Items
    """Examples, or packed rows of examples."""
    lengths: Any
    """Tokens of every document, by the index that `sample_ids` hold; int32 [documents]."""
    location: Callable[[int], str]
    """The `file:line` of a document."""
    plan: BatchPlan
    collate: Collate
    objective: Objective
    feed: StreamFeed | None = None
    """Where the examples come from if they are streamed."""

    def places(self, samples: Iterable[Iterable[Any]]) -> str:
        """Where the documents of micro-batches stand, the first 20 line by line."""
        examples = [int(sample) for batch in samples for sample in batch if sample != BLANK]
        more = f"\n  and {len(examples) - 20} more" if len(examples) > 20 else ""
        return "\n  ".join(self.location(example) for example in examples[:20]) + more

    def loader(self, *, rank: int, workers: int, seconds: float) -> StepLoader:
        """The loader of process `rank`; see `training_loader`."""
        if self.feed is None:
            return training_loader(self, rank=rank, workers=workers, seconds=seconds)
        from finetune.training.loading.streams import stream_loader

        return stream_loader(self, self.feed, rank=rank, workers=workers, seconds=seconds)


def training_data(
    data: RunData, prepared: PreparedModel, section: DataSection, checkpoint: Path | None
) -> TrainingData:
    """The examples of a run, and how they become batches; a stream goes on where `checkpoint` says."""
    template, features = data.template, None
    images = data.train.images() if section.cache_image_features else []
    if images and template.image is not None:
        features = vision_cache(
            prepared.model,
            images,
            template.image,
            root=Path(section.cache_dir) if section.cache_dir else default_root(),
            base=prepared.base.fingerprint,
            dtype=prepared.dtype,
            autocast=prepared.casts,
        )
    split = prepared.split
    collate = Collator(
        template.pad_id,
        image=template.image,
        features=features,
        pad_to_multiple_of=split.parts if split else None,
    )
    train, objective = data.train, SupervisedTokens()
    found = TrainingData(data.items, train.lengths, train.location, data.plan, collate, objective)
    if data.stream is None:
        return found
    from finetune.training.loading.streams import from_checkpoint

    return from_checkpoint(found, data, checkpoint)


class RankBatches(Sampler[list[int]]):
    """The micro-batches of one process: lists of indices, never empty."""

    def __init__(self, plan: BatchPlan, rank: int) -> None:
        self.plan = plan
        self.rank = rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration; the Trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Forward passes per epoch, the same in every process."""
        return self.plan.passes_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        for micro_batch in self.plan.micro_batches(self.epoch, self.rank):
            yield micro_batch or [BLANK]


class StepLoader(DataLoader[Item]):
    """A data loader that hands the epoch on to its sampler, as the Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]

    def __iter__(self) -> Any:
        """The batches of an epoch.

        Workers begin with the signals blocked: torch's own handler would end one that gets a signal
        before it ignores them.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """End the workers: they ignore the signal with which Python would at its own end, and wait."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._iterator = None


class WithBlanks(torch.utils.data.Dataset[Item]):
    """The items, and the blank one under the index BLANK."""

    def __init__(self, items: Items) -> None:
        self.items = items
        self._shortest = int(np.argmin(items.lengths))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return blanked(self.items[self._shortest]) if index == BLANK else self.items[index]


def blanked(item: Item) -> Item:
    """The beginning of `item` with every label ignored; all of it where it shows images."""
    example = item if isinstance(item, Example) else item[0]
    size = len(example.input_ids) if example.images else 2
    blank = replace(
        example,
        input_ids=example.input_ids[:size],
        labels=np.full(size, IGNORED, dtype=np.int64),
        loss_weights=None,
        index=BLANK,
    )
    return blank if isinstance(item, Example) else [blank]


def training_loader(data: TrainingData, *, rank: int, workers: int, seconds: float) -> StepLoader:
    """The loader of process `rank`.

    It has a generator of its own: loading must not draw from the stream that dropout draws from. A
    worker that gives nothing for `seconds` ends the run.
    """
    return StepLoader(
        WithBlanks(data.items),
        batch_sampler=RankBatches(data.plan, rank),
        collate_fn=data.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        timeout=seconds if workers > 0 else 0,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),
        pin_memory=pins_memory(),
    )


def ignore_signals(worker: int) -> None:
    """A signal to the whole group is the trainer's affair, which needs the workers for its step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
