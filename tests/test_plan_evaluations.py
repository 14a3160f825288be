"""What evaluations during a run will take: what is asked of the held-out rows, and the seconds of it by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rows import turns, write_rows
from test_plan_parts import PLAN

from finetune.config.schema import DataSection, EvaluationSection, ModelSection
from finetune.planning import evaluating
from finetune.planning.evaluating import HeldOut, planned_evaluation

MODEL = ModelSection(path="m")
DATA = DataSection(train=[], validation=["d"], max_length=100)


@pytest.mark.parametrize(
    ("gpus", "batch", "replies", "rounds"),
    [(8, 64, 1000, 2), (1, 64, 1000, 16), (8, "auto", 1000, 2), (8, 32, 1000, 4), (4, 64, 1, 1), (1, 64, 0, 0), (1, 64, 65, 2)],
)  # fmt: skip
def test_batches_go_round_the_gpus_and_each_token_reads_all_weights(
    monkeypatch: pytest.MonkeyPatch, gpus: int, batch: Any, replies: int, rounds: int
) -> None:
    monkeypatch.setattr(evaluating, "_held_out", lambda *_: HeldOut(replies, 30_000, 10_000))
    plan = replace(PLAN, gpu=replace(PLAN.gpu, number=gpus))
    section = EvaluationSection(max_new_tokens=10, batch_size=batch, every_steps=7)
    found = planned_evaluation(plan, MODEL, DATA, section)
    assert found is not None
    reading = 2 * 9.4e9 * 40_000 / (1e15 * 0.5 * gpus)
    one_token = 18.8e9 / (2.7e12 * 1e15 / 989e12)
    assert found.seconds == pytest.approx(reading + 10 * rounds * one_token)
    assert found.between == 7 * 8.0
    small = replace(plan, parameters=1_000_000)
    other = planned_evaluation(small, MODEL, DATA, section)
    assert other is not None
    assert other.seconds == pytest.approx(reading + 10 * rounds * 25 * 40 * 2.5e-6), "launches"


def test_an_evaluation_comes_as_often_as_is_said_or_once_in_all_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluating, "_held_out", lambda *_: HeldOut(1, 1, 1))
    section = EvaluationSection()
    for plan, every, between in ((PLAN, 7, 56.0), (PLAN, None, 4800.0), (replace(PLAN, steps=None), None, None)):  # fmt: skip
        found = planned_evaluation(plan, MODEL, DATA, section.model_copy(update={"every_steps": every}))  # fmt: skip
        assert found is not None
        assert found.between == between
    monkeypatch.setattr(evaluating, "_held_out", lambda *_: None)
    assert planned_evaluation(PLAN, MODEL, DATA, section) is None


def held(file: Path, *, sees: bool = False, max_length: int = 1000, **section: Any) -> Any:
    data = DataSection(train=[], validation=[str(file)], max_length=max_length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluating, "_sees_images", lambda _: sees)
        return evaluating._held_out(MODEL, data, EvaluationSection(**{"max_samples": None} | section))  # fmt: skip


def test_replies_and_tokens_are_counted_from_the_rows(tmp_path: Path) -> None:
    rows = [{"messages": turns("a", "b", "c", "d")}, {"messages": turns("a" * 90, "b")}, {"prompt": "a", "response": "b"}]  # fmt: skip
    file = write_rows(tmp_path / "d.jsonl", rows)
    tokens = -(-file.stat().st_size // 3)
    assert held(file) == HeldOut(4, tokens, tokens)
    assert held(file, replies="last_reply") == HeldOut(3, tokens, tokens * 3 // 4)
    assert held(file, max_samples=2) == HeldOut(2, tokens, tokens * 2 // 4)
    assert held(file, max_samples=9) == HeldOut(4, tokens, tokens)
    assert held(file, generate=False) == HeldOut(0, tokens, 0)
    assert held(file, max_length=10) == HeldOut(4, 30, 30), "a row has max_length at most"
    assert held(file, sees=True) == HeldOut(4, 3000, 3000), "an image has no bytes here"


def test_what_cannot_be_counted_here_is_not_planned(tmp_path: Path) -> None:
    assert held(tmp_path / "gone.jsonl") is None
    section = EvaluationSection()
    assert evaluating._held_out(MODEL, DataSection(train=[]), section) is None
    away = DataSection(train=[], validation=["hf://some/where"])
    assert evaluating._held_out(MODEL, away, section) is None


@pytest.mark.parametrize(
    ("row", "replies"),
    [
        ({"messages": turns("a", "b", "c", "d")}, 2), ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, 1),
        ({"messages": "none", "conversations": [{"role": "assistant"}] * 3}, 3), ({"text": "a"}, 1), ({"messages": []}, 1), ({"messages": ["x", {"role": "user"}]}, 1),
    ],
)  # fmt: skip
def test_a_row_has_as_many_replies_as_the_assistant_says(row: dict[str, Any], replies: int) -> None:
    assert evaluating._replies(row) == replies
