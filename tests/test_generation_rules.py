"""Generation, rule by rule: columns and rows of a batch, who comes in, what is drafted, windows of one call."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from finetune.data.chat.image import ImagePrompt
from finetune.generation import batch, decoder, drafts, generate, prompts
from finetune.generation.batch import Batch, SharedPrefix, beginnings, cached_sizes, shared_prefix
from finetune.generation.decoder import Decoder, Decoding, Request, write_replies
from finetune.generation.drafts import Drafts
from finetune.generation.generate import Extras, SeededSampling, context_length
from finetune.models.cache_columns import CacheColumns

# --- batches ---------------------------------------------------------------------------------------


def held(*columns: float) -> CacheColumns:
    """A layer of two rows, whose columns hold these numbers, the second row's negative."""
    layer = CacheColumns()
    keys = torch.tensor([columns, [-one for one in columns]])[:, None, :, None]
    layer.update(keys, keys * 10)
    return layer


def test_columns_that_no_row_uses_any_more_are_given_back() -> None:
    rows = Batch(SimpleNamespace(device="cpu"), SharedPrefix.kept([], []))
    layers = [held(1, 2, 3, 4), held(5, 6, 7, 8)]
    rows._cache = SimpleNamespace(layers=layers)
    rows._mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    rows._positions = torch.tensor([3, 1])
    rows.keep([1])
    assert rows._mask.tolist() == [[1, 1]]
    assert rows._positions.tolist() == [1]
    assert [layer.keys[0, 0, :, 0].tolist() for layer in layers] == [[-3, -4], [-7, -8]]
    assert [layer.values[0, 0, :, 0].tolist() for layer in layers] == [[-30, -40], [-70, -80]]
    assert len(rows) == 1
    rows.keep([])
    assert len(rows) == 0


def test_what_is_taken_of_a_row_is_its_own_and_outlives_the_batch() -> None:
    rows = Batch(SimpleNamespace(device="cpu"), SharedPrefix.kept([], []))
    rows._cache = SimpleNamespace(layers=[held(1, 2, 3, 4)])
    rows._mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    found = rows.taken(1, [7, 8, 9, 9, 9])
    assert found.ids == [7, 8, 9], "of the last token nothing has been computed"
    [(keys, values)] = found.layers
    rows._cache.layers[0].keys.zero_()
    assert (keys[0, 0, :, 0].tolist(), values[0, 0, :, 0].tolist()) == ([-2, -3, -4], [-20, -30, -40])  # fmt: skip
    assert rows.taken(0, [7]).ids == [7]
    shorter = found.first(2)
    assert (shorter.ids, shorter.layers[0][0].shape[2], shorter.layers[0][1].shape[2]) == ([7, 8], 2, 2)  # fmt: skip


def test_prompts_with_images_have_no_beginning_in_common() -> None:
    """Images look alike in ids."""
    shown: Any = [ImagePrompt([*range(30), n], [], None) for n in (1, 2, 2)]  # type: ignore[arg-type]
    assert shared_prefix(shown) == []
    assert beginnings(shown) == [0, 1, 2]
    plain = [[*range(30), n] for n in (1, 2, 2)]
    assert shared_prefix(plain) == [*range(30)]
    assert beginnings(plain) == [0, 2, 2]


def test_a_token_takes_as_much_of_the_cache_as_its_attention_keeps() -> None:
    plain = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    for config, sizes in (
        (plain, [(2, 6), (2, 6)]), (plain | {"head_dim": 8}, [(2, 8), (2, 8)]), (plain | {"head_dim": None}, [(2, 6), (2, 6)]),
        (plain | {"kv_lora_rank": 16, "qk_rope_head_dim": 4}, [(1, 16), (1, 4)]),
    ):  # fmt: skip
        assert cached_sizes(SimpleNamespace(**config)) == sizes
        text = SimpleNamespace(num_hidden_layers=3, **config)
        model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda text=text: text), dtype=torch.bfloat16)  # fmt: skip
        numbers = 3 * sum(heads * each for heads, each in sizes)
        assert generate.cache_tokens(model, 1000 * numbers) == 500, "of two bytes each"


def test_images_are_shown_in_the_order_of_the_prompts() -> None:
    asked: list[Any] = []

    def arrays(paths: Any) -> Any:
        asked.extend(paths)
        return {"pixel_values": torch.ones(3).numpy()}

    spec: Any = SimpleNamespace(arrays=arrays)
    given = [ImagePrompt([1], ["a", "b"], spec), [1, 2], ImagePrompt([1], ["c"], spec)]
    found = batch.image_inputs(given, torch.device("cpu"))
    assert [path for path, _ in asked] == ["a", "b", "c"]
    assert found["pixel_values"].tolist() == [1, 1, 1]
    assert batch.image_inputs([[1, 2]], torch.device("cpu")) == {}


# --- rows ------------------------------------------------------------------------------------------


class Rows(Decoder):
    """Rows of which some have ended."""

    def __init__(self, active: int, ended: int) -> None:
        self._rows: Any = [SimpleNamespace(is_done=n >= active) for n in range(active + ended)]
        self.done: list[str] = []
        self.batch: Any = SimpleNamespace(attend_step=lambda: self.done.append("attend"), num_at_once=len)  # fmt: skip

    def drop_done(self) -> None:
        self.done.append("drop")

    def step(self) -> None:
        self.done.append("step")


@pytest.mark.parametrize(("active", "ended", "sparse"), [(4, 0, False), (4, 1, False), (3, 1, True), (0, 1, True), (7, 2, False), (6, 2, True)])  # fmt: skip
def test_rows_are_dropped_once_a_quarter_of_them_has_ended(
    active: int, ended: int, sparse: bool
) -> None:
    assert Rows(active, ended).is_sparse is sparse


@pytest.mark.parametrize(
    ("active", "ended", "more", "done"),
    [(0, 1, False, ["attend"]), (3, 1, False, ["drop", "step"]), (3, 1, True, ["step"]), (4, 0, False, ["step"])],
)  # fmt: skip
def test_a_round_drops_rows_where_no_prompt_will_take_their_place(
    active: int, ended: int, more: bool, done: list[str]
) -> None:
    rows = Rows(active, ended)
    decoder._step(rows, more_come=more)
    assert rows.done == done


@pytest.mark.parametrize(
    ("active", "slots", "waiting", "taken"),
    [(0, 4, 9, 4), (0, 4, 2, 2), (3, 4, 9, 1), (4, 4, 9, 0), (7, 8, 9, 0), (6, 8, 9, 2), (6, 8, 1, 1), (0, 1, 3, 1), (1, 1, 3, 0), (13, 16, 9, 0), (12, 16, 9, 4)],
)  # fmt: skip
def test_prompts_come_in_once_a_quarter_of_the_places_is_free(
    active: int, slots: int, waiting: int, taken: int
) -> None:
    asked = [Request([n], Decoding(1)) for n in range(waiting)]
    queue = deque(asked)
    assert decoder._taken(queue, Rows(active, 0), slots) == asked[:taken]
    assert [*queue] == asked[taken:]


def test_what_goes_wrong_with_a_row_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        batch = SimpleNamespace(num_at_once=len)
        active: tuple[Any, ...] = ()

        def __init__(self, *given: Any) -> None:
            assert given == (model, [9], "prefix")

        def add(self, requests: Any) -> list[Any]:
            errors = [None, ValueError("no such token")]
            return [SimpleNamespace(is_done=True, error=error) for error in errors]

    model = SimpleNamespace(config=SimpleNamespace())
    monkeypatch.setattr(decoder, "Decoder", Broken)
    monkeypatch.setattr(decoder, "is_sharded", lambda _: False)
    asked = [Request([1], Decoding(1))] * 2
    with pytest.raises(ValueError, match="no such token"):
        write_replies(model, [9], asked, slots=2, prefix="prefix")  # type: ignore[arg-type]
    done = write_replies(model, [9], asked, slots=2, prefix="prefix", should_stop=lambda: True)  # type: ignore[arg-type]
    assert done == [], "nothing was asked"


def test_a_reply_that_is_stopped_in_the_middle_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoRows:
        batch = SimpleNamespace(num_at_once=len)
        rows = tuple(SimpleNamespace(is_done=done, error=None) for done in (False, True))
        active = rows[:1]

        def __init__(self, *_: Any) -> None: ...

        def add(self, requests: Any) -> tuple[Any, ...]:
            return self.rows

    monkeypatch.setattr(decoder, "Decoder", TwoRows)
    monkeypatch.setattr(decoder, "is_sharded", lambda _: False)
    polls = iter([False, True])
    asked = [Request([1], Decoding(1))] * 2
    done = write_replies(None, [9], asked, slots=3, should_stop=lambda: next(polls))
    assert done == [TwoRows.rows[1]]


def test_rows_of_adapters_are_computed_by_their_own(tiny_glm: Path) -> None:
    chosen: list[list[str]] = []
    rows = Decoder.__new__(Decoder)
    rows._choose = chosen.append
    rows._rows, rows._stop_ids, rows._drafts_for = [], frozenset(), None
    rows.batch = SimpleNamespace(  # type: ignore[assignment]
        prefill=lambda asked, prefix: torch.eye(len(asked), 5), step=lambda tokens: torch.eye(len(tokens), 5), keep=lambda _: None
    )  # fmt: skip
    rows.add([Request([1], Decoding(9), adapter="a")])
    rows.add([Request([1], Decoding(9), adapter="b"), Request([2], Decoding(9), adapter="b")])
    rows.step()
    assert chosen == [["a"], ["b"], ["a", "b", "b"]]


# --- drafts ----------------------------------------------------------------------------------------


def test_a_draft_that_is_always_wrong_is_tried_every_64_steps_and_no_less() -> None:
    ids = [1, 2, 3]
    found = Drafts([7, 7, *ids, *ids], ids, 100_000)
    tries = []
    for step in range(500):
        if found._found():
            tries.append(step)
            found.judge(0)
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert gaps == [2, 4, 8, 16, 32, 64, *[65] * (len(gaps) - 6)]
    assert len(gaps) > 8
    found.judge(2)
    assert (len(found._found()), found._left) == (drafts.SHORT, 0), "one that was right in part stays short"  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "checked"),
    [({}, True), ({"rope": "dynamic"}, False), ({"rope": "longrope"}, False), ({"rope": "default"}, True), ({"head": None}, False), ({"packed": False}, False), ({"documents": False}, False)],
)  # fmt: skip
def test_a_pass_over_several_tokens_is_made_where_it_is_as_exact_as_steps(
    changes: dict[str, Any], checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"rope": None, "head": SimpleNamespace(weight=1), "packed": True, "documents": True} | changes  # fmt: skip
    config = SimpleNamespace(rope_parameters={"rope_type": how["rope"]} if how["rope"] else None)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config), get_output_embeddings=lambda: how["head"])  # fmt: skip
    monkeypatch.setattr(drafts, "is_packed", lambda weight: how["packed"])
    monkeypatch.setattr(drafts, "takes_documents", lambda model: how["documents"])
    assert drafts._can_be_checked(model) is checked


# --- windows ---------------------------------------------------------------------------------------


def stops() -> Any:
    return SimpleNamespace(stop_ids=tuple(tiny.EOS_IDS), pad_id=tiny.PAD_ID)


def test_replies_of_many_windows_are_those_of_one(
    tiny_glm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.models.load import load_model

    model = load_model(tiny_glm, dtype="float32")
    asked = [[5 + n, 9, 7 + n % 3] * (1 + n % 2) for n in range(7)]
    told: list[int] = []
    extras = Extras(SeededSampling.at(1.3, seed=2), lambda number: told.append(number))  # type: ignore[func-returns-value]

    def made() -> list[generate.Reply]:
        return generate.generate(model, stops(), asked, max_new_tokens=4, batch_size=1, extras=extras)  # fmt: skip

    whole = made()
    assert (sorted(told), [reply.index for reply in whole]) == ([*range(7)], [*range(7)])
    told.clear()
    monkeypatch.setattr(prompts, "BATCHES_PER_WINDOW", 3)
    assert made() == whole
    assert sorted(told) == [*range(7)]


def test_any_whole_number_is_a_seed() -> None:
    for seed in (-1, 2**62, -(2**70)):
        drawn = SeededSampling.at(1.0, seed).decoding(4, 3).seed
        assert drawn is not None
        assert 0 <= drawn < 2**63
        torch.Generator().manual_seed(drawn)


@pytest.mark.parametrize(
    ("config", "found"),
    [({"max_position_embeddings": 8, "seq_length": 9}, 8), ({"seq_length": 9}, 9), ({"max_position_embeddings": None, "seq_length": 9}, 9), ({}, None), ({"seq_length": "9"}, None)],
)  # fmt: skip
def test_a_model_has_as_many_positions_as_its_config_says(
    config: dict[str, Any], found: int | None
) -> None:
    assert context_length(SimpleNamespace(config=SimpleNamespace(**config))) == found


def test_a_generator_asks_all_that_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    def write(model: Any, stop_ids: Any, requests: Any, **how: Any) -> list[Any]:
        written.append((model, stop_ids, [one.prompt for one in requests], how))
        return [SimpleNamespace(ids=[1], stopped=True) for _ in requests]

    config = SimpleNamespace()
    model = torch.nn.Linear(1, 1)
    model.config = config  # type: ignore[assignment]
    monkeypatch.setattr(generate, "write_replies", write)
    monkeypatch.setattr(generate, "is_sharded", lambda _: False)
    polls: list[int] = []
    monkeypatch.setattr(generate, "SharedPrefix", lambda model, prompts: ("prefix", len(prompts)))
    for room, slots in ((40, 2), (20, 2), (19, 1), (3, 1), (10**6, 2)):
        monkeypatch.setattr(generate, "cache_tokens", lambda _, room=room: room)
        written.clear()
        made = generate.Generator(model, stops(), max_new_tokens=6, batch_size=2, should_stop=lambda: polls.append(1) or False)  # type: ignore[func-returns-value]  # fmt: skip
        [window] = made.replies([generate.Window([[1] * 4, [2] * 3])])
        assert [reply.index for reply in window] == [0, 1]
        [(its, stop_ids, asked, how)] = written
        assert (its, stop_ids, asked) == (model, stops().stop_ids, [[1] * 4, [2] * 3])
        assert (how["slots"], how["prefix"]) == (slots, ("prefix", 2))
        polls.clear()
        assert how["should_stop"]() is False
        assert polls == [1]
