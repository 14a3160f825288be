"""A run as it stands: its callbacks, its call from Python, what it shows of itself and of the device."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import torch
from test_progress import Text
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, TrainerState

from finetune.config.schema import FullMethod, LoraMethod, RunConfig, TrainingSection
from finetune.training import adapter_start, run
from finetune.training.callbacks import profiling, progress, schedule, throughput
from finetune.training.trainer import FineTuner

ARGS: Any = None

# --- the trainer ------------------------------------------------------------------------------------------


class Seen(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.begun_at = state.global_step


def test_a_run_has_our_own_callbacks_order_and_check_of_its_processes(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    found: dict[str, Any] = {}
    original = FineTuner.run

    def running(self: Any, *given: Any) -> None:
        found["tuner"] = self
        original(self, *given)
        found["callbacks"] = [type(one) for one in self.callback_handler.callbacks]

    monkeypatch.setattr(FineTuner, "run", running)
    checked: list[Any] = []
    monkeypatch.setattr(
        "finetune.training.trainer.check_distribution", lambda *given: checked.append(given)
    )
    data = runs.write_dialogues(tmp_path / "train.jsonl", 4)
    settings = runs.config(
        tiny_glm, data, tmp_path / "run", training__max_steps=1, training__report_to=["tensorboard"]
    )
    runs.run_here(settings)
    tuner, names = found["tuner"], [one.__name__ for one in found["callbacks"]]
    assert PrinterCallback not in found["callbacks"]
    assert names.count("TensorBoard") == 1
    assert "TensorBoardCallback" not in names
    assert names[-1] == "StoppedIsSaved"  # behind the user's
    assert names.index("Schedule") < names.index("ProgressCallback")
    assert tuner.model_accepts_loss_kwargs is True
    assert tuner.loss_is_scaled_for_ga is True
    assert tuner.args.ignore_data_skip is False
    assert checked == [(tuner.accelerator, tuner.args)]
    assert capfd.readouterr().out.count("step 1/1") == 1


def test_the_call_of_a_run_hands_on_the_users_callbacks_and_what_it_resumes(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 4)
    resumes: list[bool] = []
    monkeypatch.setattr(
        adapter_start, "start_from_adapter", lambda prepared, *, resumed: resumes.append(resumed)
    )
    for steps, trust in ((1, False), (2, True)):
        asked: list[bool] = []
        original = run.session.run_directory

        def entered(*given: Any, trust: bool, original: Any = original, asked: Any = asked) -> Any:
            asked.append(trust)
            return original(*given, trust=trust)

        monkeypatch.setattr(run.session, "run_directory", entered)
        settings = runs.config(tiny_glm, data, tmp_path / "run", training__max_steps=steps)
        seen = Seen()
        config = RunConfig.model_validate(settings)
        begun = time.monotonic()
        found = run.train(config, trust_checkpoint=trust, callbacks=[seen])
        assert seen.begun_at == steps - 1
        assert asked == [trust]
        monkeypatch.setattr(run.session, "run_directory", original)
        assert 0 < found["seconds"] <= time.monotonic() - begun
    assert resumes == [False, True]


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_train_end"])
def test_curves_end_quietly_at_whichever_event_the_disk_is_full(
    event: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    board, calls = schedule.TensorBoard(), []

    def full(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(schedule.TensorBoardCallback, event, full)
    for _ in range(2):
        getattr(board, event)(ARGS, None, None)
    assert calls == [1]
    assert "its curves end here" in capsys.readouterr().err


# --- what a run shows ---------------------------------------------------------------------------------------


def test_the_table_of_a_run_names_its_method_and_where_it_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.methods, "trained_modules", lambda model: {})
    model = nn.Linear(3, 1, bias=False)
    model.weight.ds_numel = 300  # type: ignore[attr-defined]  # dealt out: this process holds 3
    data: Any = SimpleNamespace(
        items=SimpleNamespace(lengths=np.array([10])), is_packed=False, steps=lambda training: 5,
        size=lambda: "12", an_epoch=lambda: "",
    )  # fmt: skip
    prepared: Any = SimpleNamespace(
        model=model, deepspeed=None, section=SimpleNamespace(path="x"), dtype=torch.float32,
        method=LoraMethod(rank=4, use_dora=True),
    )  # fmt: skip
    training = TrainingSection(output_dir="runs/z", batch_size=1)
    progress.announce(training, data, prepared, progress.Start(), [])
    out = capsys.readouterr().out
    rows = {line[:10].strip(): line[11:].strip() for line in out.splitlines()}
    assert rows["method"].startswith("lora (rank 4, alpha ")
    assert "use_dora True" in rows["method"]
    assert "use_rslora" not in rows["method"]
    assert rows["trained"].startswith("300 of 300 weights")
    assert rows["processes"].endswith("one process")
    assert (rows["examples"], rows["writes to"], rows["steps"]) == ("12", "runs/z", "5")
    assert "no step to do" not in out
    prepared.method = FullMethod()
    progress.announce(training, data, prepared, progress.Start(), [])
    assert "full\n" in capsys.readouterr().out.replace(" ", "")


def test_the_progress_of_a_run_knows_its_work_and_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(progress, "rank_and_world", lambda: (0, 4))
    monkeypatch.setattr(progress, "work_of", lambda *given: asked.append(given))
    monkeypatch.setattr(progress, "expert_use", lambda model: f"of {model}")
    monkeypatch.setattr(progress, "figures", lambda use, reduce: {"experts": use})
    data: Any = SimpleNamespace(mean_attended_length=lambda: 12.5)
    one = progress.progress_of("model", data)  # type: ignore[arg-type]
    assert asked == [("model", 12.5, 4)]
    assert one.numbers()["experts"] == "of model"


@pytest.mark.parametrize(
    ("options", "channels"),
    [({}, 4), ({"head_dim": 5}, 5), ({"head_dim": 5, "qk_head_dim": 7}, 7)],
)
def test_the_work_of_attention_is_that_of_the_channels_that_are_compared(
    options: dict[str, int], channels: int
) -> None:
    model: Any = Text()
    for name, value in options.items():
        setattr(model.config.get_text_config(), name, value)
    plain = throughput.work_of(model, 0.0, 1).per_token
    assert throughput.work_of(model, 10.0, 1).per_token - plain == 3 * 4 * 2 * 3 * channels * 10 / 2


def test_weights_that_are_dealt_out_count_whole() -> None:
    model: Any = Text()
    plain = throughput.work_of(model, 0.0, 1).per_token
    for module in (model.trained, model.norm):
        module.weight.ds_numel = module.weight.numel()
    model.trained.weight.data = torch.empty(0)  # as ZeRO-3 leaves it: one dimension
    model.norm.weight.ds_numel = 0
    assert throughput.work_of(model, 0.0, 1).per_token == plain


def test_a_profile_lists_what_took_longest_on_the_device_that_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[Any] = []
    events: list[str] = []
    averages = SimpleNamespace(table=lambda **options: listed.append(options) or "table")
    fake = SimpleNamespace(
        start=lambda: None, stop=lambda: events.append("stop"), key_averages=lambda: averages,
        export_chrome_trace=lambda path: Path(path).write_text("{}"),
    )  # fmt: skip
    monkeypatch.setattr(profiling.torch.profiler, "profile", lambda **_: fake)
    monkeypatch.setattr(profiling.device, "has_accelerator", lambda: True)
    monkeypatch.setattr(profiling.device, "synchronize", lambda: events.append("waited"))
    one = profiling.Profiler(tmp_path, 1)
    state: Any = SimpleNamespace(is_world_process_zero=True)
    for _ in range(3):
        one.on_step_begin(ARGS, state, ARGS)
        one.on_step_end(ARGS, state, ARGS)
    assert listed == [{"sort_by": "self_device_time_total", "row_limit": 10}]
    assert events == ["waited", "stop"]  # else the last kernels are missing
    assert (tmp_path / "profile/trace.json").exists()


def test_other_processes_are_not_profiled(tmp_path: Path) -> None:
    one = profiling.Profiler(tmp_path, 1)
    state: Any = SimpleNamespace(is_world_process_zero=False)
    for _ in range(4):
        one.on_step_begin(ARGS, state, ARGS)
        one.on_step_end(ARGS, state, ARGS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("steps", "table"), [((0, 2), True), ((2,), False), ((0,), False), ((), False)]
)
def test_a_run_ends_with_what_was_chosen_and_a_table_of_what_can_be_compared(
    steps: tuple[int, ...], table: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(progress, "conclusion", lambda folder: f"chosen in {folder}")
    log = [{"step": step, "eval_loss": 3.0 - step} for step in steps]
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(global_step=2, log_history=log), mean_loss=lambda: None
    )
    found = progress.summary(trainer, tmp_path, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"chosen in {tmp_path}"
    assert any("held-out data" in line for line in lines) is table
    assert found["scores_before"] == ({"loss": 3.0} if 0 in steps else {})
    assert found["scores"] == ({"loss": 1.0} if 2 in steps else {})
    assert (found["checkpoint"], found["best_checkpoint"], found["resumed_from"]) == (None,) * 3


def test_a_log_line_says_nothing_of_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    state: Any = SimpleNamespace(global_step=9, max_steps=9)
    logs = {
        "loss": 1.0, "learning_rate": 0.5, "tokens_per_second": 4.0, "padding": 0.0,
        "supervised_tokens_per_second": 2.0, "memory_gb": 1.0,
    }  # fmt: skip
    progress.ProgressCallback().on_log(ARGS, state, ARGS, logs)
    assert capsys.readouterr().out == (
        "step 9/9  loss 1.0000  lr 5.00e-01  4 tokens/s, 2 supervised  padding 0 %  memory 1.00 GB  "
        "0 s left\n"
    )


def test_a_long_evaluation_before_the_first_step_is_compared_with_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bar = progress.ProgressCallback()
    bar._silent_seconds = 600.0
    bar.say_if_too_often(5)
    assert capsys.readouterr().out == ""
    assert not bar._said  # it may still be said


def test_data_json_that_a_full_disk_refuses_is_written_with_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    state: Any = SimpleNamespace(is_world_process_zero=True)
    file = schedule.DataJson(tmp_path, lambda: {"train": 1})
    with monkeypatch.context() as patch:
        patch.setattr(schedule.RunDirectory, "write_data", full)
        file.on_save(ARGS, state, ARGS)
    assert "data.json" in capsys.readouterr().err
    file.on_save(ARGS, state, ARGS)
    assert (tmp_path / "data.json").exists()


def test_a_gradient_of_zero_is_shown_and_none_is_not() -> None:
    logs = {"loss": 1.0, "learning_rate": 1e-4, "tokens_per_second": 9.0, "supervised_tokens_per_second": 3.0, "padding": 0.25, "memory_gb": 1.5}  # fmt: skip
    state = TrainerState(global_step=1, max_steps=2)
    assert "gradient" not in progress._step_line(logs, state, 3.0)
    assert "  gradient 0.00  9 tokens/s" in progress._step_line({**logs, "grad_norm": 0.0}, state, 3.0)  # fmt: skip
