"""Attacks on runs: ranks that are killed again and again, one that is stopped, a clock that goes back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import runs
from forks import in_ranks

from finetune.distributed import watchdog
from finetune.storage import folders
from finetune.training.trainer import FineTuner


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_dialogues(tmp_path_factory.mktemp("data") / "train.jsonl", 9)


def at_step(number: int, act: Any) -> None:
    """In this process `act` is called before this step."""
    step = FineTuner.training_step

    def stepping(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == number - 1:
            act()
        return step(self, *arguments, **options)

    FineTuner.training_step = stepping  # type: ignore[method-assign]


def outcome(settings: dict[str, Any]) -> str:
    """What became of a run of several processes, in words."""
    watchdog.SILENCE, watchdog.BEAT = 1.0, 0.1  # a test need not wait for so long
    try:
        return f"{runs.run_here(settings)['steps']} steps"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def test_a_run_whose_process_is_killed_in_two_attempts_ends_in_the_bits_of_one_that_is_left_alone(
    tiny_glm: Path, data: Path, tmp_path: Path
) -> None:
    """As under `torchrun --max-restarts=2`."""
    for name, killed_at in {"run": (3, 5, None), "whole": (None,)}.items():
        settings = runs.config(
            tiny_glm, data, tmp_path / name, training__save_every_steps=1, training__max_steps=6,
            training__process_timeout_minutes=0.5,
        )  # fmt: skip
        for attempt, step in enumerate(killed_at):

            def work(
                rank: int, attempt: int = attempt, step: int | None = step,
                settings: dict[str, Any] = settings,
            ) -> str:  # fmt: skip
                os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
                if rank == 1 and step is not None:
                    at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
                return outcome(settings)

            first, second = in_ranks(2, work, joined=False)
            if step is None:
                assert (first, second) == ("6 steps", "6 steps")
                continue
            assert second == f"ended with {-signal.SIGKILL}"
            assert first.startswith("ProcessError: process 1 is gone without a word"), first
            saved = sorted(path.name for path in (tmp_path / name).glob("checkpoint-*"))
            assert saved[-1] == f"checkpoint-{step - 1}"
    assert runs.history(tmp_path / "run") == runs.history(tmp_path / "whole")
    assert runs.adapter_hash(tmp_path / "run", 6) == runs.adapter_hash(tmp_path / "whole", 6)


def test_a_process_that_is_stopped_for_good_ends_the_others_and_one_that_goes_on_ends_nothing(
    tiny_glm: Path, data: Path, tmp_path: Path
) -> None:
    for name, minutes in (("gone", 0.05), ("back", 0.5)):
        settings = runs.config(
            tiny_glm, data, tmp_path / name, training__max_steps=3,
            training__process_timeout_minutes=minutes,
        )  # fmt: skip
        stopped = tmp_path / f"{name}.pid"

        def work(
            rank: int, name: str = name, stopped: Path = stopped, settings: dict[str, Any] = settings
        ) -> str:  # fmt: skip
            def stop() -> None:
                stopped.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)

            def go_on() -> None:
                while not (stopped.exists() and stopped.read_text()):
                    time.sleep(0.01)
                time.sleep(2.5)  # longer than SILENCE
                os.kill(int(stopped.read_text()), signal.SIGCONT)

            if rank == 1:
                at_step(2, stop)
            elif name == "back":
                at_step(2, go_on)
            found = outcome(settings)
            if rank == 0 and name == "gone":
                os.kill(int(stopped.read_text()), signal.SIGKILL)
            return found

        first, second = in_ranks(2, work, joined=False)
        if name == "back":
            assert (first, second) == ("3 steps", "3 steps")
        else:
            assert first.startswith("ProcessError: process 1 is gone without a word"), first
            assert second == f"ended with {-signal.SIGKILL}"


def test_a_clock_that_is_set_back_during_a_run_changes_nothing_of_it(
    tiny_glm: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(name: str) -> dict[str, Any]:
        return runs.config(
            tiny_glm, data, tmp_path / name, training__max_steps=4, training__save_every_steps=1,
            training__keep_checkpoints=1, data__validation=str(data), evaluation__every_steps=2,
            evaluation__generate=False,
        )  # fmt: skip

    plain = runs.run_here(settings("plain"))
    now = [time.time()]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", back)
    found = runs.run_here(settings("back"))
    for key in ("steps", "train_loss", "scores"):
        assert found[key] == plain[key]
    assert found["seconds"] > 0
    assert [path.name for path in (tmp_path / "back").glob("checkpoint-*")] == ["checkpoint-4"]
    assert folders.verify(tmp_path / "back/checkpoint-4") == []
    assert runs.adapter_hash(tmp_path / "back", 4) == runs.adapter_hash(tmp_path / "plain", 4)
    for key in ("tokens_per_second", "seconds_per_step"):
        assert min(runs.history(tmp_path / "back", key)) > 0
