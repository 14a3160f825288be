"""Sums of units, chances, what was forgotten and votes, each by hand on few numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from finetune.evaluation.scores import forgetting, statistics
from finetune.evaluation.scores.forgetting import Criterion
from finetune.evaluation.scores.statistics import LossTable, Measure, ReplyTable, compare
from finetune.evaluation.scores.votes import wilson

# --- sums of units -----------------------------------------------------------------------------


def test_replies_of_one_dialogue_are_one_unit_and_a_dialogue_that_comes_again_another() -> None:
    counts = {"corpus_bleu": [0] * 10, "chrf": [0] * 18, "length_ratio": [1, 2]}
    found = ReplyTable(("own",))
    for location, own in (("a", 1.0), ("a", None), ("b", 3.0), ("a", 5.0)):
        found.add(location, {"own": own}, counts)
    assert list(found._units) == [0, 0, 1, 2]
    column = found.means.index("own")
    units = found.measure().units
    assert units[:, column].tolist() == [1, 3, 5]
    assert units[:, len(found.means) + column].tolist() == [1, 1, 1]
    assert units[:, -2:].tolist() == [[2, 4], [1, 2], [1, 2]]
    chosen = found.measure(np.array([False, True, True, True]))
    assert chosen.units[:, column].tolist() == [0, 3, 5]
    assert found.scores()["own"] == 3.0
    assert found.scores()["length_ratio"] == 50.0
    part = found.described(np.array([True, False, False, True]))
    assert (part["own"]["value"], part["own"]["n"], part["length_ratio"]["n"]) == (3.0, 2, 2)
    assert found.described(np.zeros(4, dtype=bool)) == {}
    assert found.described()["own"]["n"] == 3


def test_a_swap_that_leaves_a_score_undefined_says_nothing_against_chance() -> None:
    # Only the first unit of each model has the score: one swap in two leaves one of them without.
    def measure(values: list[list[float]]) -> Measure:
        def scores(sums: Any) -> Any:
            with np.errstate(invalid="ignore", divide="ignore"):
                return sums[:, :1] / sums[:, 1:]

        return Measure(("score",), np.array(values), scores)

    one, other = measure([[9.0, 1.0], [0.0, 0.0]]), measure([[0.0, 0.0], [1.0, 1.0]])
    [found] = compare([other, one], permutations=999)
    assert found.p == 1.0
    assert found.verdict == "no real difference"


def test_a_verdict_needs_a_chance_below_5_percent() -> None:
    for p, said in ((0.05, "no real difference"), (0.0499, "better"), (0.06, "no real difference")):
        assert statistics._verdict("rouge-l", 1.0, p) == said
    assert statistics._verdict("loss", 1.0, 0.01) == "worse"
    assert statistics._verdict("loss", -1.0, 0.01) == "better"
    assert statistics._verdict("rouge-l", -1.0, 0.01) == "worse"


def test_intervals_are_of_a_thousand_resamples_and_always_the_same() -> None:
    one = Measure(("s",), np.array([[n**1.3, 1.0] for n in range(40)]), lambda sums: sums[:, :1] / sums[:, 1:])  # fmt: skip
    [found] = statistics.intervals(one)
    assert statistics.intervals(one) == statistics.intervals(one, resamples=1000) == [found]
    assert statistics.intervals(one, seed=1) != [found]
    other = Measure(("s",), one.units + [[[-7.0, 0.0], [9.0, 0.0]][n % 2] for n in range(40)], one.scores)  # fmt: skip
    [pair] = compare([one, other])
    assert 0.05 < pair.p < 0.95
    assert [pair] == compare([one, other], resamples=1000, permutations=9999)


def test_a_described_mean_is_the_one_that_training_logs_to_the_last_digit() -> None:
    found = ReplyTable(("own",))
    for number, own in enumerate(np.random.default_rng(0).random(1001)):
        counts = {"corpus_bleu": [1] * 10, "chrf": [1] * 18, "length_ratio": [3, 7]}
        found.add(f"d:{number // 3}", {"own": own}, counts)
    described = found.described()
    for name in ("own", "chrf", "length_ratio"):
        assert described[name]["value"] == found.scores()[name], name


def test_the_observed_order_is_one_of_the_permutations() -> None:
    one = Measure(("s",), np.array([[100.0, 1.0]] * 30), lambda sums: sums[:, :1] / sums[:, 1:])
    other = Measure(("s",), np.array([[0.0, 1.0]] * 30), one.scores)
    [found] = compare([other, one], permutations=99)
    assert found.p == 1 / 100
    assert (found.low, found.high) == (100.0, 100.0)


def test_percentiles_leave_2_5_percent_on_each_side_and_what_is_no_number_out() -> None:
    drawn = np.array([[float(value), np.nan] for value in range(1001)] + [[np.inf, np.nan]])
    [(low, high), nothing] = statistics._percentiles(drawn)
    assert (low, high) == pytest.approx((25.0, 975.0))
    assert np.isnan(nothing).all()


def test_the_loss_is_over_all_tokens_and_a_set_without_any_is_0() -> None:
    found = LossTable(np.array([3.0, 0.0, 9.0]), np.array([1.0, 0.0, 3.0]))
    assert (found.loss, found.weight) == (3.0, 4.0)
    assert found.scores == {"loss": 3.0, "perplexity": pytest.approx(np.e**3)}
    assert found.described()["loss"]["n"] == 3
    assert LossTable(np.zeros(2), np.zeros(2)).loss == 0.0


# --- forgetting and votes ----------------------------------------------------------------------


def of(values: list[float], name: str) -> Measure:
    units = np.array([[value, 1.0] for value in values])
    return Measure((name,), units, lambda sums: sums[:, :1] / sums[:, 1:])


def test_not_worse_says_the_difference_with_its_interval_in_the_scores_own_direction() -> None:
    up = [1.0, 2.0, 3.0, 4.0] * 10
    found = forgetting.not_worse(of([v + 1 for v in up], "general_loss"), of(up, "general_loss"), "general_loss", 2.0)  # fmt: skip
    assert (found.difference, found.low, found.high) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))  # fmt: skip
    assert (found.p, found.margin) == (1 / 5000, 2.0)
    beyond = forgetting.not_worse(of([v + 3 for v in up], "general_loss"), of(up, "general_loss"), "general_loss", 2.0)  # fmt: skip
    assert (beyond.p, beyond.passes) == (1.0, False)
    better = forgetting.not_worse(of([v - 3 for v in up], "general_loss"), of(up, "general_loss"), "general_loss", 2.0)  # fmt: skip
    assert better.passes


def test_a_resample_without_a_score_does_not_speak_for_a_checkpoint() -> None:
    def scores(sums: Any) -> Any:
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[:, :1] / sums[:, 1:]

    rare = Measure(("x",), np.array([[100.0, 1.0], [0.0, 0.0]]), scores)
    found = forgetting.not_worse(rare, rare, "x", 5.0)
    assert 0.2 < found.p < 0.3, "a quarter of the resamples hold the second unit twice"


def test_a_checkpoint_is_judged_by_its_gain_and_by_the_margin_of_each_other_score() -> None:
    tuned = {"loss": of([1.0] * 20, "loss"), "general_loss": of([2.0] * 20, "general_loss"), "mmlu/acc": of([50.0] * 20, "mmlu/acc")}  # fmt: skip
    base = {"loss": of([2.0] * 20, "loss"), "general_loss": of([1.9] * 20, "general_loss"), "mmlu/acc": of([50.5] * 20, "mmlu/acc")}  # fmt: skip
    first, *others = forgetting.criteria_of(tuned, base, {"general_loss": 0.05, "mmlu/acc": 1.0})
    assert (first.metric, first.margin, first.difference) == ("loss", None, -1.0)
    assert [(one.metric, one.margin, one.passes) for one in others] == [
        ("general_loss", 0.05, False), ("mmlu/acc", 1.0, True),
    ]  # fmt: skip
    assert forgetting.p_of([first, *others]) == 1.0
    assert not Criterion("x", 1.0, 0.05).passes
    assert forgetting.gain(base["loss"], tuned["loss"], "loss").p == 1.0
    gone = forgetting.gain(tuned["loss"], base["loss"], "bleu-4")
    assert (gone.difference, gone.p) == (0.0, 1.0)


def test_an_interval_of_votes_stays_between_0_and_1() -> None:
    for number in range(1, 2000):
        low, high = wilson(0.0, number)
        assert low == pytest.approx(0.0, abs=1e-9)
        assert 0.0 <= low < high < 1.0, "not below 0 by a rounding, either"
        low, high = wilson(1.0, number)
        assert high == pytest.approx(1.0)
        assert 0.0 < low < high <= 1.0
