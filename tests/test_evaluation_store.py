"""What an evaluation keeps is taken only when it is what was kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data.dialogue.conversation import Message
from finetune.evaluation import store
from finetune.evaluation.predictions import Prediction


def line(location: str) -> dict[str, Any]:
    said = Message("assistant", "yes")
    return Prediction(said, said, location=location).unscored_row


@pytest.mark.parametrize(("window", "kept"), [(1, 5), (2, 4), (4, 4)])
def test_what_a_kill_tore_of_kept_replies_is_cut_off(
    tmp_path: Path, window: int, kept: int
) -> None:
    results = store.Results(tmp_path, "key")
    with results.locked():
        results.journal(1).append(line(f"a.jsonl:{n}") for n in range(1, 6))
    part = results.folder / "answers.jsonl.part"
    lines = part.read_text("utf-8").splitlines(keepends=True)
    part.write_text("".join(lines) + lines[0][:20], "utf-8")
    assert results.num_kept(results.journal(window)) == kept
    assert part.read_text("utf-8") == "".join(lines[:kept])


@pytest.mark.parametrize("name", ["answers.jsonl", "done.json", "loss.npz", "scored-k.jsonl"])
def test_kept_results_that_are_not_what_was_kept_are_made_again(tmp_path: Path, name: str) -> None:
    scored: list[Path] = []

    def score(unscored: Path, output: Path) -> None:
        scored.append(output)
        output.write_bytes(unscored.read_bytes())

    def fill() -> store.Results:
        results = store.Results(tmp_path, "key")
        with results.locked():
            results.journal(1).append(line(f"a.jsonl:{n}") for n in range(3))
            results.write_losses("loss", np.ones(3), np.ones(3))
            results.finish({"replies": 3})
            results.scored("k", score)
        return results

    results = fill()
    results.scored("k", score)
    assert scored == [results.folder / "scored-k.jsonl"], "once"
    whole = (results.folder / name).read_bytes()
    assert results.facts == {"replies": 3}
    (results.folder / name).write_bytes(whole[: len(whole) // 2])
    if name == "loss.npz":
        assert results.losses("loss") is None
    elif name == "scored-k.jsonl":
        assert results.scored("k", score).read_bytes() == whole
    else:
        assert results.facts is None
    assert fill().facts == {"replies": 3}
    assert (results.folder / name).read_bytes() == whole


def test_kept_losses_run_no_code(tmp_path: Path) -> None:
    results = store.Results(tmp_path, "key")
    with results.locked():
        results.write_losses("loss", np.array([print], dtype=object), np.ones(1))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        results.losses("loss")


def test_what_a_killed_evaluation_left_is_swept_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[Path] = []
    monkeypatch.setattr(store.folders, "sweep", swept.append)
    results = store.Results(tmp_path, "key")
    with results.locked():
        assert swept == [results.folder]
