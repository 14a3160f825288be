"""Which examples each process gets when: law 7 on the loader that a run uses, and its padding."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from test_packing import advertisegen_lengths

from finetune.data.examples.batch_plan import BLANK, BatchPlan
from finetune.data.examples.collate import Collator
from finetune.data.examples.dataset import Example
from finetune.training.loading.batches import TrainingData, training_loader
from finetune.training.objective import StepCounts, SupervisedTokens, count

SPLITS = [(1, 8, 1), (8, 1, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 1, 8)]
"""Batch size, accumulation, processes: 8 examples a step."""


class Documents:
    """Example i has lengths[i] tokens, all of them learned."""

    def __init__(self, lengths: np.ndarray, *, packed: bool = False) -> None:
        self.lengths = lengths
        self.packed = packed

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        ids = np.full(self.lengths[index], 7, np.int32)
        example = Example(ids, ids.astype(np.int64), None, index, f"rows:{index}")
        return [example] if self.packed else example


def mixed_lengths(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(20, 900, count).astype(np.int32)


def plan_of(lengths: np.ndarray, split: tuple[int, int, int], *, grouped: bool = True) -> BatchPlan:
    return BatchPlan(lengths, *split, seed=1, group_by_length=grouped)


def training_data_of(items: Any, plan: BatchPlan, collate: Any) -> TrainingData:
    return TrainingData(items, items.lengths, str, plan, collate, SupervisedTokens())


def loaders(plan: BatchPlan, *, packed: bool = False) -> list[Any]:
    """The loader of every process."""
    items: Any = Documents(plan.lengths, packed=packed)
    data = training_data_of(items, plan, Collator(0))
    return [
        training_loader(data, rank=rank, workers=0, seconds=60) for rank in range(plan.world_size)
    ]


def steps(plan: BatchPlan, epoch: int = 0, *, skip: int = 0) -> list[list[int]]:
    """The examples of every optimizer step, sorted, as the Trainer takes them from the loaders."""
    from accelerate import skip_first_batches

    per_rank = []
    for loader in loaders(plan):
        loader.set_epoch(epoch)
        resumed = skip_first_batches(loader, skip * plan.accumulation) if skip else loader
        per_rank.append([batch["sample_ids"].tolist() for batch in resumed])
    assert len({len(batches) for batches in per_rank}) == 1
    return [
        sorted(
            sample
            for batches in per_rank
            for batch in batches[first : first + plan.accumulation]
            for sample in batch
            if sample != BLANK
        )
        for first in range(0, len(per_rank[0]), plan.accumulation)
    ]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("number", [1, 8, 11, 29, 64])
@pytest.mark.parametrize("grouped", [True, False])
def test_an_epoch_shows_every_example_once_and_every_process_runs_as_often(
    split: tuple[int, int, int], number: int, grouped: bool
) -> None:
    plan = plan_of(advertisegen_lengths(number), split, grouped=grouped)
    passes = list(plan.dealt(0))
    assert len(passes) == plan.passes_per_epoch
    assert all(len(parts) == plan.world_size for parts in passes)
    assert all(len(part) <= plan.batch_size for parts in passes for part in parts)
    assert sorted(i for parts in passes for part in parts for i in part) == list(range(number))


@pytest.mark.parametrize("number", [29, 64])
@pytest.mark.parametrize("grouped", [True, False])
def test_any_split_of_the_global_batch_gives_the_same_examples_per_optimizer_step(
    number: int, grouped: bool
) -> None:
    lengths = advertisegen_lengths(number)
    expected = [sorted(step.tolist()) for step in plan_of(lengths, SPLITS[0], grouped=grouped).steps(0)]  # fmt: skip
    for split in SPLITS:
        assert steps(plan_of(lengths, split, grouped=grouped)) == expected


@pytest.mark.parametrize("split", SPLITS)
def test_a_resume_needs_only_epoch_and_step(split: tuple[int, int, int]) -> None:
    plan = plan_of(advertisegen_lengths(29), split)
    assert steps(plan, epoch=3, skip=2) == steps(plan, epoch=3)[2:]
    assert steps(plan, epoch=3) != steps(plan, epoch=2)


def test_in_one_process_a_step_is_cut_from_the_longest_to_the_shortest() -> None:
    lengths = np.array([5, 9, 1, 7, 3, 8, 2], np.int32)
    plan = BatchPlan(lengths, 2, 2)
    for step in plan.steps(0):
        assert lengths[step].tolist() == sorted(lengths[step].tolist(), reverse=True)
    flat = [step.tolist() for step in plan.steps(0)]
    cut = [step[first : first + 2] for step in flat for first in range(0, len(step), 2)]
    assert list(plan.micro_batches(0, 0)) == cut


def test_the_pass_with_too_few_examples_is_shared_out_evenly() -> None:
    passes = list(BatchPlan(np.arange(1, 6), 4, 1, 2).dealt(0))
    assert [len(part) for part in passes[0]] == [3, 2]
    blanks = list(BatchPlan(np.arange(1, 3), 1, 1, 4).dealt(0))
    assert sorted(len(part) for part in blanks[0]) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("count", "split", "grouped"),
    [(29, (4, 1, 2), True), (1003, (4, 1, 8), True), (100, (4, 1, 8), True), (203, (2, 2, 4), False)],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_the_announced_padding_is_the_trained_padding(
    count: int, split: tuple[int, int, int], grouped: bool, packed: bool
) -> None:
    plan = plan_of(mixed_lengths(count), split, grouped=grouped)
    trained = counts_of(plan, packed=packed)
    assert plan.padding() == pytest.approx(trained.padding, abs=1e-3)  # blanks are two tokens each


def counts_of(plan: BatchPlan, *, packed: bool = False) -> StepCounts:
    total = StepCounts()
    for loader in loaders(plan, packed=packed):
        batches = list(loader)
        samples = [batch.pop("sample_ids").numpy() for batch in batches]
        total += count(batches, samples, plan.lengths, SupervisedTokens())
    assert total.tokens == plan.lengths.sum()  # blanks are padding
    return total


@pytest.mark.parametrize(("count", "split"), [(29, (4, 1, 2)), (1003, (4, 1, 8)), (100, (4, 1, 8)), (500, (1, 4, 8))])  # fmt: skip
def test_no_cut_of_the_same_global_batches_pads_less(
    count: int, split: tuple[int, int, int]
) -> None:
    plan = plan_of(mixed_lengths(count), split)
    width = cells = 0
    for step in plan.steps(0):  # neighbours in length share a micro-batch of full size
        falling = plan.lengths[step]
        for first in range(0, len(falling), plan.batch_size):
            part = falling[first : first + plan.batch_size]
            width, cells = width + int(part.sum()), cells + int(part.max()) * len(part)
    best = 1 - width / cells
    assert plan.padding() <= best + 1e-9


def test_processes_get_about_as_many_tokens_in_every_step() -> None:
    plan = plan_of(mixed_lengths(1024), (2, 4, 4))
    tokens = np.array([[plan.lengths[part].sum() for part in parts] for parts in plan.dealt(0)])
    per_step = tokens.reshape(-1, plan.accumulation, plan.world_size).sum(axis=1)
    assert (per_step.max(axis=1) / per_step.mean(axis=1)).mean() < 1.05
    whole = per_step.sum(axis=0)
    assert whole.max() / whole.mean() < 1.01


def test_the_longest_example_is_in_the_first_pass_of_an_epoch() -> None:
    lengths = advertisegen_lengths(100)
    for grouped in (True, False):
        plan = plan_of(lengths, (4, 1, 2), grouped=grouped)
        assert lengths[next(plan.dealt(0))[0]].max() == lengths.max()


def test_a_blank_teaches_nothing_and_is_two_tokens_long() -> None:
    plan = BatchPlan(mixed_lengths(2), 1, 1, 4)
    batches = [batch for loader in loaders(plan) for batch in loader]
    blanks = [batch for batch in batches if batch["sample_ids"].tolist() == [BLANK]]
    assert len(blanks) == 2
    assert all(batch["input_ids"].shape == (1, 2) for batch in blanks)
    assert all(torch.all(batch["labels"] == -100) for batch in blanks)


def test_an_empty_set_has_no_plan() -> None:
    with pytest.raises(ValueError, match="0 examples"):
        BatchPlan(np.array([], np.int32), 8)


def test_padding_is_the_share_of_filler_tokens() -> None:
    # One step [10, 10, 4, 2] in micro-batches [10, 10] and [4, 2]: 2 fillers in 28 tokens.
    plan = BatchPlan(np.array([10, 4, 10, 2]), 2, 2, group_by_length=True)
    assert plan.padding() == pytest.approx(2 / 28)


def test_a_plan_can_be_sent_to_worker_processes() -> None:
    plan = plan_of(advertisegen_lengths(20), (4, 1, 2))
    sent = pickle.loads(pickle.dumps(plan))
    assert list(sent.micro_batches(0, 1)) == list(plan.micro_batches(0, 1))
