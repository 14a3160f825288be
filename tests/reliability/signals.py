"""Suite 2: signals at every moment, and processes that die, raise, leave or hang."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability.broken_processes import (
    as_under_torchrun,
    broken_loaders,
    broken_processes,
)
from tests.reliability.faults import at
from tests.reliability.frame import Case
from tests.reliability.many_processes import blocking_backends
from tests.reliability.tiny_runs import LORA, STEPS, Bench, Kind, goes_on

EVALUATED = {
    "evaluation__every_steps": 2,
    "evaluation__at_start": True,
    "evaluation__max_samples": 3,
    "training__gradient_accumulation_steps": 2,
    "training__batch_size": 1,
    "training__save_every_steps": 100,
}
TERM, INT = signal.SIGTERM, signal.SIGINT
NAMES = {TERM: "SIGTERM", INT: "SIGINT"}

GENERATION = "evaluate_model"
# Moment -> (module, name, which call, steps that are done and saved by then). 0: nothing to save.
MOMENTS: dict[str, tuple[str, str, int, int]] = {
    "reading the config": ("finetune.cli.inputs", "_data_problems", 1, 0),
    "opening the tokenizer": ("finetune.training.loading.prepare_data", "load_chat_tokenizer", 1, 0),
    "tokenising": ("finetune.training.loading.prepare_data", "load_examples", 1, 0),
    "loading the model": ("finetune.training.prepare_model", "prepare_model", 1, 0),
    "choosing a checkpoint": ("finetune.training.resume", "start", 1, 0),
    "the evaluation before the first step": ("finetune.evaluation.loss", "row_losses", 1, 0),
    "the first forward pass of a step": ("finetune.training.trainer", "FineTuner.compute_loss", 3, 2),
    "the second forward pass of a step": ("finetune.training.trainer", "FineTuner.compute_loss", 4, 2),
    "before the optimizer step": ("finetune.training.trainer", "FineTuner._guard", 2, 2),
    "the optimizer step": ("finetune.training.callbacks.schedule", "Schedule.on_step_end", 2, 2),
    "logging": ("finetune.training.callbacks.schedule", "MetricsFile.on_log", 3, 2),
    "the validation loss": ("finetune.evaluation.loss", "row_losses", 12, 2),
    "generation": ("finetune.training.measuring.validation", GENERATION, 2, 2),
    "writing predictions": ("finetune.training.measuring.validation", "write_predictions", 2, 3),
    "the evaluation after the last step": ("finetune.training.measuring.validation", GENERATION, 3, 4),
}  # fmt: skip
SAVING = {
    "a save": ("finetune.training.checkpointing", "Saver._write", 2, 3),
    "the manifest of a save": ("finetune.storage.folders", "seal", 2, 3),
    "the rename of a save": ("finetune.storage.folders", "commit", 2, 3),
    "a rotation": ("finetune.artifacts.checkpoint", "rotate", 2, 3),
}
LATER = {
    "logging of a later step": (
        "finetune.training.callbacks.progress",
        "ProgressCallback.on_step_end",
        2,
    ),
    "when the run is saved": ("finetune.training.callbacks.progress", "summary", 1),
}


def cases(folder: Path, subset: bool, stock: bool, groups: tuple[str, ...]) -> list[Case]:
    """All of them."""
    bench = Bench(folder)
    if stock:
        return list(stock_signals(bench))
    found = [*signals(bench), *second_signals(bench), *one_of_two(bench)]
    broken = [*broken_processes(bench, patient=not subset), *broken_loaders(bench)]
    if not subset:
        return [*found, *broken, *blocking_backends(bench)]
    # torchrun itself is asked to stop in tests/test_trainer_stops.py
    return [case for case in (*found[::6], *broken[::5]) if "torchrun" not in case.name]


def kind(bench: Bench, processes: int = 1, stage: int | None = None) -> Kind:
    """LoRA, evaluated every second step, saved only when asked to stop."""
    changes = {**EVALUATED, "data__validation": str(bench.data)}
    if processes > 1:  # prompts for each of them
        changes |= {"evaluation__max_samples": 9, "evaluation__batch_size": 1}
    return Kind(f"evaluated on {processes}, {stage}", LORA, processes, stage, changes=changes)


def act_at(module: str, name: str, call: int, act: Callable[[], object], **options: bool) -> None:
    """As `at`; in the middle of a generation, where a function is called for every token."""
    if name != GENERATION:
        at(module, name, call, act, **options)
        return
    from finetune.training.measuring import validation

    evaluate, calls = validation.evaluate_model, [0]

    def evaluated(*arguments: Any, should_stop: Callable[[], bool], **others: Any) -> Any:
        calls[0] += 1
        polls = [0]

        def polled() -> bool:
            polls[0] += 1
            if (calls[0], polls[0]) == (call, 3):
                act()
            return should_stop()

        return evaluate(*arguments, should_stop=polled, **others)

    validation.evaluate_model = evaluated  # type: ignore[assignment]


def send(*numbers: int) -> None:
    """Signals to this process, one after the other."""
    for number in numbers:
        os.kill(os.getpid(), number)


# --- one process -----------------------------------------------------------------------------------


def signals(bench: Bench) -> Iterator[Case]:
    """Both signals at every moment."""
    for number in (TERM, INT):
        for moment, (module, name, call, step) in MOMENTS.items():
            run = partial(signalled, bench, number, (module, name, call), step, {})
            yield Case(f"signal: {NAMES[number]}, {moment}", run)
        for moment, (module, name, call, step) in SAVING.items():
            run = partial(signalled, bench, number, (module, name, call), step, {"training__save_every_steps": 1})  # fmt: skip
            yield Case(f"signal: {NAMES[number]}, {moment}", run)
        for moment in ("a step", "the validation loss", "generation"):
            run = partial(to_all, bench, number, moment)
            yield Case(f"signal: {NAMES[number]} to the whole group, {moment}", run)


def signalled(
    bench: Bench,
    number: int,
    moment: tuple[str, str, int],
    step: int,
    changes: dict[str, Any],
    folder: Path,
) -> str:
    """A signal at a moment: the step is saved, the exit code says so, and the next start goes on."""
    one = kind(bench)
    ended = bench.start(one, folder, lambda rank: act_at(*moment, lambda: send(number)), **changes)
    expected = [128 + number] if step else [128 + number, -number]
    if ended.codes[0] not in expected:
        return f"ended with {ended.codes}: {ended.said[-300:]}"
    return newest_is(step, folder) or goes_on(bench, one, folder)


def newest_is(step: int, folder: Path) -> str:
    """Why the newest checkpoint is not that of a step; 0: there is none."""
    from finetune.artifacts import checkpoint

    found = [checkpoint.step_of(path) for path in checkpoint.checkpoints(folder / "run")]
    wanted = found[-1:] == [step] if step else not found
    return "" if wanted else f"saved are {found} instead of {step}"


def to_all(bench: Bench, number: int, moment: str, folder: Path) -> str:
    """As Ctrl-C in a terminal and torchrun do it: every process of the group gets it too."""
    one = kind(bench)

    def act() -> None:
        from multiprocessing import active_children

        if moment == "a step" and not active_children():
            os._exit(77)
        for process in (*children_in_group(), os.getpid()):
            os.kill(process, number)

    place = MOMENTS["the first forward pass of a step" if moment == "a step" else moment]
    changes = {"data__loader_workers": 1} if moment == "a step" else {}
    ended = bench.start(one, folder, lambda rank: act_at(*place[:3], act), **changes)
    if ended.codes != [128 + number] or "Traceback" in ended.said:
        return f"ended with {ended.codes}: {ended.said[-300:]}"
    return newest_is(place[3], folder) or goes_on(bench, one, folder)


def children_in_group() -> list[int]:
    """The processes that this one has started and that a signal to its group reaches."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in map(int, found) if os.getpgid(pid) == os.getpgrp()]


def second_signals(bench: Bench) -> Iterator[Case]:
    """The second one ends the process where it is; a launcher's echo of Ctrl-C is no second one."""
    for moment in ("the first forward pass of a step", "generation"):
        for numbers in ((TERM, TERM), (INT, INT)):
            run = partial(twice, bench, MOMENTS[moment][:3], numbers)
            yield Case(f"signal: twice {NAMES[numbers[0]]}, {moment}", run)
    for moment in SAVING:
        run = partial(twice, bench, SAVING[moment][:3], (TERM, TERM))
        yield Case(f"signal: twice SIGTERM, {moment}", run)
    for number in (INT, TERM):
        yield Case(f"signal: {NAMES[number]} and its echo", partial(echoed, bench, number))


def twice(bench: Bench, moment: tuple[str, str, int], numbers: tuple[int, ...], folder: Path) -> str:  # fmt: skip
    """No step is waited for; the next start goes on from whatever was saved before."""
    one = kind(bench)

    def act() -> None:
        from finetune.distributed import signals

        signals.ECHO = 0.1
        send(numbers[0])
        time.sleep(0.2)
        send(numbers[1])

    ended = bench.start(
        one, folder, lambda rank: act_at(*moment, act), training__save_every_steps=1
    )
    if ended.codes != [128 + numbers[0]] or "at once" not in ended.said:
        return f"ended with {ended.codes}: {ended.said[-300:]}"
    return goes_on(bench, one, folder)


def echoed(bench: Bench, number: int, folder: Path) -> str:
    """A signal from a terminal or a process manager, and the launcher's SIGTERM: the step is saved."""
    one = kind(bench)
    moment = MOMENTS["the first forward pass of a step"][:3]
    ended = bench.start(one, folder, lambda rank: at(*moment, lambda: send(number, TERM)))
    if ended.codes != [128 + number]:
        return f"ended with {ended.codes}: {ended.said[-300:]}"
    return newest_is(2, folder) or goes_on(bench, one, folder)


# --- two processes ---------------------------------------------------------------------------------


def one_of_two(bench: Bench) -> Iterator[Case]:
    """A signal that only one process gets, or both at unlike moments: all stop after one step."""
    for stage in (None, 2, 3):
        for rank in (0, 1):
            for moment in ("before the optimizer step", "the optimizer step", "generation"):
                if stage is None or (rank, moment) == (stage % 2, "the optimizer step"):
                    location = "plain" if stage is None else f"ZeRO-{stage}"
                    run = partial(to_one, bench, stage, {rank: moment})
                    yield Case(f"signal_on_2: process {rank} ({location}), {moment}", run)
    unlike = {0: "the optimizer step", 1: "logging of a later step"}
    yield Case("signal_on_2: both, at unlike moments", partial(to_one, bench, None, unlike))
    late = {0: "the optimizer step", 1: "when the run is saved"}
    yield Case("signal_on_2: both, one when all is saved", partial(to_one, bench, None, late))
    yield Case("signal_on_2: the launcher dies after it asked", partial(launcher_dies, bench))
    for number in (TERM, INT, signal.SIGHUP):
        run = partial(to_torchrun, bench, number)
        yield Case(f"signal_on_2: {signal.Signals(number).name} to torchrun", run, seconds=240.0)


def to_one(bench: Bench, stage: int | None, moments: dict[int, str], folder: Path) -> str:
    """All processes stop after the same step, and go on as one."""
    two = kind(bench, 2, stage)

    def before(rank: int) -> None:
        if rank in moments:
            later = moments[rank] == "logging of a later step"
            moment = LATER.get(moments[rank]) or MOMENTS[moments[rank]][:3]
            act_at(*moment, lambda: send(TERM), after=later)

    ended = bench.start(two, folder, before)
    if not any(ended.codes) and (folder / f"run/checkpoint-{STEPS}").exists():
        return "it did not stop"
    if ended.codes != [143, 143]:
        return f"ended with {ended.codes}: {ended.said[-400:]}"
    return goes_on(bench, two, folder)


def launcher_dies(bench: Bench, folder: Path) -> str:
    """Its store goes with it while the step is being saved: the save is finished all the same."""
    two = kind(bench, 2)
    launcher, environment = launcher_process(folder)

    def before(rank: int) -> None:
        from finetune.distributed import signals

        signals.ECHO = 0.1

        def act() -> None:
            os.kill(launcher, signal.SIGKILL)
            time.sleep(3)  # the processes look for it every second

        at(*MOMENTS["the optimizer step"][:3], lambda: send(TERM))
        at(*SAVING["a save"][:2], 1, act if rank == 0 else lambda: None)

    ended = bench.start(two, folder, before, environment=environment)
    os.waitpid(launcher, 0)
    if ended.codes != [143, 143] or "second signal" in ended.said:
        return f"ended with {ended.codes}: {ended.said[-400:]}"
    return newest_is(2, folder) or goes_on(bench, two, folder)


def launcher_process(folder: Path) -> tuple[int, dict[str, str]]:
    """A process that holds the store, as torchrun does, and the variables that tell of it."""
    reading, writing = os.pipe()
    if (launcher := os.fork()) == 0:
        store, environment = as_under_torchrun(folder)
        os.write(writing, json.dumps(environment).encode())
        os.close(writing)
        while store is not None:
            time.sleep(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return launcher, json.load(pipe)


def to_torchrun(bench: Bench, number: int, folder: Path) -> str:
    """The real launcher, asked to stop while its two processes train."""
    import runs

    two = kind(bench, 2)
    settings = bench.settings(
        two, folder / "run", training__max_steps=4000, training__lr_schedule="constant",
        evaluation__every_steps=4000, evaluation__at_start=False,
    )  # fmt: skip
    process = runs.start_command(settings, folder, processes=2)
    runs.wait_for_steps(folder / "run", process)
    process.send_signal(number)
    said = "".join(process.communicate(timeout=100))
    steps = len(runs.history(folder / "run"))
    if process.returncode == 0 or "second signal" in said:
        return f"torchrun ended with {process.returncode}: {said[-500:]}"
    return newest_is(steps, folder)


# --- plain Trainer ---------------------------------------------------------------------------------


def stock_signals(bench: Bench) -> Iterator[Case]:
    """The moments that plain transformers.Trainer has, with a checkpoint after every second step."""
    plain = Kind("plain Trainer", LORA, stock=True)
    moments = {
        "a forward pass": ("transformers", "Trainer.compute_loss", 3, 3),
        "before the optimizer step": ("transformers", "Trainer._get_grad_norm", 3, 3),
        "logging": ("transformers", "Trainer.log", 3, 3),
        "a save": ("transformers", "Trainer._save_checkpoint", 1, 2),
    }
    for number in (TERM, INT):
        for moment, (module, name, call, step) in moments.items():
            run = partial(stock_signalled, bench, plain, number, (module, name, call), step)
            yield Case(f"signal: {NAMES[number]}, {moment}", run)


def stock_signalled(
    bench: Bench, plain: Kind, number: int, moment: tuple[str, str, int], step: int, folder: Path
) -> str:
    """The same judgement."""
    every = {"training__save_every_steps": 2}
    ended = bench.start(plain, folder, lambda rank: act_at(*moment, lambda: send(number)), **every)
    if ended.codes[0] not in (128 + number, -number):
        return f"ended with {ended.codes}"
    return newest_is(step, folder) or goes_on(bench, plain, folder, **every)
