"""Examples to batches of tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune.data.examples.collate import Collator
from finetune.data.examples.dataset import IGNORED, Example

PAD = 99


def example(ids: list[int], trained: range, index: int = 0, weight: float = 1.0) -> Example:
    labels = np.full(len(ids), IGNORED, np.int64)
    weights = np.zeros(len(ids), np.float32)
    for place in trained:
        labels[place], weights[place] = ids[place], weight
    array = np.array(ids, np.int32)
    return Example(array, labels, None if weight == 1.0 else weights, index, f"f:{index}")


A = example([1, 2, 3, 4, 5], range(3, 5), index=7)
B = example([6, 7, 8], range(1, 3), index=2)
HALF = example([6, 7, 8], range(1, 3), index=2, weight=0.5)


def test_examples_are_padded_on_the_right_and_need_no_mask():
    batch = Collator(PAD)([A, B])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4, 5], [-100, 7, 8, -100, -100]]
    assert batch["sample_ids"].tolist() == [7, 2]
    assert set(batch) == {"input_ids", "labels", "sample_ids"}


def test_all_but_weights_are_whole_numbers_of_64_bits():
    batch = Collator(PAD)([A, HALF])
    assert batch.pop("loss_weights").dtype == torch.float32
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_weights_are_there_only_if_some_token_weighs_other_than_one():
    assert "loss_weights" not in Collator(PAD)([A, B])
    weights = Collator(PAD)([A, HALF])["loss_weights"]
    assert weights.tolist() == [[0, 0, 0, 1, 1], [0, 0.5, 0.5, 0, 0]]


def test_a_width_can_be_rounded_up():
    batch = Collator(PAD, pad_to_multiple_of=8)([A, B])
    assert batch["input_ids"].shape == (2, 8)
    assert (batch["labels"][:, 5:] == IGNORED).all()
    assert Collator(PAD, pad_to_multiple_of=5)([A])["input_ids"].shape == (1, 5)


def test_packed_rows_have_positions_that_restart_and_no_mask():
    batch = Collator(PAD)([[A, B], [B]])
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [6, 7, 8, PAD, PAD, PAD, PAD, PAD],
    ]
    # The padding of the second row is a document of its own.
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch["labels"].tolist()[1] == [-100, 7, 8, -100, -100, -100, -100, -100]
    assert batch["sample_ids"].tolist() == [7, 2, 2]
    assert "attention_mask" not in batch


def test_a_packed_row_that_is_rounded_up_ends_in_a_document_of_padding():
    batch = Collator(PAD, pad_to_multiple_of=8)([[A]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]


def test_weights_of_packed_rows_lie_at_their_documents():
    batch = Collator(PAD)([[A, HALF]])
    assert batch["loss_weights"].tolist() == [[0, 0, 0, 1, 1, 0, 0.5, 0.5]]


@pytest.mark.parametrize("items", [[A, B], [[A], [B]], [[A, B]]])
def test_flattening_makes_one_row_without_padding(items):
    batch = Collator(PAD, flatten=True)(items)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4, 5, -100, 7, 8]]
    assert "attention_mask" not in batch


def test_tensors_do_not_share_memory_with_the_examples():
    frozen = np.array([1, 2], np.int32)
    frozen.flags.writeable = False
    one = Example(frozen, np.array([-100, 2]), None, 0, "f:1")
    batch = Collator(PAD)([one])
    batch["input_ids"][0, 0] = 5
    assert frozen.tolist() == [1, 2]
