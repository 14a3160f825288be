"""`finetune evaluate --votes`: what people preferred, with intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.cli import main
from finetune.errors import DataError
from finetune.evaluation.scores.votes import _sign_test, score_votes, wilson


def write(folder: Path, *votes: Any) -> Path:
    file = folder / "votes.jsonl"
    rows = [{"models": models, "winner": winner, "dialogue": dialogue} for models, winner, dialogue in votes]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_interval_is_wilsons_and_the_chance_that_of_a_coin() -> None:
    """Newcombe (1998) has 81 of 263: 0.2553 to 0.3662; 9 heads of 10 come with 22/1024."""
    assert [round(limit, 4) for limit in wilson(81 / 263, 263)] == [0.2553, 0.3662]
    assert [round(limit, 4) for limit in wilson(0.0, 20)] == [0.0, 0.1611]
    assert _sign_test([1.0] * 9 + [0.0] + [0.5] * 4) == 22 / 1024
    assert _sign_test([0.5]) == 1.0


def test_a_winner_among_several_beats_each_and_says_nothing_of_the_others(tmp_path: Path) -> None:
    duels = score_votes([write(tmp_path, (["c", "a", "b"], "b", "1"), (["a", "b"], None, "2"))])
    found = {(one.a, one.b): (one.wins, one.losses, one.ties) for one in duels}
    assert found == {("a", "b"): (0, 1, 1), ("b", "c"): (1, 0, 0)}


def test_many_votes_of_one_dialogue_count_as_one(tmp_path: Path) -> None:
    one = [(["a", "b"], "a", "same")] * 50
    [duel] = score_votes([write(tmp_path, *one)])
    assert (duel.wins, duel.dialogues, duel.verdict) == (50, 1, "no real difference")
    assert (duel.win_rate, round(duel.low, 1)) == (100.0, 20.7)
    [duel] = score_votes([write(tmp_path, *[(["a", "b"], "a", str(n)) for n in range(50)])])
    assert (duel.dialogues, duel.verdict) == (50, "better")


def test_wrong_lines_are_named_and_models_are_refused_beside_votes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, (["a", "b"], "a", "1"), (["a", "b"], "c", "2"))
    with pytest.raises(DataError, match=r"votes\.jsonl:2: `winner` is 'c'"):
        score_votes([file])
    with pytest.raises(DataError, match=r"votes\.jsonl:1: `models` must"):
        score_votes([write(tmp_path, (["a", "a"], "a", "1"))])
    file.write_text("{")
    with pytest.raises(DataError, match=r"votes\.jsonl:1: is no JSON"):
        score_votes([file])
    file.write_text("")
    with pytest.raises(DataError, match="no votes"):
        score_votes([file])
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "runs/x", "--votes", str(file)])
    assert end.value.code == 2
    assert "--votes scores what people said" in capsys.readouterr().err


@pytest.mark.parametrize(("ties", "lowest", "highest"), [(0.0, 0.92, 0.98), (0.3, 0.95, 1.0)])
def test_the_interval_of_votes_holds_the_truth(
    ties: float, lowest: float, highest: float, tmp_path: Path
) -> None:
    """Sixty dialogues, every third voted on twice alike; ties vary less than Wilson's interval takes them to."""
    chance, held, rounds = np.random.default_rng(0), 0, 300
    truth = 100 * (0.6 * (1 - ties) + 0.5 * ties)
    for _ in range(rounds):
        votes = []
        for dialogue in range(60):
            winner = None if chance.random() < ties else "a" if chance.random() < 0.6 else "b"
            votes += [(["a", "b"], winner, str(dialogue))] * (1 + (dialogue % 3 == 0))
        [duel] = score_votes([write(tmp_path, *votes)])
        held += duel.low <= truth <= duel.high
    assert lowest <= held / rounds <= highest


def test_votes_without_a_dialogue_are_of_one_each(tmp_path: Path) -> None:
    one = [(["a", "b"], "a", None)] * 6
    [duel] = score_votes([write(tmp_path, *one)])
    assert (duel.dialogues, duel.p, duel.verdict) == (6, 2 / 2**6, "better")


def test_chances_of_several_pairs_are_corrected_together(tmp_path: Path) -> None:
    pairs = [(["a", "b"], "a"), (["a", "c"], "a"), (["b", "c"], None)]
    votes = [(models, winner, str(n)) for models, winner in pairs for n in range(6)]
    found = {(one.a, one.b): (one.p, one.verdict) for one in score_votes([write(tmp_path, *votes)])}
    three = 3 * 2 / 2**6
    assert found == {
        ("a", "b"): (three, "no real difference"),
        ("a", "c"): (three, "no real difference"),
        ("b", "c"): (1.0, "no real difference"),
    }
