"""Which rows a run prepares, with which options, and in which order: held out, kept, trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from finetune.config.forgetting import KeepSection
from finetune.config.schema import DataSection, ModelSection, TrainingSection
from finetune.training.loading import prepare_data

MODEL = ModelSection(path="org/name", revision="main")
TRAINING = TrainingSection(output_dir="x", seed=5)


class Rows:
    """Prepared examples of some sources."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.counts = names, f"counts of {names}"
        self.lengths = np.array([4, 9])
        self.stored = SimpleNamespace(digests=lambda: f"digests of {names}")

    def __len__(self) -> int:
        return 2


class Bench:
    """`load_run_data` among neighbours that note what they are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Any] = []
        self.prepared: list[dict[str, Any]] = []
        told = self.events.append
        monkeypatch.setattr(prepare_data, "check_no_adapter", lambda path: told(f"checked {path}"))
        monkeypatch.setattr(prepare_data, "load_chat_tokenizer", lambda *given: f"of {given}")
        monkeypatch.setattr(prepare_data, "ChatTemplate", lambda tokenizer: tokenizer)
        monkeypatch.setattr(prepare_data, "load_examples", self._load)
        monkeypatch.setattr(prepare_data, "replay_of", self._replay)
        monkeypatch.setattr(prepare_data, "report", lambda kind, counts, number: told((kind, counts, number)))  # fmt: skip
        monkeypatch.setattr(prepare_data, "check_overlap", lambda train, held, most: told((train.names, held.names, most)))  # fmt: skip
        monkeypatch.setattr(prepare_data, "pack", lambda *given: told(("packed", *given[1:])))
        monkeypatch.setattr(prepare_data, "PackedDataset", lambda rows, packs: rows)
        monkeypatch.setattr(prepare_data, "shards_of", lambda sources: [s.path for s in sources])
        monkeypatch.setattr(prepare_data, "ExampleStream", lambda *given, **named: (given, named))
        monkeypatch.setattr(prepare_data, "StreamSample", lambda stream: Rows(["sample"]))

    def _load(self, sources: Any, template: str, policy: Any, **options: Any) -> Rows:
        rows = Rows([one.path for one in sources])
        self.prepared.append({"rows": rows, "template": template, "policy": policy, **options})
        return rows

    def _replay(self, *given: Any) -> Any:
        self.events.append(given[1:])
        return SimpleNamespace(replies=5, cut=1, train="replayed", held_out="not trained")


def section(**options: Any) -> DataSection:
    return DataSection(
        **{
            "train": "train.jsonl", "validation": "held.jsonl", "max_length": 64, "train_on": "last_reply",
            "on_too_long": "drop", "stop": "first", "temperature": 2.0, "max_overlap": 0.25,
            "cache_dir": "cache", "deduplicate": "exact",
        }
        | options
    )  # fmt: skip


def test_what_is_held_out_and_kept_is_prepared_before_what_is_trained_is_chosen_among(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(monkeypatch)
    found = prepare_data.load_run_data(
        section(replay={"prompts": "p.jsonl"}), TRAINING, MODEL, KeepSection(data="general.jsonl")
    )
    held, kept, train = bench.prepared
    names = [one["rows"].names for one in bench.prepared]
    assert names == [["held.jsonl"], ["general.jsonl"], ["train.jsonl", "replayed"]]
    for one in bench.prepared:
        assert one["template"] == "of ('org/name', 'main')"
        assert (one["seed"], one["cache_root"]) == (5, Path("cache"))
        policy = one["policy"]
        assert (policy.max_length, policy.train_on, policy.on_too_long) == (64, "last_reply", "drop")  # fmt: skip
    for one in (held, kept):
        chosen = one["selection"]
        assert (chosen.deduplicate, chosen.held_out) == ("exact", None)
        assert chosen == type(chosen)(deduplicate="exact")
    chosen = train["selection"]
    assert (chosen.stop, chosen.temperature, chosen.deduplicate) == (
        "first",
        2.0,
        "exact",
    )
    assert chosen.held_out is held["rows"]
    assert bench.events == [
        "checked org/name",
        ("org/name", "main", "cache"),
        ("training", train["rows"].counts, 2),
        ("validation", held["rows"].counts, 2),
        (["train.jsonl", "replayed"], ["held.jsonl"], 0.25),
    ]
    assert (found.train, found.items, found.validation, found.kept) == (
        train["rows"], train["rows"], held["rows"], kept["rows"],
    )  # fmt: skip
    assert [one.path for one in found.validation_sources] == ["held.jsonl"]
    assert [one.path for one in found.kept_sources] == ["general.jsonl"]
    assert (found.max_length, found.template) == (64, "of ('org/name', 'main')")
    out = capsys.readouterr().out
    assert "5 replies of the untuned model, 1 left out" in out
    assert f"padding: {100 * found.plan.padding():.1f} %" in out


def test_rows_are_packed_up_to_the_length_of_an_example_by_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch)
    prepare_data.load_run_data(section(packing=True, validation=None), TRAINING, MODEL)
    assert ("packed", 64, 5) in bench.events
    assert len(bench.prepared) == 1
    assert bench.prepared[0]["selection"].held_out is None
    assert not [event for event in bench.events if event[0] == "validation"]


@pytest.mark.parametrize("validation", ["held.jsonl", None])
def test_a_stream_leaves_out_what_is_held_out_and_has_every_option(
    validation: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(monkeypatch)
    asked = section(
        streaming=True, validation=validation, shuffle_buffer=17, packing=True, deduplicate=None,
        stop=None, temperature=None,
    )  # fmt: skip
    keep = KeepSection(data="general.jsonl")
    monkeypatch.setattr(prepare_data.RunData, "size", lambda self: "a stream of 1 files")
    found: Any = prepare_data.load_run_data(asked, TRAINING, MODEL, keep)
    (shards, sources, template, settings), named = found.stream
    assert shards == ["train.jsonl"] == [one.path for one in sources]
    assert template == "of ('org/name', 'main')"
    assert (settings.seed, settings.shuffle_buffer, settings.packed) == (5, 17, True)
    assert settings.policy.max_length == 64
    assert named == {
        "held_out": "digests of ['held.jsonl']" if validation else None, "cache_root": Path("cache"),
    }  # fmt: skip
    assert found.kept.names == ["general.jsonl"]
    assert [one.path for one in found.kept_sources] == ["general.jsonl"]
    assert (
        "its first 2 examples the longest has 9 tokens, 6 on average"
    ) in capsys.readouterr().out
    reports = [event for event in bench.events if event[0] == "validation"]
    assert len(reports) == (validation is not None)
