"""A process of the run, or one that loads for it, that is killed, raises, leaves or hangs."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability.faults import at
from tests.reliability.frame import Case
from tests.reliability.tiny_runs import LORA, Bench, Kind, goes_on

HANG = 0.1
"""Minutes that the others wait for one that hangs."""
LIMIT = 30.0
"""Seconds until every process is gone."""


def raising() -> None:
    """An error that nobody foresaw."""
    raise ValueError("broken on purpose")


def hanging() -> None:
    """Longer than anyone waits."""
    time.sleep(600)


FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "is killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "gone without a word"),
    "raises": (raising, "failed: ValueError: broken on purpose"),
    "leaves": (lambda: sys.exit(0), "left before the run was done"),
    "leaves without a word": (lambda: os._exit(0), "gone without a word"),
    "hangs": (hanging, "hanging"),
}
PLACES = {
    "loading": ("finetune.training.checkpointing", "run_record"),
    "a step": ("finetune.training.trainer", "FineTuner.compute_loss"),
    "an evaluation": ("finetune.evaluation.loss", "row_losses"),
    "a save": ("finetune.training.checkpointing", "Saver.save_weights"),
}


def less_patience() -> None:
    """The processes miss each other sooner than a user's, which the whole suite waits for."""
    from finetune.distributed import watchdog

    watchdog.BEAT, watchdog.SILENCE, watchdog.QUIET = 0.25, 2.0, 10.0


def broken_processes(bench: Bench, *, patient: bool) -> Iterator[Case]:
    """Every fault of either process in a step; kills, errors and hangs elsewhere too."""
    for rank in (0, 1):
        for fault in FAULTS:
            for place in PLACES:
                if place == "a step" or (rank == 1 and fault in ("is killed", "raises", "hangs")):
                    run = partial(broken, bench, (rank, fault, place, None), patient)
                    yield Case(f"process: {rank} of 2 {fault}, {place}", run, seconds=150.0)
    for fault in ("is killed", "raises", "hangs"):
        run = partial(broken, bench, (1, fault, "a step", 3), patient)
        yield Case(f"process: 1 of 2 {fault}, a step, ZeRO-3", run, seconds=150.0)


def broken(
    bench: Bench, what: tuple[int, str, str, int | None], patient: bool, folder: Path
) -> str:
    """All end by themselves and in time, one line says which process and why; then it goes on."""
    rank, fault, place, stage = what
    two = Kind(
        f"on 2, {stage}", LORA, 2, stage,
        changes={"data__validation": str(bench.data), "evaluation__every_steps": 2, "evaluation__generate": False},
    )  # fmt: skip
    act, reason = FAULTS[fault]

    def before(here: int) -> None:
        if not patient:
            less_patience()
        if here == rank:
            at(*PLACES[place], 2 if place == "a step" else 1, act)

    store, environment = as_under_torchrun(folder)
    begun = time.monotonic()
    hang = {"training__process_timeout_minutes": HANG} if fault == "hangs" else {}
    ended = bench.start(
        two, folder, before, environment=environment, grace=LIMIT + 60 * HANG, **hang
    )
    seconds = time.monotonic() - begun
    del store
    other = ended.codes[1 - rank]
    if other in (0, -signal.SIGKILL):
        return f"the other one ended with {other} after {seconds:.0f} s: {ended.said[-300:]}"
    if fault == "hangs" and ended.codes[rank] in (0, -signal.SIGKILL):
        return f"the one that hangs ended with {ended.codes[rank]}"
    # One reason, on every machine: the process that hangs is told why it is ended, too.
    said = sorted(set(re.findall(r"^error: .*$", ended.said, flags=re.MULTILINE)))
    if len(said) != 1 or f"process {rank} " not in said[0] or reason not in said[0]:
        return f"it said {said or ended.said[-300:]}"
    return goes_on(bench, two, folder)


def as_under_torchrun(folder: Path) -> tuple[Any, dict[str, str]]:
    """A store that outlives every process, and the variables by which they know of a launcher."""
    import runs
    from torch.distributed import TCPStore

    port = runs.free_port()
    (folder / "attempt/0").mkdir(parents=True)
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False), {
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_ERROR_FILE": str(folder / "attempt/0/error.json"),
    }


def broken_loaders(bench: Bench) -> Iterator[Case]:
    """The same of a process that loads batches."""
    for processes in (1, 2):
        for fault in FAULTS:
            if fault != "leaves" and (processes == 1 or fault in ("is killed", "hangs")):
                run = partial(broken_loader, bench, processes, fault)
                yield Case(f"loader: of process {processes - 1} {fault}", run, seconds=150.0)


def broken_loader(bench: Bench, processes: int, fault: str, folder: Path) -> str:
    """The run ends with one line that says so, and no loader outlives it."""
    rank = processes - 1
    kind = Kind(f"loading on {processes}", LORA, processes, changes={"data__loader_workers": 1})
    pids = folder / "pids"

    def before(here: int) -> None:
        from torch.utils.data import get_worker_info

        from finetune.training.loading.batches import WithBlanks

        get, calls = WithBlanks.__getitem__, [0]

        def broken_get(self: Any, index: int) -> Any:
            calls[0] += 1
            if get_worker_info() is not None and here == rank and calls[0] == 4:
                with pids.open("a") as file:
                    file.write(f"{os.getpid()}\n")
                FAULTS[fault][0]()
            return get(self, index)

        WithBlanks.__getitem__ = broken_get  # type: ignore[method-assign]

    store, environment = as_under_torchrun(folder)
    if processes == 1:
        environment = {}
    ended = bench.start(
        kind, folder, before, environment=environment, grace=LIMIT,
        training__process_timeout_minutes=HANG,
    )  # fmt: skip
    del store
    if any(code in (0, -signal.SIGKILL) for code in ended.codes):
        return f"ended with {ended.codes}: {ended.said[-300:]}"
    if fault != "raises":
        said = re.findall(r"^error: .*$", ended.said, flags=re.MULTILINE)
        if len(said) != 1 or f"process {rank}: a loader process failed" not in said[0]:
            return f"it said {said or ended.said[-300:]}"
    elif "broken on purpose" not in ended.said:
        return f"it said {ended.said[-300:]}"
    if any(alive(int(pid)) for pid in pids.read_text().split()):
        return "a loader process is still there"
    return goes_on(bench, kind, folder)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be counted does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
