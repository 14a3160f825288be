"""Rows of documents, and the order in which examples are seen."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.data.examples.batch_plan import grouped_order, permutation, shuffled_order
from finetune.data.examples.packing import PackedDataset, pack


def advertisegen_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Lengths as AdvertiseGen has them with the GLM-4 tokenizer: about 130 tokens, 60 to 350."""
    drawn = np.random.default_rng(seed).gamma(12.0, 11.0, size=count)
    return np.clip(drawn, 60, 350).astype(np.int32)


class Documents:
    """A stand-in dataset: item i is the number i."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> int:
        return index


# Packing


def test_every_document_is_in_exactly_one_row():
    lengths = advertisegen_lengths(25_000)
    rows = pack(lengths, 1024, seed=3)
    assert sorted(index for row in rows for index in row) == list(range(25_000))


def test_no_row_is_longer_than_its_capacity():
    lengths = advertisegen_lengths(25_000)
    assert max(lengths[row].sum() for row in pack(lengths, 1024, seed=3)) <= 1024


def test_documents_of_exactly_the_capacity_get_rows_of_their_own():
    assert sorted(map(sorted, pack([8, 3, 8, 5], 8, seed=0))) == [[0], [1, 3], [2]]


def test_rows_are_full_on_lengths_like_advertisegen():
    lengths = advertisegen_lengths(3_000)
    for capacity in (512, 1024, 2048):
        rows = pack(lengths, capacity, seed=0)
        assert lengths.sum() / (len(rows) * capacity) >= 0.95


def test_a_document_goes_into_the_fullest_row_that_has_room():
    # 6 and 5 open two rows with 4 and 5 free; 4 fits both and completes the first; 3 goes to the second.
    assert sorted(map(sorted, pack([6, 5, 4, 3], 10, seed=0))) == [[0, 2], [1, 3]]


def test_packing_is_a_function_of_lengths_capacity_and_seed():
    lengths = advertisegen_lengths(2_000)
    assert pack(lengths, 1024, seed=1) == pack(list(lengths), 1024, seed=1)
    assert pack(lengths, 1024, seed=1) != pack(lengths, 1024, seed=2)


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="9 tokens does not fit into rows of 8"):
        pack([3, 9], 8, seed=0)


def test_nothing_packs_into_no_rows():
    assert pack([], 8, seed=0) == []
    assert len(PackedDataset(Documents(np.empty(0, np.int32)), [])) == 0


def test_a_packed_row_is_the_list_of_its_examples():
    packed = PackedDataset(Documents(np.array([5, 3, 2], np.int32)), [[1, 2], [0]])
    assert len(packed) == 2
    assert packed[0] == [1, 2]
    assert packed[1] == [0]
    assert packed.lengths.tolist() == [5, 5]
    assert packed.lengths.dtype == np.int32


def test_reading_past_the_last_row_ends_an_iteration():
    packed = PackedDataset(Documents(np.array([5, 3, 2], np.int32)), [[1, 2], [0]])
    assert list(packed) == [[1, 2], [0]]


# Order


def test_the_permutation_is_the_same_on_every_machine():
    # From PCG64's raw stream, whose values NumPy promises to keep (NEP 19).
    raw = np.random.PCG64(np.random.SeedSequence((42, 0))).random_raw(6).tolist()
    assert permutation(6, 42, 0).tolist() == sorted(range(6), key=raw.__getitem__)


@pytest.mark.parametrize("order", [grouped_order, shuffled_order])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 100, 1001])
def test_an_order_has_every_example_once(order, count):
    lengths = advertisegen_lengths(count)
    assert sorted(order(lengths, 8, 5, 0).tolist()) == list(range(count))


@pytest.mark.parametrize("order", [grouped_order, shuffled_order])
def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(order):
    lengths = advertisegen_lengths(500)
    first = order(lengths, 8, 5, 0).tolist()
    np.random.seed(99)
    assert order(lengths, 8, 5, 0).tolist() == first
    assert order(lengths, 8, 5, 1).tolist() != first
    assert order(lengths, 8, 6, 0).tolist() != first


@pytest.mark.parametrize("order", [grouped_order, shuffled_order])
def test_the_longest_example_is_in_the_first_global_batch_of_every_epoch(order):
    for count in (1001, 15):  # of 15, the longest would often be in the incomplete last batch
        lengths = advertisegen_lengths(count)
        lengths[7] = 900
        for epoch in range(20):
            assert 7 in order(lengths, 8, 5, epoch)[:8]


def test_grouped_batches_have_similar_lengths_but_come_in_mixed_order():
    lengths = advertisegen_lengths(4_000)
    batches = lengths[grouped_order(lengths, 8, 5, 0)].reshape(-1, 8)
    spread = (batches.max(axis=1) - batches.min(axis=1))[1:].mean()
    assert spread < 10  # random batches of these lengths differ by more than 100
    steps = np.diff(batches.mean(axis=1))
    assert 0.4 < (steps > 0).mean() < 0.6


def test_small_sets_have_other_batches_in_every_epoch():
    lengths = advertisegen_lengths(64)
    batches = {
        frozenset(batch.tolist())
        for epoch in range(4)
        for batch in grouped_order(lengths, 8, 5, epoch).reshape(-1, 8)
    }
    assert len(batches) > 16
