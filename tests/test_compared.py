"""What `evaluation.json` says of several targets: which are compared, part by part, and under which kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from finetune import console
from finetune.data.dialogue.conversation import Message
from finetune.evaluation import compared
from finetune.evaluation.compared import ScoredTarget
from finetune.evaluation.options import Options
from finetune.evaluation.predictions import Prediction, write_predictions
from finetune.evaluation.scores.metrics import numbers_of
from finetune.evaluation.scores.statistics import LossTable
from finetune.evaluation.targets import Target

Write = Callable[..., ScoredTarget]


def prediction(reply: str, place: str, message: int = 1, **slices: str) -> Prediction:
    said, wanted = Message("assistant", reply), Message("assistant", "the right answer")
    bare = Prediction(said, wanted, True, location=place, message=message, slices=slices)
    scores, counts = numbers_of(bare)
    return replace(bare, scores=scores, counts=counts)


@pytest.fixture
def scored(tmp_path: Path) -> Write:
    def write(name: str, rows: Sequence[Prediction], kind: str = "predictions") -> ScoredTarget:
        file = tmp_path / f"{name}.jsonl"
        write_predictions(file, rows)
        return ScoredTarget(Target(name, str(file), cast("Any", kind)), None, file, Options())

    return write


def test_targets_are_compared_when_they_answered_the_same_message_of_the_same_rows(
    scored: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    one = scored("one", [prediction("a", "f:1"), prediction("b", "f:1", 3)])
    same = scored("same", [prediction("c", "f:1"), prediction("d", "f:1", 3)])
    assert compared._on_the_same([one, same])
    assert said == []
    for name, other in (("reply", ("f:1", 5)), ("row", ("f:2", 3)), ("order", ("f:1", 1))):
        odd = scored(name, [prediction("c", "f:1"), prediction("d", *other)])
        assert not compared._on_the_same([one, same, odd]), name
        assert said.pop().startswith(f"{name}: other replies than of one")
    assert not compared._on_the_same([one, scored("fewer", [prediction("c", "f:1")])])


def test_a_slice_has_two_to_a_hundred_values(scored: Write) -> None:
    rows = [
        prediction("the right answer" if n % 2 else "no", f"f:{n}", source="f", category=f"c{n % 2}",
                   turns="" if n else "1", kind=f"k{n % 100}", language=f"l{n}")
        for n in range(101)
    ]  # fmt: skip
    found = compared._slices([scored("one", rows), scored("two", rows)])
    assert found.keys() == {"category", "kind"}
    assert [found["category"][name]["two"]["exact_match"].value for name in ("c0", "c1")] == [
        0,
        100,
    ]
    assert found["category"]["c1"]["one"]["exact_match"].n == 50


def test_examples_that_only_one_target_has_are_not_compared(scored: Write) -> None:
    rows = [prediction("no", "f:1"), prediction("the right answer", "f:2")]
    first, later = scored("first", rows), scored("later", rows[::-1])
    later.places = first.places
    losses = np.array([1.0, 2.0]), np.ones(2)
    first.losses["loss"], later.losses["loss"] = (
        LossTable(*losses),
        LossTable(losses[0] * 2, losses[1]),
    )
    names = {(one.a, one.b, one.metric) for one in compared._comparisons([first, later])}
    assert ("later", "first", "loss") in names, "the later one beside the earlier"
    assert ("later", "first", "rouge-l") in names
    later.losses["loss"] = LossTable(np.ones(3), np.ones(3))
    assert "loss" not in {one.metric for one in compared._comparisons([first, later])}


@pytest.mark.parametrize(
    ("kind", "said"), [("adapter", "adapter"), ("prefix", "adapter"), ("model", "model"), ("base", "model")]
)  # fmt: skip
def test_a_prefix_is_an_adapter_and_all_else_a_model(scored: Write, kind: str, said: str) -> None:
    one = scored("x", [prediction("no", "f:1")], kind)
    evaluation = cast("Any", SimpleNamespace(settings={"a": 1}))
    alone = compared.single(one, evaluation)
    assert (alone["kind"], alone["base"], alone["settings"]) == (
        "predictions",
        None,
        {"a": 1, "dtype": ""},
    )
    one.job = cast("Any", SimpleNamespace(results=SimpleNamespace(facts={"dtype": "torch.bfloat16"}), base="b"))  # fmt: skip
    one.losses["loss"] = LossTable(np.array([3.0, 1.0]), np.array([1.0, 3.0]))
    found = compared.single(one, evaluation)
    assert (found["kind"], found["base"], found["settings"]["dtype"]) == (said, "b", "bfloat16")
    assert (found["scores"]["loss"], found["supervised_tokens"], found["replies"]) == (1.0, 4.0, 1)


def test_the_files_of_the_data_are_told_with_their_hash_and_replies(scored: Write, tmp_path: Path) -> None:  # fmt: skip
    data = tmp_path / "dev.jsonl"
    data.write_text("{}\n")
    rows = [prediction("a", "x:1", source=str(data)), prediction("b", "x:2", source="gone.jsonl"), prediction("c", "x:3", source=str(data))]  # fmt: skip
    found = compared._data(scored("one", rows), [])
    assert [(one.path, one.samples, bool(one.fingerprint)) for one in found] == [(str(data), 2, True), ("gone.jsonl", 1, False)]  # fmt: skip
    elsewhere = scored("two", [prediction("a", "")])
    [one] = compared._data(elsewhere, [elsewhere.file])
    assert (one.path, one.samples, len(one.fingerprint)) == (str(elsewhere.file), 1, 64)
    [one] = compared._data(elsewhere, [])
    assert (one.path, one.fingerprint) == ("", "")
