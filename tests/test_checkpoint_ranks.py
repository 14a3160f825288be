"""A checkpoint that several processes write together."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from finetune.errors import SpaceError
from finetune.storage import folders


class Ranks:
    """Threads in place of processes, with an agreement among them."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.votes: list[int] = []
        self.lock = threading.Lock()

    def reduce_max(self, outcome: int) -> int:
        with self.lock:
            self.votes.append(outcome)
        self.barrier.wait()
        result = max(self.votes)
        if self.barrier.wait() == 0:
            self.votes.clear()
        self.barrier.wait()
        return result


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_ranks_write_into_one_folder_and_fail_together(tmp_path: Path, failing: int | None) -> None:
    run = tmp_path / "run"
    run.mkdir()
    ranks, errors = Ranks(2), {}

    def work(rank: int) -> None:
        try:
            with folders.staged(
                run / "checkpoint-1", is_rank0=rank == 0, reduce_max=ranks.reduce_max
            ) as stage:
                if rank == failing:
                    raise OSError(errno.ENOSPC, "No space left on device")
                (stage / f"rng_state_{rank}.pth").write_bytes(b"state")
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failing is None:
        assert errors == {}
        assert folders.verify(run / "checkpoint-1") == []
        assert (run / "checkpoint-1/rng_state_1.pth").exists()
    else:
        assert {rank: type(error) for rank, error in errors.items()} == {
            0: SpaceError,
            1: SpaceError,
        }
        assert list(run.iterdir()) == []
