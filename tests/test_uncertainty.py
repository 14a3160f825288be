"""Intervals hold what they promise, and a difference is real exactly when chance cannot make it."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.evaluation.scores import statistics, texts
from finetune.evaluation.scores.statistics import (
    LossTable,
    Measure,
    ReplyTable,
    compare,
    holm,
    intervals,
)


def means(values: np.ndarray, *names: str) -> Measure:
    """Scores that are means over units."""
    columns = values.reshape(len(values), -1)
    numbers = np.hstack([columns, np.ones((len(values), 1))])
    return Measure(names or ("score",), numbers, lambda sums: sums[:, :-1] / sums[:, -1:])


def coverage(draw, truth: float, *, rounds: int = 400) -> float:
    """How often the interval of a fresh sample holds the true value."""
    hits = 0
    for number in range(rounds):
        [(low, high)] = intervals(draw(np.random.default_rng(number)), seed=number, resamples=400)
        hits += low <= truth <= high
    return hits / rounds


# 400 rounds: three standard errors of 0.95 are 0.033. The percentile interval of 80 skewed values
# covers about 0.935; one that is half as wide as it should be covers 0.67.


@pytest.mark.parametrize(
    ("kind", "truth"), [("hits", 0.7), ("skewed", 1.0)], ids=["exact match", "skewed scores"]
)
def test_a_95_percent_interval_holds_the_truth_in_95_percent_of_samples(
    kind: str, truth: float
) -> None:
    def draw(chance: np.random.Generator) -> Measure:
        values = chance.random(80) < truth if kind == "hits" else chance.exponential(truth, 80)
        return means(values.astype(float))

    assert 0.91 <= coverage(draw, truth) <= 0.98


def test_the_interval_of_a_ratio_of_sums_holds_the_truth_too() -> None:
    # The loss: examples of unlike length, long ones with a higher loss per token.
    def draw(chance: np.random.Generator) -> Measure:
        tokens = chance.integers(5, 100, 80)
        losses = tokens * (1 + tokens / 100) + chance.normal(0, 5, 80)
        return LossTable(losses, tokens.astype(float), source="general_loss").measure()

    lengths = np.arange(5, 100)
    truth = float((lengths * (1 + lengths / 100)).sum() / lengths.sum())
    assert 0.91 <= coverage(draw, truth) <= 0.98


def test_replies_of_one_dialogue_are_resampled_together() -> None:
    # Ten replies of a dialogue that all say the same: 40 dialogues, not 400 samples.
    def draw(chance: np.random.Generator, *, apart: bool) -> Measure:
        table = ReplyTable()
        for dialogue, value in enumerate(chance.random(40)):
            for turn in range(10):
                location = f"{dialogue}-{turn}" if apart else str(dialogue)
                table.add(location, {"exact_match": 100.0 * value}, NO_COUNTS)
        whole = table.measure()
        column = whole.names.index("exact_match")
        return Measure(("exact_match",), whole.units, lambda sums: whole.scores(sums)[:, [column]])

    together = coverage(lambda chance: draw(chance, apart=False), 50.0, rounds=150)
    assert 0.89 <= together <= 0.99
    assert coverage(lambda chance: draw(chance, apart=True), 50.0, rounds=150) < 0.6


NO_COUNTS = {"corpus_bleu": [0] * 10, "chrf": [0] * 18, "length_ratio": [1, 1]}


def test_a_permutation_test_finds_a_difference_by_chance_as_often_as_it_says() -> None:
    found = 0
    for number in range(300):
        chance = np.random.default_rng(number)
        common = chance.normal(50, 20, 60)
        models = [means(common + chance.normal(0, 5, 60)) for _ in range(2)]
        [one] = compare(models, seed=number, resamples=10, permutations=199)
        found += one.p < 0.05
    assert 0.015 <= found / 300 <= 0.09


def test_p_is_the_share_of_all_swaps_that_differ_as_much() -> None:
    # Differences 3, 2, 1, 0.5: of 16 signings, |sum| >= 6.5 holds for all plus and all minus.
    a, b = means(np.array([3.0, 2.0, 1.0, 0.5])), means(np.zeros(4))
    [one] = compare([b, a], permutations=20_000)
    assert (one.a, one.b, one.difference) == (1, 0, 1.625)
    assert one.p == pytest.approx(2 / 16, abs=0.01)
    assert one.verdict == "no real difference"


def test_paired_samples_tell_apart_what_single_intervals_cannot() -> None:
    chance = np.random.default_rng(0)
    hard = chance.normal(50, 25, 100)
    base, tuned = means(hard), means(hard + chance.normal(2, 3, 100))
    [(low, high)], [(tuned_low, tuned_high)] = intervals(base), intervals(tuned)
    assert max(low, tuned_low) < min(high, tuned_high)  # they overlap
    [one] = compare([base, tuned])
    assert one.verdict == "better"
    assert 0 < one.low < one.difference < one.high


def test_lower_is_better_where_it_is_and_neither_for_the_length() -> None:
    chance = np.random.default_rng(0)
    low, high = chance.normal(1, 0.1, (50, 3)), chance.normal(2, 0.1, (50, 3))
    names = ("loss", "rouge-l", "length_ratio")
    found = compare([means(low, *names), means(high, *names)])
    assert [(one.metric, one.verdict) for one in found] == [
        ("loss", "worse"),
        ("rouge-l", "better"),
    ]


def test_many_models_are_judged_more_strictly() -> None:
    # By hand: 0.005 x 4, then 0.01 x 3, 0.03 x 2, and 0.04 may not fall below the one before.
    assert holm([0.03, 0.005, 0.04, 0.01]) == pytest.approx([0.06, 0.02, 0.06, 0.03])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    chance = np.random.default_rng(3)
    common = chance.normal(0, 1, 40)
    models = [means(common + chance.normal(0, 1, 40)) for _ in range(12)]
    found = compare(models, permutations=999)
    assert len(found) == 66
    assert any(one.p < 0.05 for one in found)
    assert {one.verdict for one in found} == {"no real difference"}


def test_a_score_that_does_not_exist_has_no_interval_and_is_not_compared() -> None:
    table = ReplyTable()
    for number in range(5):
        table.add(str(number), {"exact_match": 100.0, "tool_call_name": None}, NO_COUNTS)
    scores = table.described()
    assert "tool_call_name" not in scores
    assert scores["exact_match"] == {"value": 100.0, "low": 100.0, "high": 100.0, "n": 5}
    assert {one.metric for one in compare([table.measure(), table.measure()])} == {
        "exact_match", "corpus_bleu", "chrf",
    }  # fmt: skip


def test_equal_models_do_not_differ_and_blocks_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = means(np.random.default_rng(0).random(30))
    [same] = compare([one, one])
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1.0)
    wide = intervals(one)
    monkeypatch.setattr(statistics, "_BLOCK", 7 * 30)
    assert intervals(one) == wide


def test_corpus_scores_of_sums_are_those_of_sacrebleu() -> None:
    from sacrebleu.metrics import BLEU, CHRF

    chance = np.random.default_rng(0)
    for _ in range(60):
        pairs = [
            [list(chance.choice(list("abcd"), chance.integers(least, 9))) for least in (0, 1)]
            for _ in range(chance.integers(1, 5))
        ]
        bleu = np.sum([texts.bleu_counts(*pair) for pair in pairs], axis=0, dtype=float)
        chrf = np.sum([texts.chrf_counts(*map("".join, pair)) for pair in pairs], axis=0, dtype=float)  # fmt: skip
        replies, references = ([" ".join(pair[i]) for pair in pairs] for i in (0, 1))
        theirs = (
            BLEU(tokenize="none", force=True, effective_order=True)
            .corpus_score(replies, [references])
            .score
        )
        assert texts.bleu_of(bleu[None])[0] == pytest.approx(theirs, abs=1e-9)
        replies, references = (["".join(pair[i]) for pair in pairs] for i in (0, 1))
        theirs = CHRF().corpus_score(replies, [references]).score
        assert texts.chrf_of(chrf[None])[0] == pytest.approx(theirs, abs=1e-9)
