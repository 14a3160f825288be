"""What a run says of its own speed, its steps and its scores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from finetune.artifacts import checkpoint
from finetune.config.schema import LoraMethod, TrainingSection
from finetune.training.callbacks import profiling, progress, throughput
from finetune.training.callbacks.progress import ProgressCallback, Throughput, scores_at
from finetune.training.callbacks.throughput import PEAKS, Work, work_of
from finetune.training.objective import StepCounts
from finetune.training.resume import Start

ARGS: Any = None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that have passed; a test sets them."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_evaluations_that_take_more_than_a_twentieth_of_the_time_are_named_once(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    bar = ProgressCallback()
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
    assert evaluated(42.1, 400) == ""  # 4.999 %
    said = evaluated(40, 100)
    assert "17 % of the time at evaluation.every_steps=100; 380 would make it 5 %" in said
    assert evaluated(40, 100) == ""


def test_a_little_more_than_a_twentieth_is_said(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    bar = ProgressCallback()
    bar.throughput.start()
    bar.throughput.steps = 10
    clock[0] += 20
    with bar.silent():
        clock[0] += 43
    bar.say_if_too_often(400)
    assert "5 % of the time at evaluation.every_steps=400; 409 would" in capsys.readouterr().out


def test_a_log_line_has_speed_of_training_alone_and_begins_a_new_window(
    clock: list[float],
) -> None:
    speed = Throughput(Work(per_token=2e9, peak=None, devices=2))
    speed.start()
    for _ in range(2):
        speed.add(StepCounts(weight=1.0, supervised=30.0, tokens=60.0, cells=100.0))
    clock[0] += 4
    with speed.paused():  # saving, say
        clock[0] += 50
    found = speed.numbers()
    assert found["tokens_per_second"] == pytest.approx(30.0)
    assert found["supervised_tokens_per_second"] == pytest.approx(15.0)
    assert found["padding"] == pytest.approx(0.4)
    assert found["seconds_per_step"] == pytest.approx(2.0)
    assert found["tflops_per_second"] == pytest.approx(30 * 2e9 / 2 / 1e12)
    assert "mfu" not in found
    assert (speed.steps, speed.seconds_for(3)) == (0, pytest.approx(6.0))
    speed.add(StepCounts(1.0, 5.0, 10.0, 10.0))
    clock[0] += 1
    assert speed.numbers()["tokens_per_second"] == pytest.approx(10.0)


def test_before_the_first_log_line_the_time_left_is_that_of_the_steps_so_far(
    clock: list[float],
) -> None:
    speed = Throughput()
    assert speed.seconds_for(5) == 0.0
    speed.start()
    speed.add(StepCounts())
    speed.add(StepCounts())
    clock[0] += 3
    assert speed.seconds_for(4) == pytest.approx(6.0)


def test_a_clock_that_stands_still_divides_nothing_by_zero(clock: list[float]) -> None:
    speed = Throughput(Work(per_token=2.0, peak=4.0, devices=1))
    speed.start()
    speed.add(StepCounts(1.0, 2.0, 3.0, 4.0))
    assert speed.numbers()["tokens_per_second"] > 0
    assert speed.numbers()["tokens_per_second"] == 0  # nothing came since


@pytest.mark.parametrize(
    ("rank", "done", "shown"), [("0", 4, True), ("1", 4, False), ("0", 9, False)]
)
def test_the_leading_process_has_a_bar_while_steps_are_left(
    rank: str, done: int, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = SimpleNamespace(advance=lambda steps=1: None)
    opened: list[Any] = []
    context = type("Bar", (), {"__enter__": lambda self: bar, "__exit__": lambda self, *_: None})
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(progress.console, "on_terminal", lambda: True)
    monkeypatch.setattr(
        progress.console, "progress", lambda *given: opened.append(given) or context()
    )
    state: Any = SimpleNamespace(global_step=done, max_steps=9)
    ProgressCallback().on_train_begin(ARGS, state, ARGS)
    assert opened == ([(9, "training")] if shown else [])


def test_of_the_last_steps_no_estimate_is_said(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar, state = ProgressCallback(), SimpleNamespace(global_step=0, max_steps=2)
    bar.on_train_begin(ARGS, state, ARGS)  # type: ignore[arg-type]
    for state.global_step in (1, 2):
        bar.throughput.add(StepCounts())
        bar.on_step_end(ARGS, state, ARGS)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""


def test_an_estimate_is_said_once_after_two_steps_of_a_run_that_goes_on(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = ProgressCallback()
    state: Any = SimpleNamespace(global_step=4, max_steps=100)  # a resumed run
    bar.on_train_begin(ARGS, state, ARGS)
    for step in (5, 6, 7):
        bar.throughput.add(StepCounts())
        clock[0] += 2
        state.global_step = step
        bar.on_step_end(ARGS, state, ARGS)
    said = capsys.readouterr().out
    assert said == "about 3:08 for the remaining steps\n"  # 94 steps of 2 s


def test_a_bar_on_a_terminal_begins_at_the_step_of_the_checkpoint_and_makes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []

    class Bar:
        def __init__(self, total: int, label: str) -> None:
            told.append((total, label))

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            told.append("closed")

        def advance(self, steps: int = 1) -> None:
            told.append(steps)

    monkeypatch.setattr(progress.console, "on_terminal", lambda: True)
    monkeypatch.setattr(progress.console, "progress", Bar)
    state: Any = SimpleNamespace(global_step=4, max_steps=9)
    with ProgressCallback() as bar:
        bar.on_train_begin(ARGS, state, ARGS)
        state.global_step = 5
        bar.on_step_end(ARGS, state, ARGS)
        with bar.silent():
            told.append("silent")
    assert told == [(9, "training"), 4, 1, "closed", "silent", (9, "training"), 5, "closed"]


# --- scores --------------------------------------------------------------------------------------

LOG: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 3.0},
    {"step": 1, "loss": 2.9},
    {"step": 2, "eval_loss": 2.0, "eval_bleu-4": 1.0},
    {"step": 4, "eval_loss": 1.5, "eval_bleu-4": 7.0},
    {"step": 5, "loss": 1.0},
]


def test_scores_are_those_before_the_first_step_and_those_of_the_last_evaluation() -> None:
    assert scores_at(LOG, first=True) == {"loss": 3.0}
    assert scores_at(LOG, first=False) == {"loss": 1.5, "bleu-4": 7.0}
    assert scores_at(LOG[1:], first=True) == {}
    assert scores_at(LOG[:2], first=False) == {}


def test_scores_stand_side_by_side_where_both_are_known_with_the_places_of_their_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress.compare({"loss": 3.0, "bleu-4": 1.0}, {"loss": 1.23456, "bleu-4": 7.891, "chrf": 1.0})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["loss", "3.0000", "1.2346"], ["bleu-4", "1.00", "7.89"]]


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_run_ends_with_its_numbers(
    evaluated: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.set_best(tmp_path, tmp_path / "checkpoint-2", "loss", 2.0)
    log = LOG if evaluated else [LOG[1]]
    state = SimpleNamespace(global_step=5, log_history=log)
    trainer: Any = SimpleNamespace(state=state, mean_loss=lambda: 1.95)
    found = progress.summary(trainer, tmp_path, tmp_path / "checkpoint-2")
    assert found == {
        "output_dir": str(tmp_path), "steps": 5, "train_loss": 1.95,
        "scores_before": {"loss": 3.0} if evaluated else {},
        "scores": {"loss": 1.5, "bleu-4": 7.0} if evaluated else {},
        "checkpoint": str(tmp_path / "checkpoint-4"),
        "best_checkpoint": str(tmp_path / "checkpoint-2"),
        "resumed_from": str(tmp_path / "checkpoint-2"),
    }  # fmt: skip
    assert ("held-out data" in capsys.readouterr().out) is evaluated


def test_a_log_line_says_each_number_in_its_unit(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressCallback()
    state: Any = SimpleNamespace(global_step=3, max_steps=9)
    logs = {
        "loss": 1.23456, "learning_rate": 5e-4, "grad_norm": 0.5, "tokens_per_second": 1234.6,
        "supervised_tokens_per_second": 567.8, "padding": 0.25, "memory_gb": 1.234, "mfu": 0.375,
        "memory_device_gb": 7.06, "experts_largest_share": 0.3,
    }  # fmt: skip
    bar.on_log(ARGS, state, ARGS, logs)
    bar.on_log(ARGS, state, ARGS, {"eval_loss": 1.5, "eval_chrf": 2.0, "epoch": 1.0})
    bar.on_log(ARGS, state, ARGS, {"epoch": 1.0})
    step, evaluation = capsys.readouterr().out.splitlines()
    assert step == (
        "step 3/9  loss 1.2346  lr 5.00e-04  gradient 0.50  1,235 tokens/s, 568 supervised  "
        "38 % of peak  padding 25 %  busiest expert 30 % of a layer's choices  "
        "memory 1.23 GB (7.1 used)  0 s left"
    )
    assert evaluation == "step 3  evaluation  loss 1.5000  chrf 2.00"


@pytest.mark.parametrize("sharing", [1, 2])
def test_the_table_of_a_run_counts_what_a_step_takes(
    sharing: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "rank_and_world", lambda: (0, 4))
    monkeypatch.setattr(progress.methods, "trained_modules", lambda model: {"layers.*.q": 7})
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False))
    model[0].weight.requires_grad_(False)
    training = TrainingSection(
        output_dir="runs/z", batch_size=2, gradient_accumulation_steps=3, sequence_parallel=sharing
    )
    data: Any = SimpleNamespace(
        items=SimpleNamespace(lengths=torch.tensor([10, 20]).numpy()), is_packed=sharing == 2,
        steps=lambda training: 5, size=lambda: "12", an_epoch=lambda: " (2 an epoch)",
    )  # fmt: skip
    prepared: Any = SimpleNamespace(
        model=model, deepspeed={"zero_optimization": {"stage": 2}} if sharing == 2 else None,
        section=SimpleNamespace(path="org/name"), dtype=torch.bfloat16, method=LoraMethod(rank=4),
    )  # fmt: skip
    progress.announce(
        training, data, prepared, Start(Path("checkpoint-5"), 5), [["memory", "2 GB"]]
    )
    rows = {
        line[:10].strip(): line[11:].strip()
        for line in capsys.readouterr().out.splitlines()
        if not line.startswith("-")
    }
    assert rows["model"] == "org/name in bfloat16"
    assert rows["trained"] == "3 of 12 weights (25 %)"
    assert rows["in"] == "layers.*.q x 7"
    assert rows["processes"].endswith("DeepSpeed ZeRO-2" if sharing == 2 else "data parallel")
    shared = " / 2), about 180 tokens" if sharing == 2 else "), about 360 tokens"
    what = "12 rows" if sharing == 2 else "24 examples"
    assert rows["a step"] == f"{what} (2 x 3 x 4 processes{shared}"
    assert rows["steps"] == "5 (2 an epoch)"
    assert rows["memory"] == "2 GB"
    assert rows["no step to"].startswith("do: checkpoint-5 is the last of 5 steps")


# --- what a GPU could do ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA H20", 148), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA L20", 119.5), ("NVIDIA A10", 125),
        ("NVIDIA RTX 6000 Ada Generation", 364), ("NVIDIA RTX A6000", 155), ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165), ("Card of nobody", None),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_the_most_telling_part_of_its_name(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput.device, "card", lambda: SimpleNamespace(name=name))
    assert throughput.peak_flops() == (None if peak is None else peak * 1e12)
    for before, part in enumerate(PEAKS):  # none is hidden by one before it
        assert not any(other in part for other in list(PEAKS)[:before])


def test_memory_of_a_device_is_told_beside_that_of_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert throughput.gpu_memory() == {}
    held = SimpleNamespace(most_reserved=3e9, total=16e9, free=9e9)
    monkeypatch.setattr(throughput.device, "memory", lambda: held)
    assert throughput.gpu_memory() == {"memory_reserved_gb": 3.0, "memory_device_gb": 7.0}


class Text(nn.Module):
    """A table, a matrix that learns, a frozen one in four bits, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.trained = nn.Linear(8, 6, bias=True)
        self.packed = nn.Linear(8, 4, bias=False)  # 32 bytes hold 64 numbers
        self.packed.weight.requires_grad_(False)
        self.packed.weight.quant_state = object()  # type: ignore[attr-defined]
        self.norm = nn.LayerNorm(8)
        text = SimpleNamespace(num_hidden_layers=2, num_attention_heads=3, hidden_size=12)
        self.config = SimpleNamespace(get_text_config=lambda: text)


def test_a_token_takes_the_products_of_its_matrices_and_of_the_attention_to_half_its_row() -> None:
    found = work_of(Text(), mean_length=10.0, devices=3)
    matrices, trained = 48 + 64, 48
    heads, channels = 2 * 3, 4
    attention = 3 * 4 * heads * channels * 10 / 2
    assert found.per_token == 4 * matrices + 2 * trained + attention
    assert found.devices == 3
    assert Work(2.0, 8.0, 2).speed(4.0) == {"tflops_per_second": 4e-12, "mfu": 0.5}


# --- the profile -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "done", "profiled"), [(2, 9, 2), (2, 4, 2), (5, 4, 2), (5, 2, 0)]
)
def test_so_many_steps_behind_the_warm_up_are_profiled_once(
    steps: int, done: int, profiled: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    events: list[str] = []

    class Profile:
        def start(self) -> None:
            events.append("start")

        def stop(self) -> None:
            events.append("stop")

        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text("{}")

        def key_averages(self) -> Any:
            return SimpleNamespace(table=lambda **options: f"by {options['sort_by']}")

    monkeypatch.setattr(profiling.torch.profiler, "profile", lambda **_: Profile())
    one = profiling.Profiler(tmp_path, steps)
    state: Any = SimpleNamespace(is_world_process_zero=True)
    for number in range(done):
        events.append(str(number))
        one.on_step_begin(ARGS, state, ARGS)
        one.on_step_end(ARGS, state, ARGS)
    one.on_train_end(ARGS, state, ARGS)
    said = capsys.readouterr().out
    if not profiled:
        assert (events, said) == (["0", "1"], "")
        return
    again = profiling.Profiler(tmp_path, steps)  # of the run that goes on
    again._profile = Profile()
    again.on_train_end(ARGS, state, ARGS)
    events.pop()
    assert events[:4] == ["0", "1", "2", "start"]
    assert events.index("stop") == min(done, 2 + steps) + 1
    assert (events.count("start"), events.count("stop")) == (1, 1)
    assert f": {profiled} steps profiled" in said
    assert (tmp_path / "profile/kernels.txt").read_text() == "by self_cpu_time_total\n"
