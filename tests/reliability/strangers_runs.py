"""What strangers do to a run: numbers that are none, every way to end it, data that change meanwhile."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability.frame import Case
from tests.reliability.places import shared
from tests.reliability.signals import MOMENTS, SAVING, signalled
from tests.reliability.tiny_runs import LORA, Bench, Kind, goes_on, newest_good_step

KIND = Kind("a stranger's run", LORA)
OTHERS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
TIMES = (
    "the first forward pass of a step", "the optimizer step", "the validation loss", "generation",
    "writing predictions",
)  # fmt: skip
EACH_STEP = {"training__save_every_steps": 1}
VALUES = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": float("-inf")}


def cases() -> Iterator[Case]:
    """All of them, on one tiny model."""
    folder = shared("interrupted")
    folder.mkdir()
    bench = Bench(folder)
    yield from ways_to_end(bench)
    yield from numbers(bench)
    yield from lost_outputs(bench)
    yield from changed_sources(bench)


# --- every way that a run is ended -----------------------------------------------------------------


def ways_to_end(bench: Bench) -> Iterator[Case]:
    """Signals besides SIGTERM and Ctrl-C, each at every moment."""
    for number in OTHERS:
        name = signal.Signals(number).name
        for moment in TIMES:
            module, function, call, step = MOMENTS[moment]
            run = partial(signalled, bench, number, (module, function, call), step, {})
            yield Case(f"end: {name}, {moment}", run)
        module, function, call, step = SAVING["a save"]
        run = partial(signalled, bench, number, (module, function, call), step, EACH_STEP)
        yield Case(f"end: {name}, a save", run)
        for moment, (module, function, call, step) in (MOMENTS | SAVING).items():
            if moment not in (*TIMES, "a save"):
                changes = EACH_STEP if moment in SAVING else {}
                run = partial(signalled, bench, number, (module, function, call), step, changes)
                yield Case(f"phase: {name}, {moment}", run)


# --- numbers that are none -------------------------------------------------------------------------


def numbers(bench: Bench) -> Iterator[Case]:
    """Weights that an update poisons at a step that saves, and settings that poison them."""
    yield Case("poison: a score that is no number is never the best", never_the_best)
    for name, value in VALUES.items():
        for place in (0, -1):
            run = partial(poisoned, bench, value, place)
            yield Case(f"poison: {name} in weight {place} after an update", run)
    for option, value in (("learning_rate", 1e308), ("weight_decay", 1e30)):
        yield Case(f"poison: training.{option} {value:g}", partial(absurd, bench, option, value))
    for seed in (2**32, 2**40, 2**70):
        yield Case(f"poison: a seed of {seed}", partial(odd_seed, bench, seed))


def poisoned(bench: Bench, value: float, place: int, folder: Path) -> str:
    """Nothing is saved of it, the good checkpoint before stays although only one is kept."""

    def before(rank: int) -> None:
        from finetune.training.callbacks.schedule import Schedule

        original = Schedule.on_step_end

        def after(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == 3:
                weight = next(p for p in others["model"].parameters() if p.requires_grad)
                weight.data.view(-1)[place] = value
            original(self, args, state, control, **others)

        Schedule.on_step_end = after  # type: ignore[method-assign]

    ended = bench.start(KIND, folder, before, training__keep_checkpoints=1)
    if ended.codes != [4] or "after step 3 are not finite" not in ended.said:
        return f"ended with {ended.codes}: {ended.said[-300:]}"
    if (newest := newest_good_step(folder / "run")) != 2:
        return f"the newest checkpoint is that of step {newest}"
    return goes_on(bench, KIND, folder)


def absurd(bench: Bench, option: str, value: float, folder: Path) -> str:
    """The run ends with 4, without a checkpoint that is not finite and without a best one."""
    changes = {f"training__{option}": value, "data__validation": str(bench.data)}
    ended = bench.start(KIND, folder, **changes, evaluation__generate=False)
    if ended.codes != [4] or "Traceback" in ended.said:
        return f"ended with {ended.codes}: {ended.said[-300:]}"
    return not_finite(folder / "run")


def not_finite(run_dir: Path) -> str:
    """The checkpoints that hold numbers that are none."""
    import runs
    import torch

    bad = [
        folder.name
        for folder in run_dir.glob("checkpoint-*")
        if not all(torch.isfinite(weight).all() for weight in runs.weights(folder).values())
    ]
    return f"saved were {bad}" if bad else ""


def never_the_best(folder: Path) -> None:
    """Of no score is a value that is no number the best, nor in the way of a later one."""
    from finetune.evaluation.scores.metrics import CHOOSING, is_better

    for name in CHOOSING:
        for value in VALUES.values():
            assert not is_better(name, value, than=1.0), (name, value)
            assert not is_better(name, value, than=None), (name, value)
            if value != value or is_better(name, 1.0, than=2.0) == (value > 0):
                assert is_better(name, 1.0, than=value), (name, value)


def odd_seed(bench: Bench, seed: int, folder: Path) -> str:
    """Refused with the config, by name."""
    from tests.reliability.places import command

    path = folder / "run.yaml"
    path.write_text(json.dumps(bench.settings(KIND, folder / "run", training__seed=seed)))
    code, said = command("train", path)
    fine = code == 2 and "training.seed" in said and "Traceback" not in said
    return "" if fine else f"ended with {code}: {said[-300:]}"


# --- nobody reads the output -----------------------------------------------------------------------


def lost_outputs(bench: Bench) -> Iterator[Case]:
    """A closed pipe, a terminal that goes, streams that are closed at the start."""
    ways: dict[str, Callable[[], None]] = {
        "a closed pipe": close_pipe,
        "a terminal that has gone": close_terminal,
        "standard output closed": partial(close_streams, 1),
        "standard error closed": partial(close_streams, 2),
        "all streams closed": partial(close_streams, 0, 1, 2),
    }
    for name, lose in ways.items():
        yield Case(f"output: {name}", partial(unread, bench, lose))


def unread(bench: Bench, lose: Callable[[], None], folder: Path) -> str:
    """The run ends as without it."""
    ended = bench.start(KIND, folder, lambda rank: lose())
    return bench.differs(KIND, folder) if ended.well else f"ended with {ended.codes}: {ended.said}"


def close_pipe() -> None:
    """As `| head` leaves it."""
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(reading)
    open_anew()


def close_terminal() -> None:
    """As a connection that breaks leaves it."""
    ours, theirs = os.openpty()
    os.dup2(theirs, 1)
    os.dup2(theirs, 2)
    os.close(theirs)
    os.close(ours)
    open_anew()


def open_anew() -> None:
    """Python's streams as a program finds them: those of a fork still take the output for a file.

    A file can be sought, so that a change of their settings ends with "Illegal seek".
    """
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))


def close_streams(*numbers: int) -> None:
    """As `>&-` does it: Python finds no stream then."""
    for number in numbers:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)


# --- what a run depends on -------------------------------------------------------------------------


def changed_sources(bench: Bench) -> Iterator[Case]:
    """Between the stop and the next start."""
    for name, rows in {"fewer": 1, "more": 12, "others": 9}.items():
        yield Case(f"sources: {name} held-out rows at the resume", partial(held_out, bench, rows))


def held_out(bench: Bench, rows: int, folder: Path) -> str:
    """The change is listed, and the best checkpoint is chosen anew."""
    import runs

    path = runs.write_dialogues(folder / "held_out.jsonl", 9, seed=5)
    changes = {
        "data__validation": str(path), "evaluation__generate": False, "evaluation__every_steps": 1,
    }  # fmt: skip
    begun = bench.start(KIND, folder, training__max_steps=2, **changes)
    if not begun.well:
        return f"ended with {begun.codes}: {begun.said[-300:]}"
    runs.write_dialogues(path, rows, seed=6)
    ended = bench.start(KIND, folder, **changes)
    said = "the held-out examples: was" in ended.said and "begin anew" in ended.said
    if not (ended.well and said):
        return f"ended with {ended.codes}: {ended.said[-500:]}"
    best = json.loads((folder / "run/best.json").read_text())["checkpoint"]
    return "" if best in ("checkpoint-3", "checkpoint-4") else f"the best is still {best}"
