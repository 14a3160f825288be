"""Suite 3: a resumed run is the same run, or it is refused and says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability.changed_settings import changed_keys
from tests.reliability.frame import Case
from tests.reliability.tiny_runs import KINDS, LORA, STEPS, Bench, Kind


def cases(folder: Path, subset: bool, stock: bool, groups: tuple[str, ...]) -> list[Case]:
    """All of them."""
    bench = Bench(folder)
    if stock:
        return list(stock_settings(bench))
    keys = changed_keys(bench)
    others = [*other_data(bench), *other_worlds(bench), *streams(bench)]
    if subset:
        return [*keys[3::9], keys[-1], *others[::4], *moments(bench, ["lora"], ["none"])[::5]]
    return [*keys, *others, *moments(bench, ["lora", "ptuning_v2", "full"], ["none", "2", "3"])]


# --- the moment of the stop --------------------------------------------------------------------------


def moments(bench: Bench, methods: list[str], stages: list[str]) -> list[Case]:
    """After the first step, within an epoch, at its end; every method in every variant."""
    import resume_matrix as matrix

    subject = matrix.Subject(bench.model, bench.data, {})
    return [
        Case(f"moment: {line.name}, {moment}", partial(stopped, bench, line, moment, subject))
        for method in methods
        for stage in stages
        for variant in (matrix.VARIANTS if stage == "none" else ["accumulation"])
        for line in [matrix.Line(method, variant, stage)]
        for moment in (matrix.MOMENTS if stage == "none" else ["middle"])
    ]


def stopped(bench: Bench, line: Any, moment: str, subject: Any, folder: Path) -> str:
    """Equal losses, rates, gradients, scores, samples and weights."""
    import cells
    import resume_matrix as matrix

    if problem := cells.run(matrix.cell(line, line.name, subject, folder), folder):
        return f"the run without a stop failed: {problem}"
    stop = matrix.stops(folder / line.name)[moment]
    return matrix.resumed(line, stop, subject, folder, folder)


# --- other data --------------------------------------------------------------------------------------


def rows_of(data: Path) -> list[dict[str, Any]]:
    """The dialogues of a file."""
    return [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]


def other_data(bench: Bench) -> Iterator[Case]:
    """The training file changed in every way, under its old name."""

    def text(rows: list[Any]) -> None:
        rows[3]["messages"][0]["content"] += " please"

    def reply(rows: list[Any]) -> None:
        rows[3]["messages"][1]["content"] += "."

    def no_loss(rows: list[Any]) -> None:
        rows[3]["messages"][1]["train"] = False

    def weighted(rows: list[Any]) -> None:
        rows[3]["messages"][1]["weight"] = 0.5

    changes: dict[str, Callable[[list[Any]], object]] = {
        "one prompt": text,
        "one reply": reply,
        "a reply without loss": no_loss,
        "a reply with another weight": weighted,
        "a row more": lambda rows: rows.append(rows[0]),
        "a row less": lambda rows: rows.pop(),
        "another order": lambda rows: rows.reverse(),
        "a row twice": lambda rows: rows.insert(1, rows[0]),
    }
    for name, change in changes.items():
        yield Case(f"data: {name}", partial(changed_file, bench, change))
    yield Case("data: seen twice as often", partial(reweighted, bench, 2.0))
    yield Case("data: half of it", partial(reweighted, bench, 0.5))
    yield Case("data: a second file", partial(second_file, bench))
    yield Case("data: another chat template", partial(other_template, bench))
    yield Case("data: another vocabulary", partial(other_vocabulary, bench))


def refused(bench: Bench, folder: Path, *said: str, **changes: Any) -> str:
    """Why the next start is not refused with these words."""
    ended = bench.start(KINDS["lora"], folder, **changes)
    if ended.codes != [3] or not all(text in ended.said for text in said):
        return f"{ended.codes}: {ended.said[-400:]}"
    there = (folder / f"run/checkpoint-{STEPS}").exists()
    return "it trained all the same" if there else ""


def changed_file(bench: Bench, change: Callable[[list[Any]], object], folder: Path) -> str:
    """Refused: the samples of the steps that were done are no longer these."""
    bench.begin(KINDS["lora"], folder, [2])
    rows = rows_of(bench.data)
    change(rows)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return refused(bench, folder, "the training examples", data__train=str(data))


def reweighted(bench: Bench, weight: float, folder: Path) -> str:
    """Refused."""
    bench.begin(KINDS["lora"], folder, [2])
    source = {"path": str(bench.data), "weight": weight}
    return refused(bench, folder, "the training examples", data__train=[source])


def second_file(bench: Bench, folder: Path) -> str:
    """Refused."""
    bench.begin(KINDS["lora"], folder, [2])
    shutil.copy(bench.data, folder / "more.jsonl")
    both = [str(bench.data), str(folder / "more.jsonl")]
    return refused(bench, folder, "the training examples", data__train=both)


def other_template(bench: Bench, folder: Path) -> str:
    """Refused: the same dialogues would be other tokens."""
    bench.begin(KINDS["lora"], folder, [2])
    shutil.copytree(bench.model, folder / "model")
    file = folder / "model/tokenizer_config.json"
    file.write_text(file.read_text().replace("人工智能助手", "助手"))
    return refused(
        bench, folder, "the tokenizer and chat template", model__path=str(folder / "model")
    )


def other_vocabulary(bench: Bench, folder: Path) -> str:
    """Refused."""
    bench.begin(KINDS["lora"], folder, [2])
    shutil.copytree(bench.model, folder / "model")
    file = folder / "model/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer, ensure_ascii=False))
    return refused(
        bench, folder, "the tokenizer and chat template", model__path=str(folder / "model")
    )


# --- another number of processes -----------------------------------------------------------------------


def other_worlds(bench: Bench) -> Iterator[Case]:
    """The same samples go on, under ZeRO too; at another global batch it is refused."""
    for before, now in ((2, 1), (1, 2), (2, 4), (4, 1)):
        run = partial(other_world, bench, before, now)
        yield Case(f"world: {before} processes, then {now}", run, seconds=120.0)
    for stage in (2, 3):
        run = partial(other_world, bench, 2, 1, stage=stage)
        yield Case(f"world: 2 processes with ZeRO-{stage}, then 1", run, seconds=120.0)
    yield Case("world: 1 process, then 2 with twice the batch", partial(other_batch, bench))


def on(processes: int, stage: int | None = None) -> Kind:
    """Four examples a step on so many processes."""
    changes = {
        "training__batch_size": 4 // processes,
        "training__extra": {"adam_epsilon": 1e-2},  # SMOOTH_STEPS of tests/closeness.py
    }
    return Kind(f"four on {processes}, {stage}", LORA | {"dropout": 0.0}, processes, stage, changes=changes)  # fmt: skip


def other_world(
    bench: Bench, before: int, now: int, folder: Path, *, stage: int | None = None
) -> str:
    """The steps that are left see the same samples; losses differ by the order of sums at most."""
    import cells

    old, new = on(before, stage), on(now, stage)
    whole = bench.whole(old)
    (folder / "run").mkdir()
    shutil.copytree(whole / "checkpoint-2", folder / "run/checkpoint-2")
    ended = bench.start(new, folder)
    if not ended.well:
        return f"{ended.codes}: {ended.said[-400:]}"
    seen = [steps_of(cells.Cell("run", {}, kind.processes), location) for kind, location in ((old, whole.parent), (new, folder))]  # fmt: skip
    if seen[0][2:] != seen[1]:
        return f"other samples: {seen[0][2:]} and {seen[1]}"
    import closeness
    import runs
    from transformers import AutoConfig

    losses = [runs.history(location) for location in (whole, folder / "run")]
    worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
    allowed = closeness.loss_rounding(AutoConfig.from_pretrained(bench.model), 256)
    return "" if worst < allowed else f"losses differ by {worst}"


def steps_of(cell: Any, folder: Path) -> list[list[int]]:
    """The samples of every step, whoever saw them."""
    import cells

    return [sorted(s for process in step for s in process) for step in cells.samples(cell, folder)]


def other_batch(bench: Bench, folder: Path) -> str:
    """Refused with what to do."""
    (folder / "run").mkdir()
    shutil.copytree(bench.whole(on(1)) / "checkpoint-2", folder / "run/checkpoint-2")
    ended = bench.start(on(2), folder, training__batch_size=4)
    wanted = ("training.batch_size x accumulation x processes", "processes is 4")
    good = 3 in ended.codes and all(text in ended.said for text in wanted)
    return "" if good else f"{ended.codes}: {ended.said[-400:]}"


# --- where randomness comes from -----------------------------------------------------------------------


def streams(bench: Bench) -> Iterator[Case]:
    """A run is a function of its seed, and of nothing that happened before or beside it."""
    for name, changes in {
        "again": {},
        "two loader processes": {"data__loader_workers": 2},
        "no checkpoints on the way": {"training__save_every_steps": 100},
        "evaluated on the way": {"data__validation": str(bench.data), "evaluation__every_steps": 1},
    }.items():
        yield Case(f"stream: {name}", partial(same_again, bench, changes, 0))
    yield Case("stream: after other random numbers", partial(same_again, bench, {}, 1))
    yield Case("stream: another seed is another run", partial(another_seed, bench))
    yield Case("stream: orders know no history", order_without_history)


def same_again(bench: Bench, changes: dict[str, Any], drawn: int, folder: Path) -> str:
    """The same bits as the run without a change."""

    def before(rank: int) -> None:
        import random

        import numpy as np
        import torch

        for _ in range(drawn):
            random.random(), np.random.rand(), torch.rand(1)

    kind = KINDS["lora"]
    ended = bench.start(kind, folder, before, **changes)
    if not ended.well:
        return f"{ended.codes}: {ended.said[-400:]}"
    last = f"checkpoint-{STEPS}/adapter_model.safetensors"
    equal = (folder / "run" / last).read_bytes() == (bench.whole(kind) / last).read_bytes()
    return "" if equal else "other weights"


def another_seed(bench: Bench, folder: Path) -> str:
    """Otherwise the cases above would prove nothing."""
    return "" if same_again(bench, {"training__seed": 7}, 0, folder) == "other weights" else "equal"


def order_without_history(folder: Path) -> str:
    """The order of an epoch is the same whether or not others were asked for before it."""
    import numpy as np

    from finetune.data.examples.batch_plan import BatchPlan
    from finetune.data.examples.packing import pack

    lengths = np.random.default_rng(0).integers(5, 60, 203)
    for grouped in (False, True):
        plan = BatchPlan(lengths, 8, seed=42, group_by_length=grouped)
        orders = [np.concatenate(list(plan.steps(epoch))) for epoch in range(4)]
        fresh = np.concatenate(list(replace(plan).steps(3)))
        if not np.array_equal(fresh, orders[3]):
            return "the order depends on what was asked before"
        if any(np.array_equal(orders[3], order) for order in orders[:3]):
            return "two epochs have one order"
    return "" if pack(lengths, 64, 42) == pack(lengths, 64, 42) else "packing is not a function"


# --- plain Trainer ---------------------------------------------------------------------------------------


def stock_settings(bench: Bench) -> Iterator[Case]:
    """Settings changed between two starts of plain transformers.Trainer: named, or refused?"""
    changes = {
        "model.path": None, "data.train": None, "method.rank": 8, "method.dropout": 0.2,
        "training.batch_size": 3, "training.learning_rate": 1e-3, "training.lr_schedule": "constant",
        "training.warmup_steps": 2, "training.weight_decay": 0.1, "training.max_grad_norm": 0.5,
        "training.seed": 7, "training.max_steps": STEPS + 1,
    }  # fmt: skip
    for key, value in changes.items():
        yield Case(f"key: {key}", partial(stock_setting, bench, key, value))


def stock_setting(bench: Bench, key: str, value: Any, folder: Path) -> str:
    """Survived when the start fails or its output has the setting's name."""
    import runs
    import tiny

    plain = Kind("lora, plain Trainer", LORA, stock=True)
    bench.begin(plain, folder, [2])
    if key == "model.path":
        value = str(tiny.save_model(folder / "model", "glm", seed=1))
    if key == "data.train":
        value = str(runs.write_dialogues(folder / "train.jsonl", 9, seed=1))
    ended = bench.start(plain, folder, **{key.replace(".", "__"): value})
    name = key.rpartition(".")[2].replace("batch_size", "per_device_train_batch_size")
    return "" if not ended.well or name in ended.said else "not a word"
