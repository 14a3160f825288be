"""Four and eight processes; a disk slower than the processes wait for each other; a backend that never says so."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.reliability.frame import Case
from tests.reliability.tiny_runs import FULL, LORA, STEPS, Bench, Kind, newest_good_step

SHORT = 2 / 60
"""Minutes that processes wait for each other."""
REASONS = {
    "is killed": "gone without a word",
    "raises": "failed: ValueError: broken on purpose",
    "hangs": "is hanging",
}


def blocking_backends(bench: Bench) -> Iterator[Case]:
    """The last process meets its fault, and the others wait for their device for ever, as with NCCL."""
    for world in (2, 4, 8):
        for fault in REASONS:
            run = partial(blocked, bench, world, fault)
            yield Case(f"blocking: {world - 1} of {world} {fault}", run, seconds=200.0)


def blocked(bench: Bench, world: int, fault: str, folder: Path) -> str:
    """All others end by themselves and say which process it was and why."""
    from rank_runs import blocking

    kind = Kind(f"on {world}", LORA, world, changes={"training__batch_size": 1})
    ended = bench.start(
        kind, folder, blocking(world - 1, fault, world), grace=60, training__process_timeout_minutes=0.05
    )  # fmt: skip
    if any(code in (0, -signal.SIGKILL) for code in ended.codes[:-1]):
        return f"{ended.codes}: {ended.said[-300:]}"
    said = sorted(set(re.findall(r"^error: .*$", ended.said, flags=re.MULTILINE)))
    named = f"process {world - 1} "
    good = said and all(named in line and REASONS[fault] in line for line in said)
    return "" if good else f"it said {said or ended.said[-300:]}"


def slow_disks(bench: Bench) -> Iterator[Case]:
    """A save that takes twice as long as processes wait for each other, in front and beside training."""
    for world in (2, 4, 8):
        for beside in (False, True):
            run = partial(slow, bench, world, beside=beside)
            name = f"{world} processes" + (", beside training" if beside else "")
            yield Case(f"slow_disk: {name}", run, seconds=200.0)


def slow(bench: Bench, world: int, folder: Path, *, beside: bool) -> str:
    """The run ends well, with its last checkpoint."""
    from save_runs import slow_disk

    changes = {"training__batch_size": 1, "training__async_save": beside}
    kind = Kind(f"full on {world}", FULL, world, changes=changes)
    ended = bench.start(
        kind, folder, slow_disk(0.6), grace=60, training__process_timeout_minutes=SHORT,
        training__save_every_steps=STEPS,
    )  # fmt: skip
    if not ended.well:
        return f"{ended.codes}: {ended.said[-400:]}"
    newest = newest_good_step(folder / "run")
    return "" if newest == STEPS else f"the newest checkpoint is {newest}"
