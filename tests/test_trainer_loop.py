"""What stands around transformers' loop: opening a checkpoint, rates, evaluations, the way in and out."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer_parts import tuner
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import TrainerState

from finetune.errors import CheckpointError
from finetune.training import trainer as module

# --- a checkpoint --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "fine"),
    [
        ("global_step", 7, True), ("epoch", 0.5, True), ("epoch", None, True),  # of a stream
        ("global_step", "7", False), ("epoch", "x", False), ("max_steps", None, False),
        ("total_flos", [], False), ("best_metric", None, True), ("is_world_process_zero", True, True),
    ],
)  # fmt: skip
def test_a_number_of_the_state_that_is_none_is_named(
    name: str, value: Any, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        Trainer, "_init_training_state", lambda self, *given, **others: (given, others)
    )
    monkeypatch.setattr(TrainerState, "compute_steps", lambda self, *given: asked.append(given))
    one = tuner(args="args")
    setattr(one.state, name, value)
    if fine:
        assert one._init_training_state(9, "folder", trial=None) == ((9, "folder"), {"trial": None})
        assert asked == [("args", 9)]
        return
    with pytest.raises(TypeError, match=f"{name} in trainer_state.json is no number"):
        one._init_training_state(9)


def test_weights_come_from_the_checkpoint_into_the_model_that_learns() -> None:
    opened: list[Any] = []
    saver = SimpleNamespace(load_weights=lambda *given: opened.append(given))
    tuner(saver=saver, model="model")._load_from_checkpoint("checkpoint-3", "another")
    assert opened == [("model", Path("checkpoint-3"))]


@pytest.mark.parametrize("checkpoint", [None, "checkpoint-3"])
def test_behind_a_checkpoint_the_rates_are_those_of_the_schedule_as_it_is_now(
    checkpoint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    monkeypatch.setattr(
        Trainer, "_load_optimizer_and_scheduler", lambda self, folder: events.append(folder)
    )
    monkeypatch.setattr(module, "set_rates", lambda scheduler: events.append(("rates", scheduler)))
    tuner(lr_scheduler="schedule")._load_optimizer_and_scheduler(checkpoint)
    assert events == [checkpoint, *([("rates", "schedule")] if checkpoint else [])]


# --- optimizer and schedule ------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_a_schedule_rises_first_and_deepspeeds_engine_is_guarded_before_it_is_made(
    sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    monkeypatch.setattr(module, "guard_engine", lambda *given: events.append(given))
    monkeypatch.setattr(
        Trainer, "create_scheduler", lambda self, *given: events.append(given) or "schedule"
    )
    monkeypatch.setattr(module, "warm_up", lambda *given: events.append(given))
    monkeypatch.setattr(module, "set_rates", lambda *given: events.append(given))
    args = SimpleNamespace(get_warmup_steps=lambda steps: steps // 10)
    one = tuner(is_deepspeed_enabled=sharded, args=args, _guard="guard")
    assert one.create_scheduler(70, "optimizer") == "schedule"
    guarded = [(one.accelerator, "guard")] if sharded else []
    assert events == [*guarded, (70, "optimizer"), ("schedule", 7), ("schedule",)]


@pytest.mark.parametrize(
    ("one_rate", "optimizer", "there", "ours"),
    [
        (True, "adamw", None, False), (False, "adamw", None, True), (True, "muon", None, True),
        (False, "muon", "made", False), (False, "adamw", "made", False),
    ],
)  # fmt: skip
def test_groups_of_our_own_are_made_for_several_rates_and_for_muon(
    one_rate: bool, optimizer: str, there: Any, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Trainer, "create_optimizer", lambda self, model=None: "of transformers")
    monkeypatch.setattr(
        module, "groups_of", lambda *given, for_muon: asked.append((given, for_muon)) or ["group"]
    )
    monkeypatch.setattr(module, "muon", lambda groups, options: ("muon", groups, options))
    rates = SimpleNamespace(is_one=one_rate)
    one = tuner(
        rates=rates, optimizer=there, model="model", args=SimpleNamespace(weight_decay=0.25),
        saver=SimpleNamespace(training=SimpleNamespace(optimizer=optimizer)),
        get_optimizer_cls_and_kwargs=lambda args, model: (lambda groups, **options: ("kind", groups, options), {"eps": 1.0}),
        get_decay_parameter_names=lambda model: ["weight"],
    )  # fmt: skip
    found = one.create_optimizer()
    if not ours:
        assert (found, asked) == ("of transformers", [])
        return
    assert found == ("muon" if optimizer == "muon" else "kind", ["group"], {"eps": 1.0})
    assert one.optimizer == found
    assert asked == [(("model", rates, 0.25, {"weight"}), optimizer == "muon")]


# --- a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_gradients_are_forgotten_by_ourselves_where_they_are_torchs(
    sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "training_step", lambda self, model, *given: torch.tensor(2.0))
    model = nn.Linear(1, 1)
    one = tuner(is_deepspeed_enabled=sharded)
    assert float(one.training_step(model, {})) == 2.0
    assert (model.__dict__.get("zero_grad") == one._forget_gradients) is not sharded


def test_what_torch_puts_around_a_model_of_several_processes_is_taken_off() -> None:
    model = nn.Linear(1, 1)
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    assert module._unwrapped(wrapped, keep_torch_compile=True) is model
    assert module._unwrapped(model) is model


def test_each_process_computes_its_own_part_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "for_model", lambda *given: asked.append(given) or "prepared")
    one = tuner(args=SimpleNamespace(device="card"), split="second of two")
    assert one._prepare_inputs({"x": 1}) == "prepared"
    assert asked == [({"x": 1}, "card", "second of two")]


# --- an evaluation -----------------------------------------------------------------------------------------


def test_an_evaluation_is_no_training_time_has_whole_weights_and_is_judged_by_what_it_took() -> (
    None
):
    events: list[Any] = []

    @contextmanager
    def inside(name: str) -> Any:
        events.append(name)
        yield
        events.append(f"end of {name}")

    validation = SimpleNamespace(
        section=SimpleNamespace(every_steps=5),
        scores=lambda model, step: events.append((model, step)) or {},
    )
    progress = SimpleNamespace(
        silent=lambda: inside("silence"),
        say_if_too_often=lambda every: events.append(f"every {every}"),
    )
    handler = SimpleNamespace(on_evaluate=lambda *given: None)
    one = tuner(
        validation=validation, progress=progress, trained_weights=[], model="model", args=None,
        callback_handler=handler, control=None, _whole_weights=lambda: inside("whole weights"),
    )  # fmt: skip
    one.evaluate()
    assert events == [
        "silence", "whole weights", ("model", 3), "end of whole weights", "end of silence", "every 5",
    ]  # fmt: skip


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_gathered_for_an_evaluation_under_deepspeed_only(
    sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.training.deepspeed import gathered

    asked: list[Any] = []

    @contextmanager
    def whole(engine: Any) -> Any:
        asked.append(engine)
        yield

    monkeypatch.setattr(gathered, "whole_weights", whole)
    with tuner(is_deepspeed_enabled=sharded, model_wrapped="engine")._whole_weights():
        pass
    assert asked == (["engine"] if sharded else [])


# --- the way in and out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [False, True])
def test_a_loop_runs_with_signals_taken_over_and_the_kernels_that_were_asked_for(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    def train(_: Any, resume: Any, **others: Any) -> str:
        events.append((torch.are_deterministic_algorithms_enabled(), resume, others))
        return "result"

    monkeypatch.setattr(Trainer, "train", train)
    saver = SimpleNamespace(
        finish=lambda: events.append("finish"), training=SimpleNamespace(deterministic=asked)
    )
    stop = SimpleNamespace(install=lambda: events.append("signals"))
    one = tuner(saver=saver, stop=stop, model_wrapped=nn.Linear(1, 1))
    assert one.train("checkpoint-3", trial=None) == "result"
    assert events == ["signals", (asked, "checkpoint-3", {"trial": None}), "finish"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_save_that_failed_beside_the_last_steps_ends_the_run_with_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: "result")

    def finish() -> None:
        raise CheckpointError("no room")

    saver = SimpleNamespace(finish=finish, training=SimpleNamespace(deterministic=False))
    stop = SimpleNamespace(install=lambda: None)
    with pytest.raises(CheckpointError, match="no room"):
        tuner(saver=saver, stop=stop, model_wrapped=nn.Linear(1, 1)).train()
