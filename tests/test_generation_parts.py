"""Parts of generation, each alone: batches and their order, what is known already, seeds, bases, endpoints."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.errors import DataError
from finetune.generation import batch, decoder, generate, replies
from finetune.generation.batch import Batch, SharedPrefix, beginnings, shared_prefix
from finetune.generation.decoder import Decoding, Request
from finetune.generation.generate import Extras, SeededSampling, Window
from finetune.generation.settings import GREEDY, Sampling

# --- batches -----------------------------------------------------------------------------------


def test_a_shared_beginning_is_short_of_every_prompt_and_long_enough_to_pay() -> None:
    common = list(range(16))
    assert shared_prefix([[*common, 1], [*common, 2]]) == common
    assert shared_prefix([[*common[:15], 98], [*common[:15], 99]]) == []
    assert shared_prefix([[*common, 1], common]) == [], "a whole prompt has nothing left to read"
    assert shared_prefix([[*common, 5], [*common, 5]]) == common
    assert shared_prefix([[*common, 1]]) == []


def test_prompts_that_begin_others_are_read_with_the_longest_of_them() -> None:
    assert beginnings([[1, 2], [1], [2], [1, 2, 3], [1, 3]]) == [3, 3, 2, 3, 4]
    assert beginnings([[1], [256]]) == [0, 1], "numbers, not their bytes"
    assert beginnings([[5, 6], [5, 6]]) == [1, 1]


def test_the_first_prompts_that_fit_into_a_pass_are_read_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch, "FIRST_PASS_TOKENS", 20)
    rows = Batch(None, SharedPrefix.kept([1, 2], []))
    for lengths, number in (([7, 7, 7, 7, 7], 4), ([7, 12, 7], 2), ([7, 13], 1), ([99, 2], 1), ([12, 12], 2)):  # fmt: skip
        assert rows.num_at_once([[0] * length for length in lengths]) == number, lengths


def test_positions_of_images_are_the_last_three_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.arange(6).view(1, 1, 6)
    shown = torch.cat([text, text * 10, text * 20, text * 30])
    for positions, wanted in ((shown, shown[1:]), (shown[1:], shown[1:]), (text[0], text[0])):
        model: Any = SimpleNamespace(_prepare_position_ids_for_generation=lambda *_, found=positions: found)  # fmt: skip
        found = batch._image_positions(model, text, text, {})
        assert torch.equal(found, wanted)


def test_a_batch_that_fails_while_rows_are_joined_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    rows = Batch(SimpleNamespace(device="cpu"), SharedPrefix.kept([], []))
    monkeypatch.setattr(SharedPrefix, "cache", lambda *_: "new")
    monkeypatch.setattr(Batch, "_read_wholes", lambda *_: torch.zeros(1, 3))
    rows.prefill([[1, 2]])
    assert (rows.is_lost, len(rows)) == (False, 1)
    monkeypatch.setattr(batch, "_joined", fail)
    with pytest.raises(RuntimeError):
        rows.prefill([[3, 4]])
    assert rows.is_lost


def test_columns_grow_beside_what_is_held_elsewhere() -> None:
    from finetune.models.cache_columns import CacheColumns

    def column(value: float, number: int = 1) -> torch.Tensor:
        return torch.full((1, 1, number, 2), value)

    layer = CacheColumns()
    layer.update(column(1.0, 3), column(-1.0, 3))
    first = layer.keys
    for step in range(200):
        keys, values = layer.update(column(float(step)), column(-float(step)))
        assert keys.shape[2] == values.shape[2] == step + 4
    assert keys[0, 0, 3:, 0].tolist() == [float(step) for step in range(200)]
    assert values[0, 0, :, 0].tolist() == [-1.0] * 3 + [-float(step) for step in range(200)]
    assert first.shape[2] == 3
    layer.hold(keys[:, :, 100:], values[:, :, 100:])
    again, _ = layer.update(column(7.0), column(7.0))
    assert again[0, 0, -2:, 0].tolist() == [199.0, 7.0]


# --- choosing tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "greedy"),
    [
        ({}, True), ({"temperature": 1e-6}, True), ({"temperature": 1e-5}, False), ({"temperature": 1.0, "top_p": 0.0}, True),
        ({"temperature": 1.0, "top_p": 0.1}, False), ({"temperature": 1.0, "top_k": 1}, True), ({"temperature": 1.0, "top_k": 2}, False),
    ],
)  # fmt: skip
def test_a_reply_is_greedy_where_nothing_can_be_drawn(how: dict[str, Any], greedy: bool) -> None:
    assert Decoding(4, **how).is_greedy is greedy


def test_penalties_know_the_prompt_and_the_reply_apart() -> None:
    def lowered(**how: float) -> list[float]:
        row = decoder.DecodingRow(Request([0, 1], Decoding(9, **how)))  # type: ignore[arg-type]
        row.ids = [1, 2, 2]
        found: list[float] = row._penalised(torch.tensor([4.0, -4.0, 4.0, 4.0])).tolist()
        return found

    assert lowered(repetition_penalty=2.0) == [2.0, -8.0, 2.0, 4.0]
    assert lowered(presence_penalty=1.0) == [4.0, -5.0, 3.0, 4.0], "of the reply alone"
    assert lowered(frequency_penalty=1.0) == [4.0, -5.0, 2.0, 4.0]
    assert Decoding(1, frequency_penalty=0.1).penalises
    assert not Decoding(1).penalises


def test_a_seed_of_0_is_a_seed() -> None:
    logits = torch.zeros(50)
    for seed in (0, 3):
        drawn = [[decoder.Sampler(Decoding(9, temperature=1.0, seed=seed)).draw(logits) for _ in range(1)] for _ in range(4)]  # fmt: skip
        assert len({str(one) for one in drawn}) == 1
    streams = [decoder.Sampler(Decoding(9, temperature=1.0, seed=None)) for _ in range(2)]
    assert len({str([one.draw(logits) for _ in range(20)]) for one in streams}) == 2


@pytest.mark.parametrize(
    ("tokens", "longest", "ids", "stopped", "done"),
    [
        ([5, 6], 2, [5, 6], False, True), ([5], 2, [5], False, False), ([5, 9], 2, [5], True, True),
        ([9], 1, [], True, True), ([5, 7], 3, [5, 7], False, True),
    ],
)  # fmt: skip
def test_a_reply_ends_at_its_stop_its_length_or_when_its_reader_has_enough(
    tokens: list[int], longest: int, ids: list[int], stopped: bool, done: bool
) -> None:
    heard: list[int] = []
    row = decoder.DecodingRow(Request([1], Decoding(longest), lambda token: heard.append(token) or token == 7))  # type: ignore[func-returns-value]  # fmt: skip
    for token in tokens:
        row.take(token, {9})
    assert (row.ids, row.stopped, row.is_done) == (ids, stopped, done)
    assert heard == ids, "nobody hears the stop"


def test_scores_are_of_the_replys_tokens_and_not_of_its_stop() -> None:
    scores = decoder.Scores(2)
    row = decoder.DecodingRow(Request([1], Decoding(5), scores=scores))
    logits = torch.tensor([0.0, 2.0, 1.0])
    row.append(logits, 1, frozenset({0}))
    row.append(torch.tensor([3.0, 0.0, 0.0]), 0, frozenset({0}))
    [one] = scores.tokens
    logprobs = logits.log_softmax(-1).tolist()
    assert (one.token, one.logprob) == (1, pytest.approx(logprobs[1]))
    assert one.likeliest == [(1, pytest.approx(logprobs[1])), (2, pytest.approx(logprobs[2]))]


# --- windows and batches -----------------------------------------------------------------------


def test_a_drawn_reply_depends_on_the_seed_and_its_number_among_all() -> None:
    def seed(of: SeededSampling, number: int) -> int | None:
        return of.decoding(5, number).seed

    how = SeededSampling.at(0.7, 1)
    assert seed(how, 4) == seed(replace(how, first=3), 1)
    found = {seed(SeededSampling.at(0.7, one), number) for one in range(4) for number in range(100)}
    assert len(found) == 400, "neighbouring seeds draw other replies"
    assert how.decoding(5, 0).temperature == 0.7
    assert how.decoding(5, 0).max_new_tokens == 5


def test_extras_of_a_later_window_count_on_from_its_first_prompt() -> None:
    asked: list[int] = []
    extras = Extras(SeededSampling.at(0.7, 1), lambda number: asked.append(number))  # type: ignore[func-returns-value]
    behind = extras.behind(10).behind(5)
    request, same = behind.request([1], 2, 9), extras.request([1], 17, 9)
    assert asked == [17, 17]
    assert request.decoding == same.decoding
    assert Extras().request([1], 2, 9).decoding == Decoding(9)
    assert Extras().behind(4) == Extras()


@pytest.mark.parametrize(
    ("rows", "taken"),
    [([[0, [5], True], [2, [6], False]], True), ([[2, [6], False], [0, [5], True]], True), ([[0, [5], True], [1, [6], True]], False), ([[0, [5], True]], False)],
)  # fmt: skip
def test_rows_that_are_kept_are_those_of_the_batch_or_made_again(
    rows: list[list[Any]], taken: bool
) -> None:
    window = generate._OpenWindow(Window([[1], [2], [3]], known={4: rows}))
    one = generate._Batch(window, 4, [0, 2], key=0, is_last=True)
    assert one.known == (rows if taken else None)
    assert replace(one, number=3).known is None


class Written(generate.Generator):
    """Replies by a rule: as many tokens as the prompt has, stopped when they are even."""

    def __init__(self, batch_size: int, *, cut: int | None = None) -> None:
        model: Any = torch.nn.Linear(1, 1)
        model.config = SimpleNamespace()
        stops: Any = SimpleNamespace(stop_ids=(), pad_id=0)
        super().__init__(model, stops, max_new_tokens=9, batch_size=batch_size)
        self.cut, self.batches = cut, list[list[int]]()

    def _write(self, batch: Any) -> list[Any]:
        self.batches.append(batch.indices)
        prompts = batch.window.of.prompts
        found = [[i, [*prompts[i]], len(prompts[i]) % 2 == 0] for i in batch.indices]
        return found if self.cut is None else found[: self.cut]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "is_sharded", lambda _: False)


def test_replies_come_in_the_order_of_the_prompts_window_by_window() -> None:
    prompts = [[n] * (1 + 7 * n % 5) for n in range(7)]
    made, noted = Written(2), list[tuple[int, int]]()
    windows = [Window(prompts[:5]), Window(prompts[5:])]
    found = list(made.replies(windows, note=lambda number, rows: noted.append((number, len(rows)))))
    assert [[reply.index for reply in window] for window in found] == [[0, 1, 2, 3, 4], [0, 1]]
    assert [reply.ids for window in found for reply in window] == [tuple(one) for one in prompts]
    assert [reply.stopped for reply in found[0]] == [len(one) % 2 == 0 for one in prompts[:5]]
    assert noted == [(0, 2), (1, 2), (2, 1), (0, 2)]
    assert made.prompts_per_rank == [7]


def test_batches_that_are_known_are_neither_written_nor_noted_again() -> None:
    prompts = [[n] * (5 - n) for n in range(4)]
    known = {0: [[0, [7], True], [1, [8], False]]}
    made, noted = Written(2), list[int]()
    [found] = made.replies(
        [Window(prompts, known=known)], note=lambda number, _: noted.append(number)
    )
    assert [reply.ids for reply in found] == [(7,), (8,), (2, 2, 2), (3, 3)]
    assert (made.batches, noted, made.prompts_per_rank) == ([[2, 3]], [1], [2])


def test_a_batch_that_was_cut_short_is_not_taken_for_whole() -> None:
    made = Written(3, cut=2)
    assert list(made.replies([Window([[1], [2], [3]])], note=lambda *_: pytest.fail("noted"))) == []


def test_the_batch_size_is_the_same_everywhere_and_fits_where_least_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generate, "cache_tokens", lambda _, size: size // 10)
    monkeypatch.setattr(generate, "free_bytes", lambda: 100_000)
    # Another process has less free: the largest of the negative numbers is its own.
    monkeypatch.setattr(generate, "reduce_max", lambda values: [max(*values, -50_000)])
    assert generate.rows_at_once(None, "auto", 100) == 16  # 2,500 tokens of 100 each
    assert generate.rows_at_once(None, 33, 100) == 33


@pytest.mark.parametrize(("limit", "fits"), [(None, True), (0, True), (14, True), (13, False)])
def test_a_prompt_may_fill_its_context_with_its_reply(limit: int | None, fits: bool) -> None:
    if fits:
        generate.check_context(limit, [3, 9], 5, ["a", "b"])
        return
    with pytest.raises(DataError, match="1 of 2 prompts") as error:
        generate.check_context(limit, [3, 9], 5, ["a", "b"])
    assert str(error.value).endswith("\n  b: 9 tokens + 5 new ones")
    with pytest.raises(DataError, match=r"prompt 9: 9 tokens \+ 5 new ones\n  \.\.\. and 2 more"):
        generate.check_context(13, [9] * 12, 5)


# --- a journal of windows ----------------------------------------------------------------------


class Asked:
    """A backend that keeps what it is asked."""

    def __init__(self) -> None:
        self.windows: list[Window] = []
        self.total: int | None = None

    def replies(self, windows: Any, *, note: Any = None, total: int | None = None) -> Any:
        self.total = total
        for window in windows:
            self.windows.append(window)
            yield [f"reply {ids[0]}" for ids in window.prompts]


def test_what_is_kept_is_not_asked_again_and_its_batches_are_of_the_next_window() -> None:
    known = {1: ["rows"]}
    journal: Any = SimpleNamespace(batches=lambda: known, note=None)
    how = replies.Answering(None, 2, journal, Sampling(temperature=0.5), seed=3)  # type: ignore[arg-type]
    number = how.window + 5
    prompts: Any = [SimpleNamespace(prompt_ids=[n], tools=(), opened="") for n in range(2 * how.window + number)]  # fmt: skip
    asked = Asked()
    found = list(replies.answered(asked, iter(prompts), how, behind=how.window, total=len(prompts)))  # type: ignore[arg-type]
    assert [len(window) for window in found] == [how.window, how.window, 5]
    assert [reply for _, reply in found[0]][:2] == [f"reply {how.window}", f"reply {how.window + 1}"]  # fmt: skip
    assert [window.known for window in asked.windows] == [known, {}, {}]
    assert asked.total == len(prompts) - how.window
    samplings = [window.extras.sampling for window in asked.windows]
    assert [one.first for one in samplings if one] == [how.window, 2 * how.window, 3 * how.window]
    assert {one.seed for one in samplings if one} == {3}
    assert replace(how, sampling=GREEDY).extras(0, []).sampling is None
