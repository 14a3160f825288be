"""Processes of one run: what they agree on, how long they wait, who is told that one is gone."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forks import in_ranks
from test_deal import Store
from torch import nn

from finetune import launcher
from finetune.distributed import map_batches, position, processes
from finetune.distributed.background import Background
from finetune.distributed.map_batches import (
    Collected,
    Deal,
    EvaluationStoppedError,
    evaluating,
    longest_first,
)

# --- real processes ----------------------------------------------------------------------------------


def test_three_processes_agree_on_numbers_objects_and_errors() -> None:
    def work(rank: int) -> Any:
        def failing() -> None:
            with processes.fail_together():
                if rank == 1:
                    raise ValueError("broken")

        try:
            failing()
            error = "none"
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        group = processes.patient_group()
        store = processes.shared_store("test")
        store.add("key", rank)
        processes.any_rank(False)
        return {
            "max": processes.reduce_max([rank, -rank]),
            "sum": processes.reduce_sum([rank, 0.5]),
            "any": [processes.any_rank(rank == 2), processes.any_rank(False, group)],
            "objects": processes.gather_objects({"rank": rank}, group),
            "broadcast": processes.broadcast_from_rank0(lambda: f"of {rank}", group),
            "error": error,
            "same group": processes.patient_group() is group,
            "stored": store.add("key", 0),
            "passed": position.passed(),
        }

    found = in_ranks(3, work)
    for rank, said in enumerate(found):
        assert said["max"] == [2, 0], said
        assert said["sum"] == [3.0, 1.5]
        assert said["any"] == [True, False]
        assert said["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert said["broadcast"] == "of 0"
        told = "ValueError: broken" if rank == 1 else "FinetuneError: process 1 failed: ValueError: broken"  # fmt: skip
        assert said["error"] == told
        assert said["same group"]
        assert said["stored"] == 3
        assert said["passed"] == found[0]["passed"] > 0


def test_when_one_process_is_asked_to_stop_no_other_computes_another_batch() -> None:
    def work(rank: int) -> Any:
        done: list[int] = []

        def batch(numbers: list[int]) -> int:
            done.append(numbers[0])
            if rank == 1:
                time.sleep(0.2)
            return numbers[0]

        batches = [[number] for number in range(40)]
        try:
            map_batches.map_batches(
                nn.Linear(1, 1), batches, batch, label="x", should_stop=lambda: rank == 0
            )
            return "all"
        except EvaluationStoppedError:
            return len(done)

    first, second = in_ranks(2, work)
    assert first == 1
    assert second in (1, 2)


# --- alone, with what others would say ---------------------------------------------------------------


def test_a_launched_process_joins_with_the_timeout_in_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}
    started = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        processes.dist, "init_process_group", lambda backend, **given: asked.update(given)
    )
    with processes.joined_processes(timeout_minutes=2.5):
        pass
    assert asked["timeout"] == timedelta(minutes=2.5)
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    asked.clear()
    with processes.joined_processes(timeout_minutes=2.5):  # joined already, by the training
        pass
    assert asked == {}


def test_who_waits_for_a_disk_waits_long_and_is_known_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(processes, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(processes, "any_rank", lambda flag: asked.append("met"))
    monkeypatch.setattr(processes, "_patient", {"of an old world": 1})
    monkeypatch.setattr(processes.dist, "group", SimpleNamespace(WORLD="world"))
    monkeypatch.setattr(
        processes.dist, "new_group", lambda **given: asked.append(given) or "patient"
    )
    assert processes.patient_group() == processes.patient_group() == "patient"
    assert asked == ["met", {"backend": "gloo", "timeout": processes.PATIENCE}]
    assert processes._patient == {"world": "patient"}
    with processes._waiting_in("patient"):
        assert position.waited_patiently() > 0
    assert position.waited_patiently() == 0
    with processes._waiting_in(None):
        assert position.waited_patiently() == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_weight_that_is_dealt_out_is_copied_while_it_is_whole(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    class Gathered:
        def __init__(self, weights: list[nn.Parameter]) -> None:
            self.weight = weights[0]

        def __enter__(self) -> None:
            self.weight.data.fill_(7.0)

        def __exit__(self, *_: object) -> None:
            self.weight.data.fill_(0.0)

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", Gathered)
    monkeypatch.setattr(processes, "is_rank0", lambda: rank == 0)
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0  # type: ignore[attr-defined]
    found = processes.gather_to_rank0(model, ["weight", "bias"])
    if rank:
        assert found == {}
        return
    assert found["weight"].tolist() == [[7.0, 7.0], [7.0, 7.0]]
    assert found["bias"].data_ptr() == model.bias.data_ptr()  # whole already: not copied


@pytest.mark.parametrize(("status", "apart"), [(None, False), ("AVAILABLE", False), ("NOT_AVAILABLE", True), ("INFLIGHT", True)])  # fmt: skip
def test_a_weight_is_apart_until_it_is_gathered(
    status: str | None, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(1, 1, bias=False)
    if status is not None:
        model.weight.ds_status = SimpleNamespace(name=status)  # type: ignore[attr-defined]
    assert processes.is_apart(model.weight) is apart
    assert not processes.is_sharded(model)  # one process
    monkeypatch.setattr(processes, "rank_and_world", lambda: (0, 2))
    assert processes.is_sharded(model) is apart


@pytest.mark.parametrize(("variables", "found"), [
    ({}, (0, 0, 1, 1, False)),
    ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, (5, 1, 8, 4, True)),
    ({"RANK": "5", "WORLD_SIZE": "8"}, (5, 0, 8, 8, True)),
    ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": ""}, (0, 0, 8, 8, True)),
    ({"WORLD_SIZE": "1"}, (0, 0, 1, 1, True)),
])  # fmt: skip
def test_a_process_knows_what_the_launcher_says(
    variables: dict[str, str], found: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert found == (
        launcher.rank(), launcher.local_rank(), launcher.world_size(), launcher.local_world_size(),
        launcher.is_launched(),
    )  # fmt: skip


def test_work_beside_the_run_tells_its_error_once_whatever_kind_it_is() -> None:
    beside = Background("test")
    for error in (KeyError("a"), SystemExit(3)):

        def work(error: BaseException = error) -> None:
            assert threading.current_thread().daemon  # a run that fails does not wait for it
            raise error

        beside.start(work)
        with pytest.raises(AssertionError):
            beside.start(work)
        with pytest.raises(type(error)):
            beside.wait()
        beside.start(lambda: None)
        beside.wait()


def test_the_longest_come_first_and_equals_stay_in_order() -> None:
    assert longest_first([3, 9, 3, 5]) == [1, 3, 0, 2]


def test_after_an_evaluation_every_module_has_its_own_mode_and_gradients_again() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).train()
    model[0].eval()

    def failing() -> None:
        with evaluating(model):
            assert not torch.is_grad_enabled()
            assert not any(module.training for module in model.modules())
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        failing()
    assert [module.training for module in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()


def dealing(monkeypatch: pytest.MonkeyPatch, *, world: int = 2) -> list[Deal[int]]:
    """The deals of so many processes over one store."""
    store, asks = Store(), [0]
    monkeypatch.setattr(map_batches, "shared_store", lambda purpose: store)
    monkeypatch.setattr(map_batches, "any_rank", lambda flag: flag)
    deals = []
    for rank in range(world):
        monkeypatch.setattr(map_batches, "rank_and_world", lambda rank=rank: (rank, world))
        stops = rank == 0
        deals.append(Deal[int](should_stop=lambda stops=stops: stops and asks.append(1) is None))  # type: ignore[misc]
    return deals


def test_who_is_asked_to_stop_tells_the_others_through_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = dealing(monkeypatch)
    other = second.window(range(10))
    assert next(other)
    assert [batch for batch, _ in first.window(range(10))] == [0]
    assert next(other, None) is None
    for deal in (first, second):
        assert deal.stopped
        with pytest.raises(EvaluationStoppedError):
            deal.finish()


def test_in_step_one_who_is_asked_to_stop_stops_all_behind_the_same_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(map_batches, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(map_batches, "shared_store", lambda purpose: None)
    monkeypatch.setattr(map_batches, "any_rank", lambda flag: told.append(flag) or len(told) == 3)
    deal: Deal[int] = Deal(in_step=True)
    assert [batch for batch, _ in deal.window(range(8))] == [0, 2]  # the other was asked
    assert (told, deal.stopped) == ([False] * 3, True)
    monkeypatch.setattr(map_batches, "any_rank", lambda flag: True)
    deal.stopped = False
    with pytest.raises(EvaluationStoppedError, match="before its end"):
        deal.finish()


@pytest.mark.parametrize("sharded", [False, True])
def test_results_of_all_processes_come_in_the_order_of_the_batches_with_a_bar_of_ones_own_share(
    sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    class Bar:
        def __init__(self, total: int, label: str) -> None:
            events.append((total, label))

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            events.append("closed")

        def advance(self, steps: int) -> None:
            events.append(steps)

    asked: list[Any] = []

    class Dealt:
        world = 2

        def __init__(self, *, in_step: bool, should_stop: Any) -> None:
            asked.append((in_step, should_stop))

        def window(self, batches: range) -> Any:
            assert batches == range(3)
            yield from ((2, True), (0, True), (1, False))

        def finish(self) -> None:
            events.append("all are here")

    monkeypatch.setattr(map_batches, "Deal", Dealt)
    monkeypatch.setattr(map_batches.console, "progress", Bar)
    monkeypatch.setattr(map_batches, "is_sharded", lambda model: sharded)
    monkeypatch.setattr(map_batches, "gather_objects", lambda done: [done, [(1, "theirs")]])
    stop = lambda: False  # noqa: E731
    found = map_batches.map_batches(
        nn.Linear(1, 1), [[7, 8, 9], [3], [5, 6]], sum, label="replies", should_stop=stop
    )
    assert found == [24, "theirs", 11]
    assert asked == [(sharded, stop)]
    assert events == [(3, "replies"), 2, 3, "all are here", "closed"]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_in_step_every_process_computes_as_often_and_a_repeated_batch_does_not_count(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(map_batches, "rank_and_world", lambda: (rank, 3))
    monkeypatch.setattr(map_batches, "any_rank", lambda flag: flag)
    monkeypatch.setattr(map_batches, "shared_store", lambda purpose: None)
    deal: Deal[int] = Deal(in_step=True)
    assert list(deal.window(range(4))) == [(rank, True), (3, rank == 0)]


def test_results_are_taken_out_once_with_who_computed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, Any] = {}
    store = SimpleNamespace(
        check=lambda keys: keys[0] in held, get=held.get, set=held.__setitem__,
        delete_key=held.pop,
    )  # fmt: skip
    monkeypatch.setattr(map_batches, "shared_store", lambda purpose: store)
    monkeypatch.setattr(map_batches, "rank_and_world", lambda: (0, 2))
    leading = Collected()
    monkeypatch.setattr(map_batches, "rank_and_world", lambda: (1, 2))
    Collected().put(3, {"x": 1})
    leading.put(2, "here")
    assert (leading.take(3), leading.take(2), leading.take(1)) == ((1, {"x": 1}), (0, "here"), None)
    assert (leading.take(3), held) == (None, {})
