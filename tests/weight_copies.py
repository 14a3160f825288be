"""A program: full fine-tunings under a profiler of memory; prints as JSON how much tensors took.

All figures are in units of the model's weights in float32, which are far larger here than what a
step of one short dialogue computes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts/bench"), str(ROOT / "tests")]

import cells  # noqa: E402
import runs  # noqa: E402
import tiny  # noqa: E402
from closeness import ADAM_EPSILON  # noqa: E402

SIZES = {
    "hidden_size": 192, "ffn_hidden_size": 384, "kv_channels": 48, "num_layers": 8,
    "num_hidden_layers": 8,
}  # fmt: skip
NUM_SHARDS = 4
SAVING = "the weights are saved"


@dataclass(frozen=True)
class Run:
    """Where all weights are trained."""

    dtype: str
    stage: int | None = None
    processes: int = 1
    optim: str = "adamw_torch"

    @property
    def name(self) -> str:
        """For files and for the answer."""
        return f"{self.dtype}-zero{self.stage}-{self.processes}p-{self.optim}"


RUNS = (
    Run("float32"),
    Run("bfloat16"),
    Run("bfloat16", 2),
    Run("float32", 2),
    Run("bfloat16", 2, optim="adamw_torch_fused"),
    Run("float32", 3, processes=2),
)


def main(folder: Path) -> None:
    """Run them into `folder`."""
    from finetune.artifacts.weights import tensors

    model = tiny.save_model(folder / "model", **SIZES)
    sizes = [tensor.size for tensor in tensors(model).values()]
    data = runs.write_dialogues(folder / "train.jsonl", 4)
    cells.warm_up(model)
    found: dict[str, Any] = {"largest": max(sizes) / sum(sizes)}
    for run in RUNS:
        settings = runs.config(
            model, data, folder / run.name, training__max_steps=2, training__learning_rate=1e-3,
            training__batch_size=2 // run.processes, model__dtype=run.dtype,
            training__extra={"optim": run.optim, "adam_epsilon": ADAM_EPSILON},
        ) | {"method": {"kind": "full"}}  # fmt: skip
        if run.stage is not None:
            settings["deepspeed"] = {"zero_stage": run.stage}
        program = _measuring(folder / run.name, sum(sizes), alone=run.processes == 1)
        cell = cells.Cell(run.name, settings, run.processes, program=program)
        if problem := cells.run(cell, folder):
            raise SystemExit(f"{run.name}: {problem}")
        found[run.name] = [
            json.loads((folder / f"{run.name}.{rank}.json").read_text())
            for rank in range(run.processes)
        ]
    print(json.dumps(found))


def _measuring(output: Path, weights: int, *, alone: bool) -> Callable[[Path], None]:
    """`finetune train` in shards of a quarter of the model; its figures go beside `output`."""

    def program(file: Path) -> None:
        import os

        from torch.profiler import ProfilerActivity, profile, record_function

        from finetune.methods import full
        from finetune.training.checkpointing import Saver

        full.MAX_SHARD_BYTES = weights // NUM_SHARDS
        figures: dict[str, float] = {}
        save_weights = Saver.save_weights

        def marked(self: Saver, *arguments: Any) -> None:
            with record_function(SAVING):
                save_weights(self, *arguments)

        def weighed(self: Saver, *arguments: Any) -> None:
            # What gloo's own threads give back the profiler does not see; the kernel does.
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident("VmRSS")
            save_weights(self, *arguments)
            figures["save"] = (_resident("VmHWM") - before) / weights

        Saver.save_weights = marked if alone else weighed  # type: ignore[method-assign]
        watching = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with watching if alone else nullcontext():
            try:
                cells._train(file)
            except SystemExit as end:
                if end.code:
                    raise
        if alone:
            figures = _figures(watching, weights)
        rank = os.environ.get("RANK", "0")
        Path(f"{output}.{rank}.json").write_text(json.dumps(figures))

    return program


def _resident(which: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at the most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) * 1024
    raise ValueError(which)


def _figures(watched: Any, weights: int) -> dict[str, float]:
    """The most that was allocated at any time, and the most above the beginning of a save."""
    events = sorted(_events(watched.profiler.kineto_results.experimental_event_tree()))
    live = most = start = above = 0
    saving = False
    for _, size, mark in events:
        if mark:
            saving, start = mark == "begins", live
        live += size
        most = max(most, live)
        if saving:
            above = max(above, live - start)
    return {"peak": most / weights, "save": above / weights}


def _events(nodes: Any) -> Iterator[tuple[int, int, str]]:
    """Every allocation (and release, of negative size) and both ends of a save, with its time."""
    from torch._C._profiler import _EventType

    for node in nodes:
        if node.tag == _EventType.Allocation:
            yield node.start_time_ns, node.extra_fields.alloc_size, ""
        elif node.name == SAVING:
            yield node.start_time_ns, 0, "begins"
            yield node.end_time_ns, 0, "ends"
        yield from _events(node.children)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
