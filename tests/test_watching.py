"""An evaluation beside training: again for every new checkpoint, until the run is over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.errors import ConfigError, ModelError
from finetune.report import watching

RUN = "runs/lora"


class Training:
    """A run as it looks at every look: whether it trains, and which checkpoints there are."""

    def __init__(self, looks: list[tuple[bool, list[str]]], patch: pytest.MonkeyPatch) -> None:
        self.looks, self.slept = looks, 0
        patch.setattr(watching, "read_status", lambda _: SimpleNamespace(state="running" if looks[0][0] else "done"))  # fmt: skip
        patch.setattr(watching, "_good", lambda _: looks[0][1])
        patch.setattr(watching.time, "sleep", self.next)

    def next(self, _: float) -> None:
        self.slept += 1
        self.looks.pop(0)


def test_every_new_checkpoint_is_evaluated_once_and_the_last_after_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = [(True, []), (True, ["a"]), (True, ["a"]), (False, ["a", "b"])]
    training = Training(looks, monkeypatch)
    asked: list[list[str]] = []
    assert watching.until_over([RUN], lambda models: asked.append(models) or len(asked)) == 2  # type: ignore[func-returns-value]
    assert asked == [["a"], ["a", "b"]]
    assert training.slept == 3


def test_a_checkpoint_that_is_rotated_away_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    new.mkdir()
    training = Training([(True, [str(old), str(new)]), (False, [str(new)])], monkeypatch)

    def evaluate(models: list[str]) -> str:
        if str(old) in models:
            training.next(0)
            raise ModelError("old: no file")
        return "made"

    assert watching.until_over([RUN], evaluate) == "made"
    training.looks[:] = [(True, [str(new)])]

    def fails(models: list[str]) -> str:
        raise ModelError("new: broken")

    with pytest.raises(ModelError, match="broken"):
        watching.until_over([RUN], fails)


def test_a_run_that_nobody_trains_and_that_has_no_checkpoint_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Training([(False, [])], monkeypatch)
    with pytest.raises(ConfigError, match="runs/lora has no checkpoint"):
        watching.until_over([RUN], lambda _: None)
