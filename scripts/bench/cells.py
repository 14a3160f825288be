"""Small training runs side by side: torch is imported once, and every process of a run is a fork.

A fork knows nothing of the run before it (DeepSpeed and accelerate keep global state), and sees
the same variables as under torchrun. `PYTHONPATH` needs nothing: this file finds the checkout.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

for name, value in (("OMP_NUM_THREADS", "1"), ("DS_ACCELERATOR", "cpu"), ("HF_HUB_OFFLINE", "1"),
                    ("TOKENIZERS_PARALLELISM", "false"), ("CUDA_VISIBLE_DEVICES", "")):  # fmt: skip
    os.environ.setdefault(name, value)

Settings = dict[str, Any]
FAMILIES = (
    "chatglm", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm4v",
    "glm4.1v", "glm46v", "glm_ocr", "glm4v_moe",
)  # fmt: skip
"""Of `model_type` chatglm with and without images, and the others; glm4v is GLM-4V, glm4.1v the later type of that name."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    name: str
    """Also the name of its log files."""
    settings: Settings
    """A RunConfig as plain values."""
    processes: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    before: Callable[[int], object] | None = None
    """Called in each process with its number, before anything else, to break something."""
    program: Callable[[Path], object] | None = None
    """What is run with a file of the settings instead of `finetune train`."""


def subject(
    family: str, folder: Path, count: int, *, weights: bool = False
) -> tuple[Path, Path, dict[str, Any]]:
    """A tiny model, `count` dialogues for it, and what its runs change in a config.

    Where there is a tower it is frozen. Of GLM-4V every third dialogue shows an image, of the later ones
    two do, up to three images in two turns: batches with and without meet in the same forward pass of
    two processes.
    """
    import pictures
    import runs
    import tiny

    seeing = {"model__freeze": ["vision"], "data__group_by_length": False}
    if family == "glm4v":
        data = pictures.write_dialogues(folder / "data", count, every=3)
        return pictures.save_model(folder / "model"), data, seeing
    if (grid := {"glm4.1v": "glm4v"}.get(family, family)) in pictures.GRID_FAMILIES:
        model = pictures.save_grid_model(folder / "model", grid)
        return model, pictures.write_albums(folder / "data", count), seeing
    model = tiny.save_model(folder / "model", family)
    return model, runs.write_dialogues(folder / "train.jsonl", count, weights=weights), {}


def import_libraries() -> None:
    """Import what forks of this process will need; it takes longer than most cells."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no helper processes: nothing is compiled
    from finetune.config.schema import DeepSpeedSection
    from finetune.training.deepspeed import zero

    zero.prepare_libraries(DeepSpeedSection())
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
    import nltk.translate.bleu_score  # noqa: F401  (it brings SciPy)

    import finetune.training.run
    import finetune.training.trainer  # noqa: F401
    from finetune.evaluation.scores.texts import jieba_words as words

    words("warm up")


def warm_up(model: Path) -> None:
    """Import and build in this process what its forks will need."""
    import_libraries()
    from finetune.generation.load import open_model

    open_model(model)
    gc.collect()
    gc.freeze()  # a collection in a fork would look at all of this, and copy it


def run_all(
    cells: Iterable[Cell],
    folder: Path,
    *,
    timeout: float = 120.0,
    done: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """Run the cells one after the other; what went wrong by name, empty when nothing did."""
    problems = {}
    for cell in cells:
        begun = time.monotonic()
        if problem := run(cell, folder, timeout=timeout):
            problems[cell.name] = problem
        done(f"{cell.name}: {problem or 'done'} ({time.monotonic() - begun:.1f} s)")
    return problems


def run(cell: Cell, folder: Path, *, timeout: float = 120.0) -> str:
    """What went wrong in the run of a cell, or an empty text. Logs and sample ids go to `folder`."""
    codes = exit_codes(cell, folder, timeout=timeout)
    failed = [rank for rank, code in enumerate(codes) if code != 0]
    if not failed:
        return ""
    log = (folder / f"{cell.name}.{failed[0]}.log").read_text(encoding="utf-8").strip()
    return (
        f"process {failed[0]} ended with {codes[failed[0]]}: {log.splitlines()[-1] if log else ''}"
    )


def exit_codes(
    cell: Cell, folder: Path, *, timeout: float = 120.0, grace: float = 10.0
) -> list[int]:
    """How each process of a cell ended: `finetune train` as under torchrun.

    `grace` seconds after the first one failed those that are left are killed.
    """
    import runs

    sys.stdout.flush()
    sys.stderr.flush()
    port = int(cell.environment.get("MASTER_PORT") or runs.free_port())
    children = {}
    for rank in range(cell.processes):
        child = os.fork()
        if child == 0:
            _work(cell, rank, port, folder)
        children[child] = rank
    return [code for _, code in sorted(_wait(children, timeout, grace).items())]


def samples(cell: Cell, folder: Path) -> list[list[list[int]]]:
    """The examples of every step that the cell trained: [steps][processes][examples]."""
    texts = [
        (folder / f"{cell.name}.{rank}.samples.json").read_text(encoding="utf-8")
        for rank in range(cell.processes)
    ]
    return [list(step) for step in zip(*map(json.loads, texts), strict=True)]


def _work(cell: Cell, rank: int, port: int, folder: Path) -> None:
    """The life of a forked process; it never returns."""
    code = 1
    try:
        log = os.open(folder / f"{cell.name}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(cell.environment)
        if cell.processes > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": cell.processes}
            os.environ.update({name: str(number) for name, number in place.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        seen = _recorded_samples()
        file = folder / f"{cell.name}.{rank}.yaml"
        file.write_text(json.dumps(cell.settings), encoding="utf-8")  # JSON is YAML
        if cell.before:
            cell.before(rank)
        try:
            (cell.program or _train)(file)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        (folder / f"{cell.name}.{rank}.samples.json").write_text(json.dumps(seen))
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(file: Path) -> None:
    from finetune.cli import main

    main(["train", str(file)])


def _recorded_samples() -> list[list[int]]:
    from finetune.training.trainer import FineTuner

    steps: list[list[int]] = []
    original = FineTuner.get_batch_samples

    def recording(self: Any, *arguments: Any) -> Any:
        result = original(self, *arguments)
        # A process that is short of examples runs a blank, of which nothing is learned.
        learned = [bool((batch["labels"] != -100).any()) for batch in result[0]]
        pairs = zip(self._samples, learned, strict=True)
        steps.append([int(sample) for samples, real in pairs if real for sample in samples])
        return result

    FineTuner.get_batch_samples = recording
    return steps


def _wait(children: dict[int, int], timeout: float, grace: float) -> dict[int, int]:
    """Exit codes by rank; when one fails or time is up, the others are ended.

    Time in which this process itself is stopped does not count.
    """
    codes: dict[int, int] = {}
    left, last = timeout, time.monotonic()
    while len(codes) < len(children):
        for child, rank in children.items():
            if rank not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    if codes[rank] != 0:
                        left = min(left, grace)
        if left < 0:
            for child, rank in children.items():
                if rank not in codes:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    codes[rank] = -9
        time.sleep(0.02)
        now = time.monotonic()
        left, last = left - min(now - last, 1.0), now
    return codes


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [headers, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(lines)
