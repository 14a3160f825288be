"""What happens around steps: when is evaluated, saved and stopped, and what is written of it."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl

from finetune.config.schema import EvaluationSection, TrainingSection
from finetune.distributed.signals import StopFlag
from finetune.training.callbacks import schedule as module
from finetune.training.callbacks.schedule import (
    DataJson,
    MetricsFile,
    RunComplete,
    Schedule,
    StoppedIsSaved,
    TensorBoard,
    writers,
)

ARGS: Any = None


class Bench:
    """A schedule, and what it asked for."""

    def __init__(
        self, *, evaluates: bool = True, stopped: bool = False, weights_every: int | None = None,
        save_every: int = 3, **options: Any,
    ) -> None:  # fmt: skip
        self.asked: list[str] = []
        self.stop = StopFlag()
        if stopped:
            self.stop.agreed_signal = 15
        self.control = TrainerControl()
        section = EvaluationSection(**{"every_steps": 2} | options) if evaluates else None
        self.schedule = Schedule(
            section,
            training=TrainingSection(
                output_dir="x", save_every_steps=save_every, save_weights_every_steps=weights_every
            ),
            stop=self.stop,
            evaluate=self._evaluate,
            save_scores=lambda: self.asked.append("scores"),
            save_weights=lambda: self.asked.append("weights"),
        )
        self.scores = {"eval_loss": 1.0}

    def _evaluate(self) -> dict[str, float]:
        self.asked.append("evaluate")
        return self.scores

    def step(self, number: int, last: int = 9) -> set[str]:
        """What is to happen after this step."""
        self.schedule.on_step_end(ARGS, state(number, last), self.control)
        return self.wanted()

    def wanted(self) -> set[str]:
        names = ("evaluate", "save", "training_stop")
        return {name for name in names if getattr(self.control, f"should_{name}")} | set(self.asked)

    def begin(self, number: int, last: int = 9, scored: tuple[int, ...] = ()) -> list[str]:
        """What is done before the first step; `complete` where none is left."""
        try:
            self.schedule.on_train_begin(ARGS, state(number, last, scored), self.control)
        except RunComplete:
            return [*self.asked, "complete"]
        return self.asked


def state(step: int, last: int = 9, scored: tuple[int, ...] = (), **others: Any) -> Any:
    log = [{"step": at, "eval_loss": 1.0} for at in scored]
    return SimpleNamespace(
        global_step=step, max_steps=last, log_history=[{"step": 1, "loss": 1.0}, *log],
        is_world_process_zero=True, **{"best_metric": None, "best_global_step": None} | others,
    )  # fmt: skip


# --- after a step --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "step", "expected"),
    [
        ({}, 1, set()),
        ({}, 2, {"evaluate"}),
        ({}, 3, {"save"}),
        ({}, 6, {"evaluate", "save"}),
        ({}, 9, {"evaluate", "save"}),  # the last
        ({"save_every": 100}, 9, {"evaluate", "save"}),
        ({"every_steps": None}, 2, set()),
        ({"every_steps": None}, 9, {"evaluate", "save"}),
        ({"evaluates": False}, 2, set()),
        ({"evaluates": False}, 9, {"save"}),
        ({"weights_every": 5}, 5, {"weights"}),
        ({"weights_every": 5}, 4, {"evaluate"}),
        ({"weights_every": 5}, 9, {"evaluate", "save", "weights"}),
        ({"stopped": True}, 1, {"save", "training_stop"}),
        ({"stopped": True}, 2, {"save", "training_stop"}),  # no evaluation: it ends now
        ({"stopped": True}, 9, {"save", "training_stop"}),
    ],
)
def test_after_a_step_what_is_due_happens_and_after_the_last_all_of_it(
    options: dict[str, Any], step: int, expected: set[str]
) -> None:
    assert Bench(**options).step(step) == expected


# --- before the first step -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "step", "scored", "expected"),
    [
        ({}, 0, (), []),
        ({"at_start": True}, 0, (), ["evaluate"]),
        ({"at_start": True}, 0, (0,), []),
        ({"choose": "domain_without_forgetting", "keep": {"data": "x"}}, 0, (), ["evaluate"]),
        ({}, 2, (), ["evaluate", "scores"]),  # a signal cut it short
        ({}, 2, (2,), []),
        ({}, 3, (), []),
        ({"evaluates": False}, 2, (), []),
        ({}, 9, (), ["evaluate", "scores", "complete"]),
        ({}, 9, (9,), ["complete"]),
        ({}, 10, (10,), ["complete"]),
        ({"evaluates": False}, 9, (), ["complete"]),
        ({"stopped": True, "evaluates": False}, 0, (), ["complete"]),
        ({"stopped": True}, 3, (), ["complete"]),
    ],
)
def test_what_is_missing_is_done_before_the_first_step_and_a_run_that_is_done_ends(
    options: dict[str, Any], step: int, scored: tuple[int, ...], expected: list[str]
) -> None:
    assert Bench(**options).begin(step, scored=scored) == expected


def test_an_evaluation_that_a_signal_aborted_again_is_not_put_into_the_checkpoint() -> None:
    bench = Bench()
    bench.scores = {}
    assert bench.begin(2) == ["evaluate"]


# --- after an evaluation -------------------------------------------------------------------------


def evaluated(
    bench: Bench, step: int, value: float | None, best: tuple[float, int] | None = None,
    scored: tuple[int, ...] = (), **more: float,
) -> tuple[set[str], Any, Any]:  # fmt: skip
    """What is to happen, the best score and its step."""
    name = bench.schedule.evaluation.best_metric if bench.schedule.evaluation else "loss"
    given = state(
        step, scored=scored, best_metric=best and best[0], best_global_step=best and best[1]
    )
    metrics = {} if value is None else {f"eval_{name}": value, **more}
    bench.schedule.on_evaluate(ARGS, given, bench.control, metrics)
    return bench.wanted(), given.best_metric, given.best_global_step


@pytest.mark.parametrize(
    ("metric", "before", "value", "better"),
    [
        ("loss", None, 2.0, True), ("loss", 2.0, 1.0, True), ("loss", 2.0, 2.0, False),
        ("loss", 2.0, 3.0, False), ("bleu-4", None, 2.0, True), ("bleu-4", 2.0, 3.0, True),
        ("bleu-4", 2.0, 2.0, False), ("bleu-4", 2.0, 1.0, False),
    ],
)  # fmt: skip
def test_a_better_score_is_noted_and_saved_in_the_direction_of_its_metric(
    metric: str, before: float | None, value: float, better: bool
) -> None:
    best = None if before is None else (before, 2)
    found = evaluated(Bench(best_metric=metric), 4, value, best)
    assert found == (
        ({"save"}, value, 4) if better else (set(), before, None if before is None else 2)
    )


def test_the_untuned_model_is_never_the_best_checkpoint_nor_is_what_was_aborted() -> None:
    assert evaluated(Bench(), 0, 1.0) == (set(), None, None)
    assert evaluated(Bench(), 4, None) == (set(), None, None)
    assert evaluated(Bench(evaluates=False), 4, 1.0) == (set(), None, None)
    assert evaluated(Bench(stopped=True), 4, None) == ({"save", "training_stop"}, None, None)


@pytest.mark.parametrize("chosen", [0.0, 1.0])
def test_where_tests_choose_their_choice_is_the_best_whatever_the_score(chosen: float) -> None:
    bench = Bench(choose="domain_without_forgetting", keep={"data": "x"})
    found = evaluated(bench, 4, 3.0, (2.0, 2), eval_chosen=chosen)
    assert found == (({"save"}, 3.0, 4) if chosen else (set(), 2.0, 2))


@pytest.mark.parametrize(
    ("scored", "ends"), [((2, 4), False), ((2, 4, 6), True), ((2, 4, 6, 8), True), ((2,), False)]
)
def test_patience_counts_the_evaluations_behind_the_best(
    scored: tuple[int, ...], ends: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(Bench(patience=2), scored[-1], 3.0, (1.0, 2), scored=scored)
    assert found == ({"save", "training_stop"} if ends else set(), 1.0, 2)
    said = "stopping: loss has not improved in 2 evaluations\n"
    assert capsys.readouterr().out == (said if ends else "")


@pytest.mark.parametrize(("scored", "ends"), [((0, 2), False), ((0, 2, 4), True)])
def test_patience_without_a_best_does_not_count_the_untuned_model(
    scored: tuple[int, ...], ends: bool
) -> None:
    bench = Bench(choose="domain_without_forgetting", keep={"data": "x"}, patience=2)
    found = evaluated(bench, scored[-1], 3.0, scored=scored, eval_chosen=0.0)
    assert found == ({"save", "training_stop"} if ends else set(), None, None)


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate"])
@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("saving", [False, True])
def test_a_run_that_a_callback_of_the_user_ends_is_saved(
    event: str, stopping: bool, saving: bool
) -> None:
    control = TrainerControl(should_training_stop=stopping, should_save=saving)
    getattr(StoppedIsSaved(), event)(ARGS, state(1), control)
    assert control.should_save is (saving or stopping)


# --- what is written -----------------------------------------------------------------------------


def lines(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_begin_with_what_the_checkpoint_knows_and_go_on_line_by_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 9.0}\n')  # of steps that are lost
    file = MetricsFile(tmp_path)
    file.on_train_begin(ARGS, state(2, scored=(2,)), TrainerControl())
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "eval_loss": 1.0}]
    file.on_log(ARGS, state(3), TrainerControl(), {"loss": 0.5})
    file.on_log(ARGS, state(4), TrainerControl(), {"loss": 0.25})
    assert lines(tmp_path)[2:] == [{"step": 3, "loss": 0.5}, {"step": 4, "loss": 0.25}]


def test_other_processes_write_no_metrics(tmp_path: Path) -> None:
    file, other = MetricsFile(tmp_path), state(2)
    other.is_world_process_zero = False
    file.on_train_begin(ARGS, other, TrainerControl())
    file.on_log(ARGS, other, TrainerControl(), {"loss": 0.5})
    described = DataJson(tmp_path, lambda: {"train": {}})
    described.on_save(ARGS, other, TrainerControl())
    assert list(tmp_path.iterdir()) == []
    described.on_save(ARGS, state(2), TrainerControl())
    assert json.loads((tmp_path / "data.json").read_text()) == {"train": {}}


@pytest.mark.parametrize("first", [True, False])
def test_lines_that_a_full_disk_had_no_room_for_are_written_later(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = MetricsFile(tmp_path)
    if not first:
        file.on_train_begin(ARGS, state(1), TrainerControl())
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_file", full)
        patch.setattr(module.journal, "append", full)
        if first:
            file.on_train_begin(ARGS, state(1), TrainerControl())
        file.on_log(ARGS, state(2), TrainerControl(), {"loss": 0.5})
    assert "it is written when there is room" in capsys.readouterr().err
    file.on_log(ARGS, state(3), TrainerControl(), {"loss": 0.25})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_curves_that_a_full_disk_ended_are_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    board, calls = TensorBoard(), []

    def full(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.TensorBoardCallback, "on_log", full)
    board.tb_writer = "open"
    for _ in range(3):
        board.on_log(ARGS, state(1), TrainerControl())
    assert (len(calls), board.tb_writer) == (1, None)
    assert capsys.readouterr().err.count("its curves end here") == 1


@pytest.mark.parametrize(
    ("profile", "feed", "kinds"),
    [
        (None, None, ["MetricsFile"]),
        (3, None, ["MetricsFile", "Profiler"]),
        (None, SimpleNamespace(described=dict), ["MetricsFile", "DataJson"]),
    ],
)
def test_a_run_directory_gets_what_the_run_has(
    profile: int | None, feed: Any, kinds: list[str], tmp_path: Path
) -> None:
    assert [type(one).__name__ for one in writers(tmp_path, profile, feed)] == kinds
