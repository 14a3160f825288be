"""What a cached entry, a fingerprint and a position depend on: each part alone changes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from examples import tiny_template

from finetune.data.chat import tokenizer as tokenizers
from finetune.data.chat.image import ImageSpec
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import _digest
from finetune.data.dialogue.formats import RowRules
from finetune.data.dialogue.images import ImageRule
from finetune.data.examples import selection, stream
from finetune.data.examples.dataset import LengthPolicy, _keys, _made_by, load_examples
from finetune.data.examples.selection import Selection
from finetune.data.examples.store import digests, ends_of
from finetune.data.examples.stream import ExampleStream, Position, StreamSettings, position_of
from finetune.data.reading.images import ImagePolicy
from finetune.data.reading.parts import Part
from finetune.data.reading.shards import StreamShard
from finetune.data.reading.sources import Reading, SourceSpec
from finetune.errors import DataError, ModelError
from finetune.storage import cache
from finetune.storage.seen import SeenFiles

Change = Callable[[dict[str, Any]], Any]
POLICY = LengthPolicy(100)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return tiny_template(tmp_path_factory.mktemp("tokenizer"))


def rules(**options: Any) -> Reading:
    return Reading(rules=RowRules(**options))


# Of a source or a reading: changes the fingerprint, and the entry of the cache.
SOURCES = [
    ("source", SourceSpec("a", format="pairs"), True, True),
    ("source", SourceSpec("a", columns=(("prompt", "q"),)), True, True),
    ("source", SourceSpec("a", max_rows=3), True, True),
    ("source", SourceSpec("a", part=Part(0.1, True)), True, True),
    ("source", SourceSpec("a", part=Part(0.1, True, "who")), True, True),
    ("source", SourceSpec("a", weight=2.0), False, False),
    ("reading", Reading(columns=("q", "a")), True, True),
    ("reading", Reading("skip"), False, True),
    ("reading", Reading(max_bad_rows=0.5), False, True),
    ("reading", Reading(images=ImagePolicy(root="x")), False, True),
    ("reading", rules(turns="merge"), True, True),
    ("reading", rules(calls_in_text="read"), True, True),
    ("reading", rules(reasoning="drop"), True, True),
    ("reading", rules(ignore_columns=("x",)), True, True),
    ("method", {"format": 6}, True, True),
    ("path", "b", False, True),
    ("content", ("1", "other"), True, True),
]


@pytest.mark.parametrize(("what", "value", "told", "kept"), SOURCES, ids=lambda v: str(v)[:40])
def test_whatever_decides_an_example_is_in_its_keys(
    what: str, value: Any, told: bool, kept: bool
) -> None:
    def keys(**given: Any) -> tuple[Any, str]:
        path = Path(given.get("path", "a"))
        seen = SeenFiles({path: given.get("content", ("1", "same"))})
        sources = [given.get("source", SourceSpec("a"))]
        reading, method = given.get("reading", Reading()), given.get("method", {"format": 5})
        return _keys(sources, [[path]], seen, reading, method)

    (made, key), (other_made, other_key) = keys(), keys(**{what: value})
    assert (made != other_made) == told
    assert (key != other_key) == kept


def test_whatever_decides_how_an_example_is_made_is_in_its_keys(template: ChatTemplate) -> None:
    made = [
        _made_by(template, policy)
        for policy in (
            POLICY, LengthPolicy(101), LengthPolicy(100, "last_reply"),
            LengthPolicy(100, on_too_long="drop"), LengthPolicy(100, on_too_long="error"),
        )
    ]  # fmt: skip
    assert len({json.dumps(one, sort_keys=True) for one in made}) == 5
    assert all(one["template"] == template.fingerprint for one in made)


HELD_OUT: Any = type("HeldOut", (), {"fingerprint": "f"})()
OTHER: Any = type("HeldOut", (), {"fingerprint": "g"})()


def test_a_selection_says_all_that_it_chooses_by() -> None:
    every = [
        Selection(), Selection("first"), Selection("all"), Selection("all", 2.0),
        Selection(deduplicate="exact"), Selection(deduplicate="near"),
        Selection(deduplicate="exact", held_out=HELD_OUT),
        Selection(deduplicate="exact", held_out=OTHER),
    ]  # fmt: skip
    assert len({json.dumps(one.key) for one in every}) == len(every)
    assert Selection(held_out=HELD_OUT).key == Selection().key == {}


def test_near_duplicates_are_kept_by_data_and_selection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter(range(10))
    monkeypatch.setattr(selection, "_near", lambda *_: np.array([next(found)]))
    held: Any = type("HeldOut", (), {"fingerprint": "f", "stored": None})()

    def rows(key: str, chosen: Selection) -> list[int]:
        return selection.first_ones(None, key, chosen, 0, tmp_path).tolist()  # type: ignore[arg-type]

    near = Selection(deduplicate="near")
    for _ in range(2):
        assert rows("a", near) == [0]
        assert rows("b", near) == [1]
        assert rows("a", replace(near, held_out=held)) == [2]


def test_a_seed_and_weights_count_where_they_choose(template: ChatTemplate, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"prompt": "{n}", "response": "a"}}\n' for n in range(8)))

    def told(weight: float, seed: int, **chosen: Any) -> str:
        source = [SourceSpec(str(file), weight=weight)]
        return load_examples(
            source, template, POLICY, seed=seed, selection=Selection(**chosen), cache_root=tmp_path
        ).fingerprint

    assert told(1.0, 1) == told(1.0, 2)
    found = {told(0.5, 1), told(0.5, 2), told(1.0, 1), told(2.0, 1), told(1.0, 1, stop="all")}
    assert len(found) == 5


def test_an_entry_of_the_cache_does_not_hang_on_the_order_of_its_parts() -> None:
    assert cache.key_of({"a": 1, "b": {"c": 2, "d": 3}}) == cache.key_of(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert cache.key_of({"a": 1}) != cache.key_of({"a": 2})


# --- the template and the tokenizer --------------------------------------------------------------


def test_a_template_of_another_tokenizer_layout_or_image_has_another_fingerprint(
    template: ChatTemplate,
) -> None:
    told = {template.fingerprint}
    end = "<|assistant|>{% endif %}"
    opened = tiny.CHAT_TEMPLATE.replace(end, end.replace("{", "\n{"))
    for number, changed in enumerate((
        {"fingerprint": "other"}, {"image": ImageSpec(28, 1, 7)}, {"image": ImageSpec(56, 4, 7)},
        {"chat_template": opened},
    ), 2):  # fmt: skip
        told.add(ChatTemplate(replace(template.tokenizer, **changed)).fingerprint)
        assert len(told) == number, changed


@pytest.mark.parametrize("one", [("a", "bc"), ("abc",), ("", "abc"), ("abc", "")])
def test_the_parts_of_a_digest_are_told_apart(one: tuple[str, ...]) -> None:
    assert _digest(*map(str.encode, one)) != _digest(b"ab", b"c")


def test_a_converted_tokenizer_of_another_version_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    made = []

    class Converted:
        def to_str(self) -> str:
            made.append(1)
            return "{}"

    monkeypatch.setattr(tokenizers, "_convert", lambda *_: Converted())
    (tmp_path / "tokenizer.model").write_text("ranks")
    first = tokenizers.tokenizer_file(tmp_path)
    assert tokenizers.tokenizer_file(tmp_path) == first
    assert len(made) == 1
    monkeypatch.setattr(tokenizers, "CONVERSION_VERSION", 99)
    assert tokenizers.tokenizer_file(tmp_path) != first
    (tmp_path / "tokenizer.model").write_text("other ranks")
    tokenizers.tokenizer_file(tmp_path)
    assert len(made) == 3


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize(("length", "taken"), [(16, True), (17, False)])
def test_a_part_that_makes_one_character_many_is_refused(
    tmp_path: Path, part: str, length: int, taken: bool
) -> None:
    tiny.save_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    settings = json.loads(file.read_text("utf-8"))
    step = {"type": "Replace", "pattern": {"String": "~"}, "content": "~" * length}
    other = step | {"content": "~" * 16}
    settings[part] = {"type": "Sequence", f"{part}s": [step, other]}
    file.write_text(json.dumps(settings))
    if taken:
        tokenizers._open(file)
    else:
        with pytest.raises(ModelError, match="becomes more than 256"):
            tokenizers._open(file)


# --- streams -------------------------------------------------------------------------------------

SETTINGS = StreamSettings(POLICY, Reading(), seed=1, shuffle_buffer=10)
SHARD = StreamShard(0, "x/a.jsonl", 5)
STREAMS = [
    ("shards", [replace(SHARD, name="x/b.jsonl")], True),
    ("shards", [replace(SHARD, size=6)], True),
    ("shards", [SHARD, SHARD], True),
    ("shards", [replace(SHARD, name="elsewhere/a.jsonl")], False),
    ("sources", [SourceSpec("a", weight=2.0)], True),
    ("sources", [SourceSpec("a", format="pairs")], True),
    ("sources", [SourceSpec("a", columns=(("prompt", "q"),))], True),
    ("settings", replace(SETTINGS, seed=2), True),
    ("settings", replace(SETTINGS, shuffle_buffer=11), True),
    ("settings", replace(SETTINGS, packed=True), True),
    ("settings", replace(SETTINGS, policy=LengthPolicy(101)), True),
    ("settings", replace(SETTINGS, reading=Reading(columns=("q", "a"))), True),
    ("settings", replace(SETTINGS, reading=rules(turns="merge")), True),
    ("settings", replace(SETTINGS, reading=Reading("skip", 0.5)), False),
    ("settings", replace(SETTINGS, reading=Reading(images=ImagePolicy(root="x"))), False),
]


@pytest.mark.parametrize(("what", "value", "changes"), STREAMS, ids=lambda v: str(v)[:40])
def test_whatever_decides_a_stream_is_in_its_fingerprint(
    template: ChatTemplate, tmp_path: Path, what: str, value: Any, changes: bool
) -> None:
    def told(**given: Any) -> str:
        all_of_it = {"shards": [SHARD], "sources": [SourceSpec("a")], "settings": SETTINGS} | given
        return ExampleStream(**all_of_it, template=template, cache_root=tmp_path).fingerprint

    assert (told(**{what: value}) != told()) == changes


def test_a_stream_of_another_template_has_another_fingerprint(
    template: ChatTemplate, tmp_path: Path
) -> None:
    other = ChatTemplate(replace(template.tokenizer, fingerprint="other"))
    first, second = (
        ExampleStream([SHARD], [SourceSpec("a")], one, SETTINGS, cache_root=tmp_path).fingerprint
        for one in (template, other)
    )
    assert first != second


def test_a_position_is_read_back_and_one_of_another_version_refused() -> None:
    where = Position(1, 2, ((0, 3), (4, 5)), 6, 7, 8, 9, 10)
    saved = json.loads(json.dumps(where.as_json()))
    assert position_of(saved) == where
    for wrong in (
        saved | {"format": stream.FORMAT + 1}, saved | {"more": 1},
        {name: value for name, value in saved.items() if name != "taken"},
    ):  # fmt: skip
        with pytest.raises(DataError, match="another version"):
            position_of(wrong)


# --- what repeats --------------------------------------------------------------------------------


def test_examples_are_alike_when_all_their_ids_and_images_are() -> None:
    rows = [[5, 6], [6, 5], [5, 6, 0], [5], [0], [0, 0], [5, 6], [5, 6]]
    shown = [(), (), (), (), (), (), ("a.png",), ("b.png", "a.png")]
    ids = np.array([i for row in rows for i in row], np.int32)
    found = digests(ids, ends_of([len(row) for row in rows]), shown)
    assert len(set(found.tolist())) == len(rows)
    # The same whatever stands around them.
    part = digests(ids[2:4], ends_of([2]), [()])
    assert part[0] == found[1]


def test_what_a_checkpoint_takes_is_of_its_readings_rules(template: ChatTemplate) -> None:
    found = Reading().for_checkpoint(template).rules
    assert found.thinks is False
    assert found.images == ImageRule(template.tokenizer.name, most=0)
