"""The micro-batches of a stream: which step they are of, who gets them, which worker makes them."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from finetune.data.examples.batch_plan import deal
from finetune.data.examples.preparation import ExampleCounts
from finetune.data.examples.stream import START, Position
from finetune.errors import DataError
from finetune.training.loading import streams
from finetune.training.loading.streams import StreamBatches, StreamFeed, stream_loader


def item(number: int) -> Any:
    """A document of so many tokens that none is as long as the one before."""
    tokens = 2 + (7 * number) % 11
    one = SimpleNamespace(
        index=number, input_ids=np.arange(tokens), location=f"a.jsonl:{number}", images=()
    )
    return SimpleNamespace(tokens=tokens, examples=[one], value=one)


class Numbers:
    """A stream of items by number; as the real one, it knows steps only where it is told of them."""

    fingerprint = "of numbers"

    def __init__(self, ends: int = 10**9) -> None:
        self.position, self.read, self.ends = START, ExampleCounts(), ends

    def items(self, start: Position) -> Any:
        self.position = start
        for number in range(start.row, self.ends):
            self.position = Position(row=number + 1, steps=self.position.steps)
            self.read = ExampleCounts(rows=number + 1)
            yield item(number)
        raise DataError("row 7")


def batches_of(
    rank: int = 0, world: int = 1, *, accumulation: int = 2, start: Position = START, ends: int = 10**9
) -> StreamBatches:  # fmt: skip
    plan = SimpleNamespace(batch_size=2, world_size=world, global_batch=2 * world * accumulation)
    data: Any = SimpleNamespace(collate=lambda values: [one.index for one in values], plan=plan)
    return StreamBatches(data, Numbers(ends), start, rank)  # type: ignore[arg-type]


def some(batches: StreamBatches, number: int) -> list[Any]:
    return list(islice(batches, number))


def test_the_position_behind_each_step_counts_the_steps_and_comes_with_the_steps_last_batch() -> (
    None
):
    found = [passed.position for _, passed in some(batches_of(), 6)]
    assert found[::2] == [None, None, None]
    assert [(one.steps, one.row) for one in found[1::2]] == [(1, 4), (2, 8), (3, 12)]
    resumed = some(batches_of(start=found[1]), 2)
    assert resumed[1][1].position == found[3]
    assert resumed[0][1].read.rows == 8  # all of the step had been read when it was dealt out


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_out_each_step_as_the_plan_of_prepared_examples_does(world: int) -> None:
    found = [some(batches_of(rank, world), 6) for rank in range(world)]
    for step in range(3):
        numbers = range(4 * world * step, 4 * world * (step + 1))
        order = np.array(sorted(numbers, key=lambda n: -item(n).tokens))
        for turn, parts in enumerate(deal(order, step, 2, world)):
            given = [found[rank][2 * step + turn][0] for rank in range(world)]
            assert given == [part.tolist() for part in parts]


def test_documents_of_a_batch_are_told_with_their_tokens_and_places() -> None:
    (numbers, passed), *_ = some(batches_of(), 1)
    assert passed.documents == {n: (item(n).tokens, f"a.jsonl:{n}") for n in numbers}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_divide_the_batches_and_together_make_those_of_one(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [numbers for numbers, _ in some(batches_of(1, 2), 6)]
    for mine in range(workers):
        worker = SimpleNamespace(id=mine, num_workers=workers)
        monkeypatch.setattr(streams, "get_worker_info", lambda worker=worker: worker)
        shared = [numbers for numbers, _ in some(batches_of(1, 2), 6 // workers)]
        assert shared == whole[mine::workers]


def test_an_error_takes_the_place_of_every_batch_that_is_left() -> None:
    first, *errors = some(batches_of(ends=5, accumulation=1), 5)
    assert first[0] == [1, 0]
    assert [type(one) for one in errors[1:]] == [DataError] * 3
    assert str(errors[-1]) == "row 7"


def test_a_process_without_an_item_gets_a_blank_of_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "blanked", lambda value: SimpleNamespace(index=-value.index))
    one = batches_of()
    batch, passed = one._batch([], [item(3), item(5)], Position(steps=2))
    assert (batch, passed.documents, passed.position) == ([-5], {}, Position(steps=2))  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(("workers", "timeout"), [(0, 0), (2, 30)])
def test_the_loader_of_a_stream_begins_where_its_feed_is(
    workers: int, timeout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "pins_memory", lambda: False)
    begin = Position(row=8, steps=2)
    stream: Any = Numbers()
    run: Any = SimpleNamespace(described=lambda feed: feed)
    feed = StreamFeed(run, stream, begin)
    plan = SimpleNamespace(batch_size=2, world_size=2, global_batch=8)
    data: Any = SimpleNamespace(collate=len, plan=plan)
    loader = stream_loader(data, feed, rank=1, workers=workers, seconds=30)
    assert (loader.num_workers, loader.timeout) == (workers, timeout)
    assert loader.persistent_workers is (workers > 0)
    assert loader.worker_init_fn is streams.ignore_signals
    assert (loader.dataset.start, loader.dataset.rank) == (begin, 1)  # type: ignore[attr-defined]
    loader.set_epoch(3)  # a stream has none
    if not workers:
        assert list(islice(loader, 2)) == [2, 2]
        assert (feed.position.steps, feed.position.row) == (3, 16)
