"""Several processes: weights gathered once for an evaluation, failures that no exception tells of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import outcome_of

from finetune.distributed import position

SCRIPT = Path(__file__).with_name("rank_runs.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return outcome_of(SCRIPT, tmp_path_factory.mktemp("ranks"), timeout=600)


def test_under_zero_3_no_token_of_a_reply_gathers_a_weight(found: dict[str, Any]) -> None:
    whole, in_parts, stage_2 = (found["gathers"][name] for name in ("whole", "in parts", "stage 2"))
    for run in (whole, in_parts, stage_2):
        assert run["codes"] == [0, 0], run["said"]
        assert run["counts"][0]["tokens"] > 0
    assert [counts["gathers"] for counts in whole["counts"]] == [0, 0]
    assert all(counts["around"] > 0 for counts in whole["counts"])  # once for each evaluation
    assert all(counts["gathers"] > 0 for counts in in_parts["counts"])  # what is counted is there
    # Scores and what is learnt afterwards do not depend on how weights were gathered.
    assert whole["scores"] == in_parts["scores"]
    assert whole["losses"] == in_parts["losses"]
    assert whole["losses"] == pytest.approx(stage_2["losses"], rel=1e-6)
    assert "gathers its weights layer by layer" in "".join(in_parts["said"])
    assert "layer by layer" not in "".join(whole["said"])


@pytest.mark.parametrize(("method", "stage"), [("full", 2), ("full", 3), ("experts", 2)])
def test_a_mixture_learns_in_two_processes_what_it_learns_in_one(
    found: dict[str, Any], method: str, stage: int
) -> None:
    alone, both = (found["mixtures"][f"mixture {method} {number}"] for number in (0, stage))
    assert both["codes"] == [0, 0], both["said"]
    assert both["tensors"] == alone["tensors"] > 0
    assert both["far"] < 1e-5
    # Losses, and which experts the tokens of all processes took.
    for ours, theirs in zip(both["logged"], alone["logged"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("is killed", "process 1 is gone without a word"),
        ("raises", "process 1 failed: ValueError: broken on purpose"),
        ("hangs", "process 1 is hanging: the others have waited 0.05 minutes"),
    ],
)
def test_a_failure_is_named_though_the_backend_waits_for_ever(
    found: dict[str, Any], fault: str, said: str
) -> None:
    run = found["failures"][fault]
    assert run["codes"][0] == 1, run
    assert run["codes"][1] != 0
    assert f"error: {said}" in run["said"][0]
    if fault == "hangs":
        assert f"error: {said}" in run["said"][1]


def test_only_waiting_for_the_device_counts_as_waiting() -> None:
    assert position.waited() == 0.0
    before = position.passed()
    with position.waiting_for_device():
        assert position.waited() > 0.0
        assert position.passed() == before + 1
    assert position.waited() == 0.0


@pytest.mark.parametrize(
    ("run", "whole"),
    [("2 x 2", "whole rows"), ("4 and 1", "whole rows"), ("full, ZeRO-3", "full"), ("prefix, 2", "prefix")],
)  # fmt: skip
def test_processes_that_share_their_rows_train_what_one_process_trains(
    found: dict[str, Any], run: str, whole: str
) -> None:
    shared, alone = found["split rows"][run], found["split rows"][whole]
    assert set(shared["codes"]) == {0}, shared["said"]
    last = alone["losses"][-len(shared["losses"]) :]
    assert shared["losses"] == pytest.approx(last, rel=1e-6)
    assert shared["far"] < 1e-5  # of the trained weights
