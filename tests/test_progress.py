"""What a run says of its own speed."""

from __future__ import annotations

import pytest


def test_evaluations_that_take_more_than_a_twentieth_of_the_time_are_named_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.training.callbacks import progress

    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = progress.ProgressCallback()
    bar.throughput.start()
    bar.throughput.steps = 10
    clock[0] += 20  # two seconds a step

    def evaluated(seconds: float, every: int | None) -> str:
        with bar.silent():
            clock[0] += seconds
        bar.say_if_too_often(every)
        return capsys.readouterr().out

    assert evaluated(29, 1) == ""  # too short to matter
    assert evaluated(40, 380) == ""  # 40 of 800 seconds
    assert evaluated(40, None) == ""
    said = evaluated(40, 100)
    assert "17 % of the time at evaluation.every_steps=100; 380 would make it 5 %" in said
    assert evaluated(40, 100) == ""
