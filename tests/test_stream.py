"""A stream of training rows: the same items from every place on, whatever reads it; what it refuses."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
from rows import write_rows

from finetune.config.load import load_config
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.examples import stream as streams
from finetune.data.examples.preparation import LengthPolicy
from finetune.data.examples.stream import (
    START,
    ExampleStream,
    Item,
    StreamSettings,
    position_of,
)
from finetune.data.reading.shards import shards_of
from finetune.data.reading.sources import AS_IS, Reading, SourceSpec
from finetune.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return ChatTemplate(load_chat_tokenizer(folder))


def row(number: int) -> dict[str, Any]:
    return {"prompt": f"question {number} " + "fox " * (number % 9), "response": f"answer {number}"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """112 dialogues and 8 documents in five files of four kinds."""
    import pyarrow as pa
    import zstandard
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("shards")
    write_rows(folder / "a.jsonl", [row(n) for n in range(40)])
    text = "".join(json.dumps(row(n)) + "\n\n" for n in range(40, 70)).encode()
    (folder / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(text))
    table = pa.Table.from_pylist([row(n) for n in range(70, 100)])
    parquet.write_table(table, folder / "c.parquet", row_group_size=8)
    lines = [f"{r['prompt']},{r['response']}" for r in map(row, range(100, 112))]
    (folder / "d.csv").write_text("\n".join(["prompt,response", *lines, ""]), encoding="utf-8")
    write_rows(folder / "e.jsonl", [{"text": "the quick fox " * (40 * n)} for n in range(1, 9)])
    return folder


def stream_of(
    path: Path, template: ChatTemplate, *, weight: float = 1.0, packed: bool = False,
    buffer: int = 17, reading: Reading = AS_IS, seed: int = 0, held_out: Any = None,
) -> ExampleStream:  # fmt: skip
    sources = [SourceSpec(str(path), weight)]
    options = StreamSettings(LengthPolicy(64), reading, seed, buffer, packed)
    return ExampleStream(shards_of(sources), sources, template, options, held_out=held_out)


def key(item: Item) -> list[tuple[int, str, bytes, bytes]]:
    return [(e.index, e.location, e.input_ids.tobytes(), e.labels.tobytes()) for e in item.examples]


@pytest.mark.parametrize(
    ("weight", "packed", "buffer"), [(1.0, False, 17), (1.5, True, 1000), (2.0, True, 30)]
)
def test_a_stream_goes_on_from_every_place_with_what_would_have_come(
    files: Path, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch,
    weight: float, packed: bool, buffer: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(streams, "_PIECE_ROWS", 5)  # several pieces of a block
    monkeypatch.setattr(streams, "_PACKED_ROWS", 2)
    whole = stream_of(files, template, weight=weight, packed=packed, buffer=buffer)
    expected, positions = [], [START]
    for item in whole.items():
        expected.append(key(item))
        positions.append(whole.position)
        if whole.position.number_of_pass == 2:
            break
    for place in range(0, len(positions), 7):
        saved = position_of(json.loads(json.dumps(positions[place].as_json())))
        again = stream_of(files, template, weight=weight, packed=packed, buffer=buffer)
        items = list(map(key, islice(again.items(saved), 9)))
        assert items[: len(expected) - place] == expected[place : place + 9]
        reached = positions[min(place + 9, len(positions) - 1)]
        if place + 9 < len(positions):
            assert again.position == reached


def a_pass(stream: ExampleStream) -> list[Item]:
    return [
        item
        for item, _ in zip(
            stream.items(), iter(lambda: stream.position.number_of_pass, 1), strict=False
        )
    ]


def test_a_pass_holds_every_row_once_in_a_seeded_order(files: Path, template: ChatTemplate) -> None:
    given = [e.location for item in a_pass(stream_of(files, template)) for e in item.examples]
    dialogues = [location for location in given if "e.jsonl" not in location]
    assert len(dialogues) == len(set(dialogues)) == 112
    assert len({location for location in given if "e.jsonl" in location}) == 8
    other = [
        e.location for item in a_pass(stream_of(files, template, seed=1)) for e in item.examples
    ]
    assert sorted(other) == sorted(given)
    moved = sum(abs(a - b) for a, b in zip(map(given.index, other), range(len(given)), strict=True))
    assert moved > 112 * 5


def test_weights_say_how_often_a_row_is_seen(tmp_path: Path, template: ChatTemplate) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row(n) for n in range(400)])
    for weight, low, high in ((0.5, 160, 240), (2.0, 800, 800), (1.25, 460, 540)):
        number = len(a_pass(stream_of(path, template, weight=weight)))
        assert low <= number <= high


def test_packed_rows_hold_whole_documents_and_are_nearly_full(
    files: Path, template: ChatTemplate
) -> None:
    rows = a_pass(stream_of(files, template, packed=True, buffer=1000))
    assert all(item.tokens <= 64 for item in rows)
    alone = a_pass(stream_of(files, template, buffer=1000))
    assert sum(item.tokens for item in rows) == sum(item.tokens for item in alone)
    assert sum(item.tokens for item in rows) / (64 * len(rows)) > 0.9


def test_a_bad_row_stops_the_stream_or_is_counted(tmp_path: Path, template: ChatTemplate) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row(n) for n in range(60)])
    lines = path.read_text().splitlines()
    lines[41] = '{"prompt": "q", "response": null}'
    path.write_text("\n".join(lines))
    with pytest.raises(
        DataError, match=r"a\.jsonl:42: .*\n.*on_bad_row: skip leaves such rows out"
    ):
        a_pass(stream_of(path, template))
    skipping = stream_of(path, template, reading=Reading("skip", 0.05))
    assert len(a_pass(skipping)) == 59
    assert skipping.position.counts.bad == 1
    assert any("a.jsonl:42: " in line for line in skipping.position.counts.named)
    few = stream_of(path, template, reading=Reading("skip", 0.001))
    with pytest.raises(DataError, match=r"of 1,\d{3} rows so far cannot be used.*\n.*a\.jsonl:42"):
        list(islice(few.items(), 3000))


def test_unread_text_and_doubts_are_counted(tmp_path: Path, template: ChatTemplate) -> None:
    rows = [row(n) | {"remarks": "read me"} for n in range(5)]
    stream = stream_of(write_rows(tmp_path / "a.jsonl", rows), template)
    a_pass(stream)
    assert stream.position.counts.unread == {"remarks": 5}


def test_what_is_held_out_is_left_out(tmp_path: Path, template: ChatTemplate) -> None:
    from finetune.data.examples.dataset import load_examples

    train = write_rows(tmp_path / "a.jsonl", [row(n) for n in range(30)])
    dev = write_rows(tmp_path / "dev.jsonl", [row(n) for n in (3, 7, 100)])
    held_out = load_examples(
        [SourceSpec(str(dev))], template, LengthPolicy(64), cache_root=tmp_path / "cache"
    )
    stream = stream_of(train, template, held_out=held_out.stored.digests())
    assert len(a_pass(stream)) == 28
    assert stream.position.counts.dropped == {streams.HELD_OUT: 2}


def test_a_stream_without_an_example_ends(tmp_path: Path, template: ChatTemplate) -> None:
    rows = [{"prompt": "fox " * 200, "response": "answer"}]
    stream = stream_of(write_rows(tmp_path / "a.jsonl", rows), template)
    with pytest.raises(DataError, match=r"none of 1 rows of a whole pass is left to learn from"):
        next(stream.items())


def test_a_file_that_changes_is_named(tmp_path: Path, template: ChatTemplate) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row(1)])
    stream = stream_of(path, template)
    write_rows(path, [row(1), row(2)])
    with pytest.raises(DataError, match=r"a\.jsonl was changed or removed since this run began"):
        next(stream.items())


def test_the_fingerprint_follows_files_and_options(files: Path, template: ChatTemplate) -> None:
    same = stream_of(files, template).fingerprint
    assert stream_of(files, template, reading=Reading("skip")).fingerprint == same
    others = [
        stream_of(files, template, seed=1), stream_of(files, template, packed=True),
        stream_of(files / "a.jsonl", template), stream_of(files, template, buffer=18),
    ]  # fmt: skip
    assert same not in {other.fingerprint for other in others}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "training.max_steps: is needed with data.streaming"),
        ({"training.num_epochs": "2"}, "training.num_epochs: cannot be counted with data.streaming"),
        ({"data.validation": "5%"}, "data.validation: cannot be a share with data.streaming"),
        ({"data.deduplicate": "exact"}, "data.deduplicate: needs all rows"),
        ({"data.stop": "first"}, "data.stop: needs all rows"),
        ({"data.train": "[{path: a.jsonl, max_rows: 3}]"}, "max_rows: cannot be kept with data.streaming"),
    ],
)  # fmt: skip
def test_what_needs_all_rows_is_refused(
    tmp_path: Path, said: dict[str, str], expected: str
) -> None:
    settings = runs.config(tmp_path, tmp_path, tmp_path, data__streaming=True)
    del settings["training"]["max_steps"]
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(path, [f"{key}={value}" for key, value in said.items()])
    assert expected in str(error.value)


def steps_of(run_dir: Path) -> list[tuple[int, float, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"]) for r in lines if "loss" in r]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"), "glm4")


@pytest.mark.parametrize(("workers", "packing"), [(0, True), (2, False)])
def test_an_interrupted_run_on_a_stream_ends_as_an_uninterrupted_one(
    model: Path, files: Path, tmp_path: Path, workers: int, packing: bool
) -> None:
    settings: dict[str, Any] = {
        "data__streaming": True, "data__packing": packing, "data__shuffle_buffer": 17,
        "data__max_length": 64, "data__validation": str(files / "a.jsonl"), "evaluation__generate": False,
        "training__gradient_accumulation_steps": 2,
    }  # fmt: skip
    whole = runs.config(model, files, tmp_path / "whole", **settings)
    runs.run_here(whole)
    part = runs.config(
        model, files, tmp_path / "part", training__save_every_steps=2, **settings,
        data__loader_workers=workers,
    )  # fmt: skip
    runs.run_here(part)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "part" / f"checkpoint-{step}")
    runs.run_here(part)
    assert steps_of(tmp_path / "part") == steps_of(tmp_path / "whole")
    trained = [
        (tmp_path / name / "checkpoint-6/adapter_model.safetensors").read_bytes()
        for name in ("whole", "part")
    ]
    assert trained[0] == trained[1]
    described = json.loads((tmp_path / "part/data.json").read_text())
    assert described["train"] == json.loads((tmp_path / "whole/data.json").read_text())["train"]
    assert described["train"]["dropped"][streams.HELD_OUT] > 0
    assert described["validation"]["examples"] == 40


def test_a_bad_row_ends_the_run_with_its_place_even_from_a_loader_process(
    model: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row(n) for n in range(600)])
    lines = path.read_text().splitlines()
    lines[599] = '{"prompt": "q"}'
    path.write_text("\n".join(lines))
    settings = runs.config(
        model, path, tmp_path / "run", data__streaming=True, data__loader_workers=2, data__shuffle_buffer=300,
        training__batch_size=200,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"a\.jsonl:600") as error:
        runs.run_here(settings)
    assert "Traceback" not in str(error.value)
