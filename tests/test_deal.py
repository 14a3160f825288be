"""Batches are shared out so that all processes are busy, whatever their number and their speed."""

from __future__ import annotations

import heapq
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_generate as here

import finetune.models
from finetune.distributed import map_batches
from finetune.distributed.map_batches import Deal
from finetune.generation.generate import generate


class Store(dict[str, int]):
    """The process group's store, without processes."""

    def add(self, key: str, more: int) -> int:
        self[key] = self.get(key, 0) + more
        return self[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def set(self, key: str, value: Any) -> None:
        self[key] = value


class Process:
    """One process of a simulated deal."""

    def __init__(self, rank: int, windows: list[range]) -> None:
        self.rank = rank
        self.deal: Deal[int] = Deal()
        self.computed: list[int] = []
        self._batches = self._through(windows)

    def _through(self, windows: list[range]) -> Iterator[int]:
        for window in windows:
            for batch, counts in self.deal.window(window):
                assert counts
                self.computed.append(batch)
                yield batch

    def take(self) -> bool:
        return next(self._batches, None) is not None


def shared_out(
    number: int,
    world: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    window: int = 64,
    seconds: Any = None,
) -> tuple[list[int], list[float]]:
    """Batches that each process computes, and when it has nothing left to do.

    `seconds(rank)` is what the next batch takes there.
    """
    seconds = seconds or (lambda rank: 1.0)
    store = Store()
    monkeypatch.setattr(map_batches, "shared_store", lambda _: store)
    monkeypatch.setattr(map_batches, "any_rank", lambda flag: flag)
    windows = [range(at, min(at + window, number)) for at in range(0, number, window)]
    processes = []
    for rank in range(world):
        monkeypatch.setattr(map_batches, "rank_and_world", lambda rank=rank: (rank, world))
        processes.append(Process(rank, windows))
    free, ends = [(0.0, rank) for rank in range(world)], [0.0] * world
    while free:
        now, rank = heapq.heappop(free)
        if processes[rank].take():
            heapq.heappush(free, (now + seconds(rank), rank))
        else:
            ends[rank] = now
    assert sorted(batch for one in processes for batch in one.computed) == list(range(number))
    return [len(one.computed) for one in processes], ends


@pytest.mark.parametrize("world", range(1, 65))
def test_equally_fast_processes_compute_as_many_batches_to_within_one(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (0, 1, world - 1, world, world + 1, 63, 64, 65, 200):
        batches, _ = shared_out(number, world, monkeypatch)
        assert max(batches) - min(batches) <= 1


def test_of_256_prompts_in_batches_of_16_all_8_processes_get_32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert shared_out(256 // 16, 8, monkeypatch)[0] == [2] * 8
    many, _ = shared_out(-(-1070 // 16), 8, monkeypatch)
    assert 16 * max(many) <= 1.1 * 1070 / 8


@pytest.mark.parametrize("world", [2, 3, 8, 17, 64])
@pytest.mark.parametrize("number", [16, 67, 64 * 5 + 7])
def test_nobody_waits_long_for_a_process_that_is_ten_times_slower(
    world: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(world)

    def seconds(rank: int) -> float:
        return (10.0 if rank == 0 else 1.0) * chance.uniform(0.8, 1.2)

    batches, ends = shared_out(number, world, monkeypatch, seconds=seconds)
    best = number / (world - 1 + 0.1)
    assert max(ends) <= 1.2 * best + 2 * 12.0  # two batches of the slow one
    assert max(ends[1:]) - min(ends[1:]) <= 4.0
    if number > 10 * world:
        assert batches[0] < min(batches[1:]) / 2


WORKER = """
import json, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
sys.path[:0] = [TESTS]
import test_generate as here
from pathlib import Path
from finetune.generation.generate import Generator, Window
from finetune.generation.prompts import window_size
model, prompts = here.open_tiny(Path(FOLDER)), here.prompts(COUNT)
stops = here.Stops(stop_ids=(*here.tiny.EOS_IDS, *range(0, here.tiny.NUM_RANKS, 3)))
generator = Generator(model, stops, max_new_tokens=12, batch_size=16)
size = window_size(16)
windows = (Window(prompts[at : at + size]) for at in range(0, COUNT, size))
replies = [[r.ids, r.stopped] for window in generator.replies(windows) for r in window]
if dist.get_rank() == 0:
    Path(OUT).write_text(json.dumps([replies, generator.prompts_per_rank]))
dist.barrier()
dist.destroy_process_group()
"""


def in_processes(world: int, count: int, model: Path, folder: Path) -> tuple[Any, list[int]]:
    """Replies of so many real processes, and the prompts that each answered."""
    names = {"TESTS": str(Path(__file__).parent), "FOLDER": str(model), "OUT": str(folder / "out.json"), "COUNT": count}  # fmt: skip
    script = folder / "worker.py"
    script.write_text("".join(f"{key} = {value!r}\n" for key, value in names.items()) + WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]  # fmt: skip
    root = Path(finetune.models.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, str(script)], env=environment, timeout=400, check=True)
    replies, per_rank = json.loads((folder / "out.json").read_text())
    return replies, per_rank


def check_processes(world: int, count: int, model: Path, folder: Path) -> list[int]:
    """Prompts that each process answered, once the replies are found to be those of one."""
    stops = here.Stops(stop_ids=(*here.tiny.EOS_IDS, *range(0, here.tiny.NUM_RANKS, 3)))
    alone = generate(
        here.open_tiny(model), stops, here.prompts(count), max_new_tokens=12, batch_size=16
    )
    replies, per_rank = in_processes(world, count, model, folder)
    assert replies == [[list(reply.ids), reply.stopped] for reply in alone]
    return per_rank


@pytest.mark.slow
def test_four_processes_are_all_busy_and_give_the_replies_of_one(
    tiny_glm: Path, tmp_path: Path
) -> None:
    assert check_processes(4, 128, tiny_glm, tmp_path) == [32] * 4
