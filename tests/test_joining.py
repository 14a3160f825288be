"""How processes find each other and wait for each other: variables, groups, numbers, the way out."""

from __future__ import annotations

import re
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forks import in_ranks
from test_processes import among

from finetune import launcher
from finetune.distributed import position, processes
from finetune.errors import DataError, FinetuneError

# --- what the launcher says ---------------------------------------------------------------------------

THERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
NO_NUMBER = "which is no number of processes"
VARIABLES: list[tuple[dict[str, str], str | None]] = [
    ({}, None),
    ({"RANK": "0"}, None),  # as some images set it
    ({"RANK": "0", "WORLD_SIZE": "1", **THERE}, None),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **THERE}, None),
    ({"RANK": "", "WORLD_SIZE": "", "MASTER_PORT": ""}, None),
    ({"RANK": "3"}, "RANK is set without WORLD_SIZE;"),
    ({"WORLD_SIZE": "2", **THERE}, "WORLD_SIZE is set without RANK;"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is set without MASTER_ADDR and MASTER_PORT;"),
    ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "x"}, "WORLD_SIZE is set without MASTER_PORT;"),
    ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "1"}, "WORLD_SIZE is set without MASTER_ADDR;"),
    ({"WORLD_SIZE": "2", "RANK": "2", **THERE}, "RANK is 2 of 2 processes, counted from 0;"),
    ({"WORLD_SIZE": "0", "RANK": "0", **THERE}, f"WORLD_SIZE is '0', {NO_NUMBER};"),
    ({"LOCAL_WORLD_SIZE": "0"}, f"LOCAL_WORLD_SIZE is '0', {NO_NUMBER};"),
    ({"LOCAL_RANK": "0"}, None),
    ({"LOCAL_RANK": "-1"}, f"LOCAL_RANK is '-1', {NO_NUMBER};"),
    ({"RANK": "1.0"}, f"RANK is '1.0', {NO_NUMBER};"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "said"), VARIABLES, ids=[str(n) for n in range(len(VARIABLES))])  # fmt: skip
def test_each_variable_that_does_not_fit_is_named_and_what_fits_is_taken(
    variables: dict[str, str], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*launcher.NUMBERS, *THERE):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = launcher.problem()
    assert (found is None) is (said is None)
    if said:
        assert found == f"the variable {said} start with torchrun or finetune launch, or unset RANK, LOCAL_RANK and WORLD_SIZE"  # fmt: skip


def test_what_torchrun_starts_is_the_command_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr("finetune.cli.main", lambda: called.append("train"))
    program = Path(__file__).resolve().parent.parent / "finetune.py"
    runpy.run_path(str(program))  # who imports it starts nothing
    assert called == []
    runpy.run_path(str(program), run_name="__main__")
    assert called == ["train"]


# --- joining and leaving --------------------------------------------------------------------------------


class Group:
    """torch's process group and DeepSpeed's, and what is done to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, launched: bool) -> None:
        self.joined: dict[str, Any] | None = None
        self.events: list[str] = []
        for name in (*launcher.NUMBERS, *THERE):
            monkeypatch.delenv(name, raising=False)
        if launched:
            for name, value in {"RANK": "1", "WORLD_SIZE": "2", **THERE}.items():
                monkeypatch.setenv(name, value)
        fake = {
            "init_process_group": self.join, "is_initialized": lambda: self.joined is not None,
            "destroy_process_group": lambda: self.events.append("left"),
        }  # fmt: skip
        for name, value in fake.items():
            monkeypatch.setattr(processes.dist, name, value)
        monkeypatch.setattr(processes.device, "select", lambda: "card")
        monkeypatch.setattr(processes.device, "backend", lambda: "cpu:gloo,some:own")
        monkeypatch.delitem(sys.modules, "deepspeed.comm", raising=False)

    def join(self, backend: str, **given: Any) -> None:
        self.joined = {"backend": backend, **given}


def test_processes_join_with_the_backend_and_the_card_of_the_device_and_leave_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group(monkeypatch, launched=True)
    with processes.joined_processes():
        assert group.joined == {
            "backend": "cpu:gloo,some:own", "device_id": "card",
            # Commands without a training section wait as long as torch does that is told nothing.
            "timeout": torch.distributed.constants.default_pg_timeout,
        }  # fmt: skip
        assert group.events == []
    assert group.events == ["left"]


@pytest.mark.parametrize("joined", [True, False])
def test_what_deepspeed_remembers_of_a_group_goes_with_it(
    joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(monkeypatch, launched=True)
    comm = SimpleNamespace(
        is_initialized=lambda: joined,
        destroy_process_group=lambda: group.events.append("left by DeepSpeed"),
    )
    monkeypatch.setitem(sys.modules, "deepspeed.comm", comm)
    with processes.joined_processes():
        pass
    assert group.events == ["left by DeepSpeed" if joined else "left"]


def test_after_an_error_nobody_waits_for_the_others_to_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group(monkeypatch, launched=True)
    with pytest.raises(DataError, match="row 7"), processes.joined_processes():
        raise DataError("row 7")
    assert group.events == []


@pytest.mark.parametrize("deepspeed", [False, True])
def test_a_process_alone_joins_nobody_but_for_deepspeed(
    deepspeed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(monkeypatch, launched=False)
    for name in (*launcher.NUMBERS, *THERE):  # so that they are taken out again behind the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with processes.joined_processes(deepspeed=deepspeed):
        assert (group.joined is not None) is deepspeed
        assert launcher.is_launched() is deepspeed
        assert launcher.problem() is None
        if deepspeed:
            assert (launcher.rank(), launcher.world_size(), launcher.local_rank()) == (0, 1, 0)
    assert group.events == (["left"] if deepspeed else [])


@pytest.mark.parametrize("name", launcher.NUMBERS)
def test_a_variable_without_a_value_is_none_for_libraries_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(monkeypatch, launched=False)
    monkeypatch.setenv(name, "")  # as `WORLD_SIZE=$SLURM_NTASKS` outside of a job
    with processes.joined_processes():
        assert name not in processes.os.environ
        assert group.joined is None
    kept = Group(monkeypatch, launched=True)
    with processes.joined_processes():
        assert kept.joined is not None


# --- agreeing ---------------------------------------------------------------------------------------------


def test_every_exchange_is_a_point_that_all_pass_and_numbers_are_whole() -> None:
    great = 2**53 - 1  # beyond float32 and int32

    def work(rank: int) -> Any:
        patient: list[Any] = []

        @contextmanager
        def waiting() -> Any:
            patient.append("patient")
            yield

        processes.position.waiting_patiently = waiting
        group = processes.patient_group()
        called: list[int] = []

        def counted(ask: Any) -> Any:
            before, waits = position.passed(), len(patient)
            return ask(), position.passed() - before, len(patient) - waits

        def first() -> str:
            called.append(rank)
            return "of the first"

        def failing() -> str:
            raise DataError("no disk")

        def refused() -> str:
            try:
                processes.broadcast_from_rank0(failing, group)
            except DataError as error:
                return str(error)
            return "none"

        one, other = processes.shared_store("a"), processes.shared_store("a")
        one.add("key", 1)
        processes.any_rank(False)
        return {
            "max": counted(lambda: processes.reduce_max([great - rank], group)),
            "max, quick": counted(lambda: processes.reduce_max([rank])),
            "sum": counted(lambda: processes.reduce_sum([great if rank else 1.0])),
            "objects": counted(lambda: processes.gather_objects(rank, group)),
            "objects, quick": counted(lambda: processes.gather_objects(rank)),
            "any": counted(lambda: processes.any_rank(rank == 1, group)),
            "of the first": counted(lambda: processes.broadcast_from_rank0(first, group)),
            "of the first, quick": counted(lambda: processes.broadcast_from_rank0(first)),
            "called": called,
            "refused": refused(),
            "stores": [one.add("key", 0), other.add("key", 0)],
        }

    for rank, said in enumerate(in_ranks(2, work)):
        assert said["max"] == ([great], 1, 1), said
        assert said["max, quick"] == ([1], 1, 0)
        assert said["sum"] == ([great + 1], 1, 0)
        assert said["objects"] == ([0, 1], 1, 1)
        assert said["objects, quick"] == ([0, 1], 1, 0)
        assert said["any"] == (True, 1, 1)
        assert said["of the first"] == ("of the first", 1, 2)
        assert said["of the first, quick"] == ("of the first", 1, 0)
        assert said["called"] == [0, 0] * (rank == 0)
        assert said["refused"] == "no disk"
        assert said["stores"] == [2, 0]  # a store of one purpose is empty each time


def test_of_several_errors_that_of_the_first_process_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    among(monkeypatch, 4, [None, DataError("of 2"), FinetuneError("of 3")])
    with pytest.raises(DataError, match="of 2"), processes.fail_together():
        pass


def test_a_block_that_waits_for_a_disk_asks_within_its_own_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(processes, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(processes, "any_rank", lambda flag, group: asked.append(group) or True)
    monkeypatch.setattr(
        processes, "gather_objects", lambda mine, group: asked.append(group) or [DataError("x"), mine]
    )  # fmt: skip
    with pytest.raises(DataError), processes.fail_together("patient"):
        pass
    assert asked == ["patient", "patient"]
    with pytest.raises(DataError):
        processes.broadcast_from_rank0(lambda: pytest.fail("of rank 0 alone"), "patient")
    assert asked == ["patient"] * 4


def test_alone_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "new_group"):
        monkeypatch.setattr(processes.dist, name, lambda *_, **__: pytest.fail("nobody is there"))
    assert processes.rank_and_world() == (0, 1)
    assert processes.is_rank0()
    assert processes.reduce_max((3, 1)) == [3, 1]
    assert processes.reduce_sum((0.5,)) == [0.5]
    assert [processes.any_rank(flag) for flag in (True, False)] == [True, False]
    assert processes.gather_objects("x") == ["x"]
    assert processes.broadcast_from_rank0(lambda: 7) == 7
    assert processes.shared_store("x") is None
    assert processes.patient_group() is None


@pytest.mark.parametrize(
    ("backend", "there"),
    [("nccl", "meta"), ("hccl", "meta"), ("xccl", "meta"), ("gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu")],
)  # fmt: skip
def test_numbers_are_exchanged_on_the_cpu_wherever_gloo_is(
    backend: str, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.dist, "get_backend", lambda group: backend if group else "gloo")
    monkeypatch.setattr(processes.device, "local_device", lambda: torch.device("meta"))
    assert processes._collective_device("group") == torch.device(there)
    assert processes._collective_device() == torch.device("cpu")


def test_a_disk_is_waited_for_longer_than_the_largest_checkpoint_takes() -> None:
    # 9B parameters with two float32 moments and their originals are 130 GB, 355B 5 TB: at 200 MB/s
    # seven hours. torch keeps a timeout in milliseconds of 64 bits, so a day would do as well.
    assert 7 < processes.PATIENCE.total_seconds() / 3600 <= 24


def test_a_port_that_is_found_free_can_be_taken() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", processes._free_port()))
        assert re.fullmatch(r"\d+", str(taken.getsockname()[1]))
