"""What a run trains on, and what it says of it: steps, lengths, first tokens, rows, blanks, places."""

from __future__ import annotations

import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finetune.config.schema import DataSection, TrainingSection
from finetune.data.examples.batch_plan import BLANK
from finetune.data.examples.dataset import IGNORED, Example
from finetune.data.examples.preparation import ExampleCounts
from finetune.errors import DataError
from finetune.training import run_data
from finetune.training.loading import batches
from finetune.training.loading.batches import RankBatches, TrainingData, WithBlanks, blanked
from finetune.training.objective import StepCounts, SupervisedTokens, count
from finetune.training.run_data import RunData, check_overlap, plan_of, report


def example(ids: list[int], *, images: tuple[str, ...] = (), index: int = 0) -> Example:
    return Example(
        np.array(ids, np.int32), np.array(ids, np.int64), np.ones(len(ids), np.float32), index,
        f"train.jsonl:{index + 1}", images,
    )  # fmt: skip


class Examples(list[Example]):
    """As many examples as are given."""

    @property
    def lengths(self) -> Any:
        return np.array([len(one.input_ids) for one in self], np.int32)


def data(*examples: Example, **others: Any) -> RunData:
    found: Any = Examples(examples)
    given = {"train": found, "items": found, "plan": None, "validation": None, "reading": None}
    return RunData(
        **given | {"validation_sources": (), "template": None, "max_length": 99} | others
    )


# --- a run's data --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 3, 7]), (6, [1, 2, 3, 7, 8, 1])],
)
def test_first_tokens_are_those_of_dialogues_without_images_and_repeat(
    asked: int, expected: list[int]
) -> None:
    shown = example([4, 5, 6], images=("x.png",))
    assert data(shown, example([1, 2, 3]), shown, example([7, 8])).first_tokens(asked) == expected
    assert data(shown).first_tokens(3) == []


def test_a_token_is_in_an_example_of_mean_length_over_tokens() -> None:
    assert data(example([1] * 3), example([1])).mean_attended_length() == (9 + 1) / 4


def test_a_run_is_as_long_as_its_longest_item_and_a_stream_as_it_may_be() -> None:
    assert data(example([1] * 3), example([1])).longest == 3
    stream: Any = SimpleNamespace(
        shards=[SimpleNamespace(size=10**9), SimpleNamespace(size=5 * 10**8)],
        settings=SimpleNamespace(packed=True),
    )
    streamed = data(example([1]), stream=stream)
    assert streamed.longest == 99
    assert streamed.size() == "a stream of 2 files, 1.5 GB"
    assert (streamed.is_packed, streamed.an_epoch()) == (True, "")
    stream.settings.packed = False
    assert not streamed.is_packed
    plain = data(example([1]), plan=SimpleNamespace(steps_per_epoch=1234))
    assert (plain.size(), plain.an_epoch(), plain.is_packed) == ("1", " (1,234 an epoch)", False)
    assert data(example([1]), items=Examples([example([1])])).is_packed


@pytest.mark.parametrize(
    ("options", "packing", "world", "expected"),
    [
        ({}, False, 1, (2, 3, 1, 6)),
        ({}, False, 4, (2, 3, 4, 24)),
        ({"sequence_parallel": 2}, False, 4, (2, 3, 2, 12)),
        ({"sequence_parallel": 4}, True, 4, (2, 3, 1, 6)),
    ],
)
def test_the_plan_of_steps_follows_from_the_options_and_who_shares_rows(
    options: dict[str, int], packing: bool, world: int, expected: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(run_data.launcher, "world_size", lambda: world)
    training = TrainingSection(
        output_dir="x", batch_size=2, gradient_accumulation_steps=3, seed=5, **options
    )
    for grouped in (False, True):
        section = DataSection(train="x", packing=packing, group_by_length=grouped)
        plan = plan_of([4, 2, 9], section, training)
        found = (plan.batch_size, plan.accumulation, plan.world_size, plan.global_batch)
        assert found == expected
        assert plan.group_by_length is (grouped and not packing)  # packed rows are alike
        assert plan.seed == 5


@pytest.mark.parametrize(
    ("shared", "allowed", "refused", "said"),
    [
        (0, 0.0, False, False),
        (1, None, False, True),
        (1, 0.25, False, True),  # as much as is allowed
        (2, 0.25, True, False),
        (1, 0.0, True, False),
    ],
)
def test_held_out_dialogues_that_are_trained_are_told_and_refused_above_the_limit(
    shared: int,
    allowed: float | None,
    refused: bool,
    said: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = [f"held-out.jsonl:{number}" for number in range(3, 3 + shared)]
    validation: Any = type("Held", (list,), {"shared_with": lambda self, train: places})(range(4))
    train: Any = None
    if refused:
        with pytest.raises(DataError, match=f"{shared} of 4 .*first held-out.jsonl:3.*allows"):
            check_overlap(train, validation, allowed)
    else:
        check_overlap(train, validation, allowed)
    warned = capsys.readouterr().err
    assert (f"{shared} of 4 held-out dialogues ({25 * shared}%)" in warned) is said


def test_every_loss_of_rows_is_said_with_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    counts = ExampleCounts(
        rows=1500, bad=1, dropped={"too long": 2}, named=("train.jsonl:7: too long",), duplicates=3,
        text_blocks=4, truncated=5, tokens=60000, supervised_tokens=7000, longest=1024,
    )  # fmt: skip
    report("training", counts, 1490)
    assert capsys.readouterr().out == (
        "training data: 1,490 examples from 1,500 rows; 60,000 tokens, 7,000 of them supervised; "
        "longest 1,024; 4 of them blocks of plain text; 1 bad rows left out; 3 left out because "
        "another says the same; 5 lost their oldest turns; 2 dropped: too long\n"
        "  train.jsonl:7: too long\n"
    )
    report("validation", ExampleCounts(rows=2, tokens=9, supervised_tokens=3, longest=5), 2)
    assert capsys.readouterr().out == (
        "validation data: 2 examples from 2 rows; 9 tokens, 3 of them supervised; longest 5\n"
    )


def test_what_is_doubtful_in_rows_is_warned_of_with_their_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    counts = ExampleCounts(rows=2, tokens=9, supervised_tokens=3, longest=5, unread={"remark": 2})
    report("validation", counts, 2)
    (note,) = counts.notes()
    assert capsys.readouterr().err == f"warning: validation data: {note}\n"


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"num_epochs": 1.5}, 5), ({"num_epochs": 2}, 6), ({"max_steps": 4}, 4), ({"num_epochs": 0.01}, 1)],
)  # fmt: skip
def test_a_part_of_an_epoch_is_whole_steps(options: dict[str, Any], steps: int) -> None:
    one = data(example([1]), plan=SimpleNamespace(steps_per_epoch=3))
    assert one.steps(TrainingSection(output_dir="x", **options)) == steps


def test_data_json_tells_lengths_counts_and_where_a_stream_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Prepared(Examples):
        fingerprint = "print"
        counts = ExampleCounts(rows=4, longest=48)

    monkeypatch.setattr(run_data, "PreparedDataset", Prepared)
    train: Any = Prepared([example([1] * size) for size in (1, 2, 3, 48)])
    monkeypatch.setattr(run_data.hub, "fetched", {})
    found = data(train=train, items=train).described()
    assert found.keys() == {"train"}
    assert (found["train"]["examples"], found["train"]["rows"]) == (4, 4)
    assert found["train"]["fingerprint"] == "print"
    lengths = found["train"]["lengths"]
    assert (lengths["edges"][0], lengths["edges"][1], lengths["edges"][-1]) == (0.0, 2.0, 48.0)
    assert (lengths["numbers"][:2], lengths["numbers"][-1], sum(lengths["numbers"])) == ([1, 2], 1, 4)  # fmt: skip
    stream: Any = SimpleNamespace(
        fingerprint="of files", shards=[SimpleNamespace(name="a"), SimpleNamespace(name="b")]
    )
    read = ExampleCounts(rows=7, kept=6)
    feed: Any = SimpleNamespace(read=read, position=SimpleNamespace(number_of_pass=2))
    streamed = data(stream=stream, validation=train)
    monkeypatch.setattr(run_data.hub, "fetched", {"org/x": "commit"})
    now = streamed.described(feed)
    assert now.keys() == {"train", "validation", "fetched"}
    assert now["fetched"] == {"org/x": "commit"}
    told = {key: now["train"][key] for key in ("examples", "rows", "passes", "fingerprint", "shards")}  # fmt: skip
    assert told == {
        "examples": 6, "rows": 7, "passes": 2, "fingerprint": "of files", "shards": ["a", "b"],
    }  # fmt: skip
    assert (streamed.described()["train"]["examples"], streamed.described()["train"]["passes"]) == (0, 0)  # fmt: skip


# --- one process's batches -----------------------------------------------------------------------


def test_a_process_without_an_example_gets_a_blank_and_no_example_twice() -> None:
    plan: Any = SimpleNamespace(
        micro_batches=lambda epoch, rank: [[epoch, rank], [], [4]], passes_per_epoch=3
    )
    given = RankBatches(plan, rank=1)
    given.set_epoch(7)
    assert (list(given), len(given)) == ([[7, 1], [BLANK], [4]], 3)


def test_a_blank_is_the_beginning_of_the_shortest_example_and_nothing_of_it_is_learned() -> None:
    items = Examples([example([1, 2, 3]), example([7, 8], index=1), example([4, 5, 6], index=2)])
    blank: Any = WithBlanks(items)[BLANK]
    assert (blank.input_ids.tolist(), blank.index, blank.loss_weights) == ([7, 8], BLANK, None)
    assert blank.labels.tolist() == [IGNORED, IGNORED]
    assert WithBlanks(items)[2] is items[2]
    shown = blanked(example([1, 2, 3, 4], images=("x.png",)))  # its image needs all its tokens
    assert isinstance(shown, Example)
    assert shown.input_ids.tolist() == [1, 2, 3, 4]
    assert set(shown.labels.tolist()) == {IGNORED}
    row: Any = blanked([example([5, 6, 7]), example([8])])
    assert [one.input_ids.tolist() for one in row] == [[5, 6]]


def loading(**others: Any) -> TrainingData:
    given = {
        "items": Examples([example([1, 2])]), "lengths": np.array([2]), "plan": None, "collate": dict,
        "location": lambda index: f"train.jsonl:{index + 1}", "objective": SupervisedTokens(),
    }  # fmt: skip
    return TrainingData(**given | others)


@pytest.mark.parametrize(("number", "more"), [(1, 0), (20, 0), (21, 1), (45, 25)])
def test_the_first_twenty_places_of_documents_are_named_and_blanks_are_none(
    number: int, more: int
) -> None:
    samples = [np.array([BLANK, *range(number)])]
    lines = loading().places(samples).splitlines()
    expected = [f"train.jsonl:{place + 1}" for place in range(min(number, 20))]
    expected += [f"and {more} more"] if more else []
    assert [line.strip() for line in lines] == expected


@pytest.mark.parametrize(("workers", "timeout"), [(0, 0), (2, 30)])
def test_the_loader_has_a_random_stream_of_its_own_and_waits_for_workers_so_long(
    workers: int, timeout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "pins_memory", lambda: False)
    plan: Any = SimpleNamespace(passes_per_epoch=1, micro_batches=lambda epoch, rank: [[rank]])
    loader = loading(plan=plan).loader(rank=3, workers=workers, seconds=30)
    assert (loader.num_workers, loader.timeout) == (workers, timeout)
    assert loader.persistent_workers is (workers > 0)
    assert isinstance(loader.generator, torch.Generator)
    assert loader.generator is not torch.default_generator
    assert loader.worker_init_fn is batches.ignore_signals
    assert loader.batch_sampler.rank == 3  # type: ignore[union-attr]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    if not workers:
        iter(loader)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    loader.set_epoch(4)
    assert loader.batch_sampler.epoch == 4  # type: ignore[union-attr]


# --- what a step consists of ---------------------------------------------------------------------


def test_a_steps_counts_leave_padding_blanks_and_first_labels_out() -> None:
    labels = torch.tensor([[7, IGNORED, 8, 9], [IGNORED, 5, IGNORED, IGNORED]])
    batch = {"labels": labels, "input_ids": torch.zeros(2, 4)}
    weights = torch.tensor([[9.0, 9.0, 0.5, 2.0], [9.0, 3.0, 9.0, 9.0]])
    lengths = np.array([4, 100, 2], np.int32)
    samples = [np.array([0, 2, BLANK])]
    found = count([batch], samples, lengths, SupervisedTokens())
    assert found == StepCounts(weight=3.0, supervised=3.0, tokens=6.0, cells=8.0)
    assert found.padding == 0.25
    weighted = count([batch | {"loss_weights": weights}], samples, lengths, SupervisedTokens())
    assert weighted == replace(found, weight=5.5)
    assert found + found == StepCounts(6.0, 6.0, 12.0, 16.0)
    assert StepCounts().padding == 0.0


def test_the_loss_gets_labels_weights_and_the_normaliser_and_the_model_what_is_left() -> None:
    seen: dict[str, Any] = {}

    def model(**inputs: Any) -> Any:
        seen.update(inputs)
        head = torch.nn.Linear(2, 3, bias=False)
        torch.nn.init.zeros_(head.weight)
        loss = inputs["head_loss"](head, torch.zeros(1, 3, 2))
        return SimpleNamespace(loss=loss)

    batch = {
        "input_ids": torch.zeros(1, 3), "labels": torch.tensor([[IGNORED, 1, 2]]),
        "loss_weights": torch.tensor([[0.0, 1.0, 3.0]]),
    }  # fmt: skip
    called: Any = model
    loss = SupervisedTokens().loss(called, batch, 8.0)
    assert float(loss.detach()) == pytest.approx((1.0 + 3.0) * np.log(3) / 8)
    assert seen.keys() == {"input_ids", "head_loss", "use_cache"}
    assert seen["use_cache"] is False
