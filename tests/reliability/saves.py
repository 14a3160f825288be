"""Suite 1: whatever happens to a save or to what was saved, the run goes on as if it had not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability import faults
from tests.reliability.damaged_saves import damages, left_overs, random_kills, rotations
from tests.reliability.frame import Case
from tests.reliability.many_processes import slow_disks
from tests.reliability.tiny_runs import (
    KINDS,
    STEPS,
    STOCK,
    Bench,
    Kind,
    goes_on,
    half_written,
    newest_good_step,
)


def cases(folder: Path, subset: bool, stock: bool, groups: tuple[str, ...]) -> list[Case]:
    """All of them."""
    bench = Bench(folder)
    kinds = STOCK if stock else KINDS
    if subset:
        kinds = {
            name: kinds[name]
            for name in ("lora", "full", "full beside training", "lora on 2")
            if name in kinds
        }
    parts: dict[Callable[[], Iterable[Case]], set[str]] = {
        partial(crashes, bench, kinds, subset): {"crash", "crash_on_2"},
        partial(space, bench, kinds, subset): {"space"},
        partial(damages, bench, kinds, subset): {"damage"},
    }
    if not stock:
        every = 2 if subset else 1
        parts |= {
            partial(power, bench, subset): {"power"},
            lambda: [*rotations(bench), *left_overs(bench)][::every]: {"rotation", "left_over"},
            partial(random_kills, bench, 2 if subset else 20): {"random"},
            lambda: [] if subset else slow_disks(bench): {"slow_disk"},
        }
    wanted = [part for part, of in parts.items() if not groups or of & set(groups)]
    return [case for part in wanted for case in part()]


# --- killed while saving -------------------------------------------------------------------------


def crashes(bench: Bench, kinds: dict[str, Kind], subset: bool) -> Iterator[Case]:
    """Killed in place of every change of the disk, in either process, and in the middle of files."""
    for name, kind in kinds.items():
        for rank in range(kind.processes):
            points = changes(bench, kind, rank)
            every = 1 if name == "lora" else 5 if kind.processes == 1 else 9 - 6 * rank
            for last in range(0, len(points), every * 6 if subset else every):
                location = f"{last + 1} ({points[last]})" + (f" of process {rank}" if rank else "")
                group = "crash" if kind.processes == 1 else "crash_on_2"
                run = partial(crash, bench, kind, rank, last)
                yield Case(f"{group}: {name}, change {location}", run)
        if kind.processes == 1:
            for size in (1, 300, 1_000, 3_000, 6_000, 12_000)[:: 3 if subset else 1]:
                run = partial(killed_by_kernel, bench, kind, size)
                yield Case(f"crash: {name}, in a file at byte {size}", run)


def changes(bench: Bench, kind: Kind, rank: int) -> list[str]:
    """What changes on the disk in one save, as process `rank` sees it."""
    folder = bench.folder / f"changes {kind.name} {rank}"
    listed = folder / "changes"
    if listed.exists():
        return listed.read_text().splitlines()
    folder.mkdir()
    bench.begin(kind, folder, [STEPS - 1])

    def before(here: int) -> None:
        if here == rank:
            faults.during(*saving(kind), faults.listing(listed))

    ended = bench.start(kind, folder, before, training__keep_checkpoints=1)
    assert ended.well, ended.said[-2000:]
    return listed.read_text().splitlines()


def saving(kind: Kind) -> tuple[Any, str]:
    """What saves."""
    from transformers import Trainer

    from finetune.training.checkpointing import Saver

    if kind.stock:
        return Trainer, "_save_checkpoint"
    # Beside training it is the thread that changes the disk.
    return Saver, "_save" if "training__async_save" in kind.changes else "save"


def writing(kind: Kind) -> tuple[Any, str]:
    """What of it writes the checkpoint."""
    owner, method = saving(kind)
    return owner, method if kind.stock else "_write"


def crash(bench: Bench, kind: Kind, rank: int, last: int, folder: Path) -> str:
    """Ended in place of a change; the only earlier checkpoint would be rotated away by this save."""

    def before(here: int) -> None:
        if here == rank:
            faults.during(*saving(kind), faults.exit_at(last))

    return dies_and_goes_on(bench, kind, folder, before, code=9)


def killed_by_kernel(bench: Bench, kind: Kind, size: int, folder: Path) -> str:
    """Ended by the kernel when a file of the save reaches a size."""

    def before(here: int) -> None:
        faults.limited_files(*saving(kind), size, kill=True)

    return dies_and_goes_on(bench, kind, folder, before, code=-signal.SIGXFSZ)


def dies_and_goes_on(
    bench: Bench, kind: Kind, folder: Path, before: Callable[[int], None], code: int
) -> str:
    """Why the run that meets a fault in its last save does not go on as if nothing had been."""
    run_dir = bench.begin(kind, folder, [STEPS - 1])
    ended = bench.start(kind, folder, before, training__keep_checkpoints=1)
    if code not in ended.codes:
        return f"the fault did not happen: {ended.codes} {ended.said[-500:]}"
    if problem := half_written(kind, run_dir):
        return problem
    return goes_on(bench, kind, folder, training__keep_checkpoints=1)


# --- power cuts ----------------------------------------------------------------------------------


def power(bench: Bench, subset: bool) -> Iterator[Case]:
    """What was not forced to the disk is gone: contents, or contents and names."""
    for name in ("lora",) if subset else ("lora", "full"):
        kind = KINDS[name]
        points = changes(bench, kind, 0)
        late = [i for i, what in enumerate(points) if what.startswith(("rename", "delete", "fsync", "the end"))]  # fmt: skip
        for last in dict.fromkeys(
            [*late[:: 4 if subset else 2 if name == "lora" else 6], len(points) - 1]
        ):
            for names_lost in (False, True):
                lost = "contents and names" if names_lost else "contents"
                run = partial(power_cut, bench, kind, last, names_lost)
                yield Case(f"power: {name}, before {last + 1} ({points[last]}), {lost} lost", run)


def power_cut(bench: Bench, kind: Kind, last: int, names_lost: bool, folder: Path) -> str:
    """The power goes in a save whose rotation leaves one checkpoint."""
    run_dir = bench.begin(kind, folder, [STEPS - 1])
    note = folder / "note"

    def before(here: int) -> None:
        faults.during(*saving(kind), faults.PowerCut(run_dir, last, note))

    ended = bench.start(kind, folder, before, training__keep_checkpoints=1)
    if ended.codes != [9]:
        return f"the fault did not happen: {ended.codes}"
    faults.PowerCut.apply(run_dir, note, names_lost=names_lost)
    if not newest_good_step(run_dir):
        return "no good checkpoint is left"
    return goes_on(bench, kind, folder, training__keep_checkpoints=1)


# --- no space ------------------------------------------------------------------------------------


def space(bench: Bench, kinds: dict[str, Kind], subset: bool) -> Iterator[Case]:
    """Files that cannot grow over a size: in one save, in the last one, in one process."""
    for name, kind in kinds.items():
        sizes = (0, 100, 1_000, 3_000, 6_000, 12_000) if kind.processes == 1 else (0, 2_000)
        for size in sizes[:: 3 if subset else 1]:
            for rank in range(kind.processes):
                location = f"{name}, {size} bytes a file" + (f" in process {rank}" if kind.processes > 1 else "")  # fmt: skip
                yield Case(f"space: {location}", partial(full_disk, bench, kind, rank, size))
    if not kinds["lora"].stock:
        yield Case("space: the last save", partial(full_at_the_end, bench, "continue"))
        yield Case("space: by choice the run stops", partial(full_at_the_end, bench, "stop"))
        yield Case("space: a signal while the disk is full", partial(full_and_stopped, bench))
        yield Case("space: nothing can be written from a step on", partial(full_for_good, bench))


def full_disk(bench: Bench, kind: Kind, rank: int, size: int, folder: Path) -> str:
    """Save 2 finds no room; training goes on, says so, and the other saves are there."""
    bench.begin(kind, folder, [1])

    def before(here: int) -> None:
        if here == rank:
            only_at(2, *writing(kind), size)

    ended = bench.start(kind, folder, before)
    if not ended.well:
        return f"the run ended with {ended.codes}: {ended.said[-300:]}"
    if not kind.stock:
        from finetune.artifacts import checkpoint

        if problem := half_written(kind, folder / "run"):
            return problem
        if "no room to write" not in ended.said or "Training goes on" not in ended.said:
            return f"nothing was said: {ended.said[-300:]}"
        steps = [checkpoint.step_of(path) for path in checkpoint.checkpoints(folder / "run")]
        if steps != [1, 3, 4]:
            return f"checkpoints {steps}"
    return bench.differs(kind, folder)


def only_at(step: int, owner: Any, method: str, size: int) -> None:
    """No room while the checkpoint of `step` is saved."""
    unlimited = getattr(owner, method)
    faults.limited_files(owner, method, size, kill=False)
    limited = getattr(owner, method)

    def chosen(self: Any, *arguments: Any) -> Any:
        trainer = arguments[0] if hasattr(arguments[0], "state") else self
        return (limited if trainer.state.global_step == step else unlimited)(self, *arguments)

    setattr(owner, method, chosen)


def full_at_the_end(bench: Bench, choice: str, folder: Path) -> str:
    """The last save must be written, or any when the run is to stop for it: exit code 6."""
    kind = KINDS["lora"]
    run_dir = bench.begin(kind, folder, [1])
    step = STEPS if choice == "continue" else 2
    ended = bench.start(
        kind, folder, lambda rank: only_at(step, *writing(kind), 1_000),
        training__on_full_disk=choice,
    )  # fmt: skip
    if ended.codes != [6] or "no room to write" not in ended.said:
        return f"{ended.codes}: {ended.said[-300:]}"
    return half_written(kind, run_dir) or goes_on(bench, kind, folder)


def full_and_stopped(bench: Bench, folder: Path) -> str:
    """Asked to stop, and no room for the save that this takes: exit code 6, not 143."""
    kind = KINDS["lora"]
    run_dir = bench.begin(kind, folder, [1])

    def before(rank: int) -> None:
        from finetune.training.trainer import FineTuner

        only_at(2, *writing(kind), 1_000)
        step = FineTuner.training_step

        def signalled(self: Any, *arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *arguments)

        FineTuner.training_step = signalled  # type: ignore[method-assign]

    ended = bench.start(kind, folder, before)
    if ended.codes != [6]:
        return f"{ended.codes}: {ended.said[-300:]}"
    return half_written(kind, run_dir) or goes_on(bench, kind, folder)


def full_for_good(bench: Bench, folder: Path) -> str:
    """No log grows either: the run comes to its end and says with 6 that it is not on the disk."""
    kind = KINDS["lora"]
    run_dir = bench.begin(kind, folder, [1])

    def before(rank: int) -> None:
        from finetune.training.trainer import FineTuner

        faults.limited_files(FineTuner, "train", 0, kill=False)

    ended = bench.start(kind, folder, before, training__report_to=["tensorboard"])
    if ended.codes != [6]:
        return f"{ended.codes}"
    return half_written(kind, run_dir) or goes_on(bench, kind, folder)
