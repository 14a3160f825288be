"""A moment of a run as a save takes it: which process has which states, and what training may change meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.trainer_callback import TrainerControl, TrainerState

from finetune.training import snapshot
from finetune.training.snapshot import Snapshot, host_copy, save_state, states_of, take


class Scaler:
    def state_dict(self) -> dict[str, float]:
        return {"scale": 2.0}


def trainer_of(*, scaled: bool = False, sharded: bool = False, step: int = 2) -> Any:
    model = nn.Linear(2, 3, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return SimpleNamespace(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, is_deepspeed_enabled=sharded,
        accelerator=SimpleNamespace(scaler=Scaler() if scaled else None), control=TrainerControl(),
        state=TrainerState(global_step=step, max_steps=9),
    )  # fmt: skip


def among(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(snapshot, "rank_and_world", lambda: (rank, world))
    monkeypatch.setattr(snapshot, "is_rank0", lambda: rank == 0)


@pytest.mark.parametrize(
    ("rank", "world", "scaled", "names"),
    [
        (0, 1, False, {"optimizer.pt", "scheduler.pt", "rng_state.pth"}),
        (0, 1, True, {"optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"}),
        (0, 2, True, {"optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth"}),
        (1, 2, True, {"rng_state_1.pth"}),
    ],
)
def test_each_process_has_its_own_random_streams_and_the_leading_one_all_else(
    rank: int, world: int, scaled: bool, names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    among(monkeypatch, rank, world)
    trainer = trainer_of(scaled=scaled)
    found = states_of(trainer)
    assert found.keys() == names
    (streams,) = (state for name, state in found.items() if name.startswith("rng"))
    assert streams.keys() == {"python", "numpy", "cpu"}
    if scaled and rank == 0:
        assert found["scaler.pt"] == {"scale": 2.0}


def test_a_schedule_of_deepspeeds_own_lies_in_its_states() -> None:
    trainer = trainer_of()
    wrapped = snapshot.DeepSpeedSchedulerWrapper
    trainer.lr_scheduler = wrapped.__new__(wrapped)
    assert states_of(trainer).keys() == {"optimizer.pt", "rng_state.pth"}


@pytest.mark.parametrize(("world", "everywhere"), [(1, False), (2, True)])
def test_streams_of_all_accelerators_are_kept_where_transformers_reads_so_many(
    world: int, everywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    among(monkeypatch, 0, world)
    monkeypatch.setattr(snapshot.device, "random_states", lambda **asked: {"cuda": asked})
    (streams,) = (one for name, one in states_of(trainer_of()).items() if name.startswith("rng"))
    assert streams["cuda"] == {"everywhere": everywhere}


@pytest.mark.parametrize("rank", [0, 1])
def test_under_deepspeed_every_process_has_its_part_and_the_engine_finds_its_own_folder(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    among(monkeypatch, rank, 2)
    engine_states = {"global_step7/part": {"x": 1}}
    monkeypatch.setattr(snapshot, "_engine_states", lambda engine: dict(engine_states))
    trainer = trainer_of(sharded=True)
    trainer.model_wrapped = SimpleNamespace(global_steps=7)
    found = take(trainer, {"run.json": "{}"}, resumable=True, copied=False)
    named = {"global_step7/part", f"rng_state_{rank}.pth"} | ({"scheduler.pt"} if not rank else set())  # fmt: skip
    assert found.states.keys() == named
    assert found.texts == ({} if rank else {"run.json": "{}", "latest": "global_step7"})
    weights = take(trainer, {"run.json": "{}"}, resumable=False, copied=False)
    assert weights.states == {}
    assert "latest" not in weights.texts


@pytest.mark.parametrize(
    ("step", "stops", "last"), [(2, False, False), (2, True, True), (9, False, True), (10, False, True)]
)  # fmt: skip
def test_the_last_save_is_that_of_the_last_step_or_of_a_run_that_stops(
    step: int, stops: bool, last: bool
) -> None:
    trainer = trainer_of(step=step)
    trainer.control.should_training_stop = stops
    assert take(trainer, {}, resumable=False, copied=False).is_last is last


def test_what_training_does_meanwhile_reaches_no_copied_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snapshot.methods, "saved_names", lambda model: ["weight"])
    trainer = trainer_of()
    loss = trainer.model(torch.ones(1, 2)).sum()
    loss.backward()
    trainer.optimizer.step()
    found = take(trainer, {}, resumable=True, copied=True)
    weight = trainer.model.weight.detach().clone()
    moment = trainer.optimizer.state[trainer.model.weight]["exp_avg"].clone()
    trainer.optimizer.step()
    trainer.state.global_step = 3
    trainer.state.best_global_step = 3
    assert torch.equal(found.gather(["weight"])["weight"], weight)
    assert torch.equal(found.states["optimizer.pt"]["state"][0]["exp_avg"], moment)
    assert (found.state.global_step, found.state.best_global_step) == (2, None)


def test_in_a_process_that_does_not_write_a_copied_snapshot_gives_no_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snapshot.methods, "saved_names", lambda model: ["weight"])
    monkeypatch.setattr(snapshot, "gather_to_rank0", lambda model, names: {})
    among(monkeypatch, 1, 2)
    assert take(trainer_of(), {}, resumable=False, copied=True).gather(["weight"]) == {}


def test_states_lie_where_their_names_say_and_the_way_torch_saves_stays_as_it_was(
    tmp_path: Path,
) -> None:
    before = torch.serialization.get_crc32_options()
    one = Snapshot(None, False, None, dict, {"deep/a.pt": {"x": torch.ones(2)}}, {"b.json": "{}"})  # type: ignore[arg-type]
    one.write_states(tmp_path)
    assert torch.equal(torch.load(tmp_path / "deep/a.pt", weights_only=True)["x"], torch.ones(2))
    assert (tmp_path / "b.json").read_text() == "{}"
    assert before is True
    assert torch.serialization.get_crc32_options() is before
    with pytest.raises(FileNotFoundError):
        save_state({}, tmp_path / "nowhere/x.pt")
    assert torch.serialization.get_crc32_options() is before


def test_a_host_copy_keeps_kinds_empty_tensors_and_what_is_no_tensor() -> None:
    class Named(dict[str, Any]):
        pass

    value = Named(a=(torch.zeros(0, 3), [1]), b={"c": {1, 2}})
    copied = host_copy(value, {})
    assert type(copied) is Named
    assert type(copied["a"]) is tuple
    assert copied["a"][0].shape == (0, 3)
    assert copied["b"] == {"c": {1, 2}}
    assert copied["b"]["c"] is not value["b"]["c"]
    narrow = torch.arange(6).view(2, 3).T
    twice = host_copy([narrow, narrow.view(torch.int64)], {})
    assert torch.equal(twice[0], narrow)
    assert twice[0].stride() == narrow.stride()
    assert twice[0].untyped_storage().data_ptr() == twice[1].untyped_storage().data_ptr()
    assert twice[0].untyped_storage().data_ptr() != narrow.untyped_storage().data_ptr()
