"""Runs of several processes over gloo, whose outcome tests look at: one JSON object.

    python tests/rank_runs.py FOLDER

Processes are forks, so torch is imported once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts" / "bench"))

import cells


class Bench:
    """A tiny model and its data."""

    def __init__(self, folder: Path) -> None:
        import runs
        import tiny

        self.folder = folder
        self.model = tiny.save_model(folder / "model", "glm")
        self.data = runs.write_dialogues(folder / "train.jsonl", 9)
        self.held_out = runs.write_dialogues(folder / "heldout.jsonl", 6, seed=1)
        cells.warm_up(self.model)

    def run(
        self,
        name: str,
        processes: int,
        before: Callable[[int], object] | None = None,
        sections: dict[str, Any] | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """Exit codes and what all processes said."""
        import runs

        settings = runs.config(self.model, self.data, self.folder / name, **changes)
        settings |= sections or {}
        cell = cells.Cell(name, settings, processes, before=before)
        codes = cells.exit_codes(cell, self.folder, grace=40)
        logs = [self.folder / f"{name}.{rank}.log" for rank in range(processes)]
        said = [log.read_text("utf-8", "replace")[-3000:] for log in logs]
        return {"codes": codes, "said": said}


# --- evaluation under ZeRO-3 ----------------------------------------------------------------------------


def gathers_counted(file: Path, *, fits: bool) -> Callable[[int], object]:
    """Notes how often weights are gathered while replies are generated, and how many tokens come."""

    def before(rank: int) -> None:
        import torch.distributed as dist

        from finetune.distributed import device
        from finetune.evaluation import model_scores
        from finetune.training.measuring import validation
        from finetune.training.trainer import FineTuner

        counts = {"gathers": 0, "around": 0, "tokens": 0}
        inside = {"evaluation": False, "replies": False}

        def counted(name: str) -> None:
            original = getattr(dist, name)

            def gather(*arguments: Any, **options: Any) -> Any:
                counts["gathers"] += inside["replies"]
                counts["around"] += inside["evaluation"] and not inside["replies"]
                return original(*arguments, **options)

            setattr(dist, name, gather)

        for name in ("all_gather_into_tensor", "_all_gather_base", "all_gather"):
            if hasattr(dist, name):
                counted(name)
        if not fits:
            device.free_bytes = lambda: 0
        evaluates, replies = FineTuner.evaluate, model_scores.evaluate_model

        def evaluating(self: Any, *arguments: Any, **options: Any) -> Any:
            inside["evaluation"] = True
            try:
                return evaluates(self, *arguments, **options)
            finally:
                inside["evaluation"] = False

        def generating(*arguments: Any, **options: Any) -> Any:
            inside["replies"] = True
            try:
                result = replies(*arguments, **options)
            finally:
                inside["replies"] = False
            counts["tokens"] += sum(len(p.reply.content.split()) for p in result.predictions)
            file.with_suffix(f".{rank}").write_text(json.dumps(counts))
            return result

        FineTuner.evaluate = evaluating  # type: ignore[method-assign]
        validation.evaluate_model = generating

    return before


def gathers(bench: Bench) -> dict[str, Any]:
    """A run under ZeRO-3 whose evaluations have room for the whole model, and one that has none."""
    found = {}
    for name, stage, fits in (("whole", 3, True), ("in parts", 3, False), ("stage 2", 2, True)):
        file = bench.folder / f"gathers {name}"
        outcome = bench.run(
            f"zero3 {name}", 2, gathers_counted(file, fits=fits),
            {"method": {"kind": "full"}, "deepspeed": {"zero_stage": stage}},
            training__max_steps=4, training__learning_rate=1e-3, evaluation__every_steps=2,
            data__validation=str(bench.held_out), evaluation__batch_size=2,
        )  # fmt: skip
        metrics = bench.folder / f"zero3 {name}" / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []  # fmt: skip
        found[name] = outcome | {
            "counts": [json.loads(file.with_suffix(f".{r}").read_text()) for r in range(2)],
            "scores": [{k: v for k, v in row.items() if k.startswith("eval_")} for row in rows if "eval_loss" in row],
            "losses": [row["loss"] for row in rows if "loss" in row],
        }  # fmt: skip
    return found


# --- failures on a backend that never says so ------------------------------------------------------------


def blocking(rank: int, fault: str, world: int) -> Callable[[int], object]:
    """In the second step a process meets its fault, and the others wait for their device for ever.

    As with NCCL: the collective is on its way, no exception comes, and the first look at a number
    waits for it.
    """

    def before(here: int) -> None:
        import signal
        import threading
        import time

        import torch

        from finetune.distributed import device, position, watchdog
        from finetune.training.trainer import FineTuner

        watchdog.SILENCE, watchdog.BEAT = 1.5, 0.25  # a test need not wait for so long
        step, steps = FineTuner.training_step, [0]

        def stepping(self: Any, *arguments: Any, **options: Any) -> Any:
            steps[0] += 1
            if steps[0] < 2:
                return step(self, *arguments, **options)
            if here != rank:
                self._losses.append(torch.zeros(()))
                return torch.zeros(())
            if fault == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "raises":
                raise ValueError("broken on purpose")
            time.sleep(600)
            return None

        numbers = device.numbers

        def waiting(tensor: Any) -> Any:
            if steps[0] < 2:
                return numbers(tensor)
            with position.waiting_for_device():
                threading.Event().wait()
            return None

        FineTuner.training_step, device.numbers = stepping, waiting  # type: ignore[method-assign]

    return before


def failures(bench: Bench, world: int = 2) -> dict[str, Any]:
    """Every fault of the last process."""
    return {
        fault: bench.run(
            f"blocking {fault} {world}", world, blocking(world - 1, fault, world),
            training__process_timeout_minutes=0.05,
        )
        for fault in ("is killed", "raises", "hangs")
    }  # fmt: skip


# --- rows that processes share --------------------------------------------------------------------------


def split_rows(bench: Bench) -> dict[str, Any]:
    """Losses and trained weights of runs whose rows are shared out, and of those that they must equal."""
    from closeness import SMOOTH_STEPS
    from safetensors.torch import load_file

    from finetune.models import tiled_mlp

    weights: dict[str, Any] = {}
    runs_of: dict[str, Any] = {}

    def run(name: str, processes: int, sections: Any, *, same_as: str | None = None, **changes: Any) -> None:  # fmt: skip
        everything = SMOOTH_STEPS | {
            "training__max_steps": 3,
            "training__save_every_steps": 2,
            **changes,
        }
        found = bench.run(name, processes, None, sections, **everything)
        assert not any(found["codes"]), found["said"]
        folder = Path(everything.get("training__output_dir", bench.folder / name))
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        losses = {
            e["step"]: [e["loss"], e["padding"]] for e in map(json.loads, lines) if "loss" in e
        }
        saved = next((folder / "checkpoint-3").glob("*model.safetensors"))
        weights[name] = load_file(saved)
        far = 0.0 if same_as is None else max(
            float((weights[name][key] - tensor).abs().max()) for key, tensor in weights[same_as].items()
        )  # fmt: skip
        runs_of[name] = found | {"losses": [losses[step][0] for step in sorted(losses)], "far": far}

    lora = {"method": {"kind": "lora", "rank": 4, "dropout": 0.0}}
    full = {"method": {"kind": "full"}}
    packed = {"data__packing": True}
    run("whole rows", 1, lora, training__batch_size=2, **packed)
    run("2 x 2", 4, lora, same_as="whole rows", training__batch_size=1, training__sequence_parallel=2, **packed)  # fmt: skip
    # The first two steps in four processes that share each row, the last one in one.
    at = {
        "training__output_dir": str(bench.folder / "4 and 1"),
        "training__batch_size": 2,
        **packed,
    }
    bench.run("4 of 4", 4, None, lora, **SMOOTH_STEPS, **at | {"training__max_steps": 2, "training__sequence_parallel": 4})  # fmt: skip
    run("4 and 1", 1, lora, same_as="whole rows", **at)
    run("full", 1, full, training__batch_size=2)
    above, tile = tiled_mlp.ABOVE, tiled_mlp.TILE
    tiled_mlp.ABOVE = tiled_mlp.TILE = 32  # forks see it
    saving = {"training__activation_checkpointing": True, "training__offload_activations": True}
    run("full, ZeRO-3", 2, full | {"deepspeed": {"zero_stage": 3}}, same_as="full", training__batch_size=2, training__sequence_parallel=2, **saving)  # fmt: skip
    tiled_mlp.ABOVE, tiled_mlp.TILE = above, tile
    run(
        "prefix",
        1,
        {"method": {"kind": "ptuning_v2", "num_virtual_tokens": 4}},
        training__batch_size=2,
    )
    run("prefix, 2", 2, {"method": {"kind": "ptuning_v2", "num_virtual_tokens": 4}}, same_as="prefix", training__batch_size=2, training__sequence_parallel=2)  # fmt: skip
    return runs_of


# --- mixtures of experts ----------------------------------------------------------------------------------


def mixtures(bench: Bench) -> dict[str, Any]:
    """Losses, weights and expert figures of a mixture in two processes, beside one without DeepSpeed."""
    import tiny
    from closeness import SMOOTH_STEPS
    from safetensors.torch import load_file

    model = tiny.save_model(bench.folder / "mixture", "glm4_moe")
    experts = {"kind": "lora", "rank": 4, "dropout": 0.0, "target_modules": ["q_proj", "experts"]}
    found: dict[str, Any] = {}
    for name, method in (("full", {"kind": "full"}), ("experts", experts)):
        weights: dict[int, dict[str, Any]] = {}
        for stage in (0, 2, 3) if name == "full" else (0, 2):
            run = f"mixture {name} {stage}"
            deepspeed = {"deepspeed": {"zero_stage": stage}} if stage else {}
            outcome = bench.run(
                run, 2 if stage else 1, None, {"method": method} | deepspeed,
                **SMOOTH_STEPS | {"model__path": str(model), "training__max_steps": 2, "training__batch_size": 1 if stage else 2},
            )  # fmt: skip
            folder = bench.folder / run
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]  # fmt: skip
            weights[stage] = {}
            for file in sorted((folder / "checkpoint-2").glob("*model*.safetensors")):
                weights[stage] |= load_file(file)
            far = max(
                (float((weights[stage][key] - tensor).abs().max()) for key, tensor in weights[0].items()),
                default=None,
            )  # fmt: skip
            logged = ("loss", "experts_share_1", "experts_entropy_2", "experts_largest_share")
            found[run] = outcome | {
                "far": far, "tensors": len(weights[stage]),
                "logged": [[line[key] for key in logged] for line in lines if "loss" in line],
            }  # fmt: skip
    return found


PARTS = {
    "mixtures": mixtures,
    "split rows": split_rows,
    "gathers": gathers,
    "failures": failures,
    "failures of 4": lambda bench: failures(bench, 4),
}


def main() -> None:
    """Every part, or those that are named."""
    bench = Bench(Path(sys.argv[1]))
    asked = sys.argv[2:] or ["gathers", "failures", "split rows", "mixtures"]
    print(json.dumps({name: PARTS[name](bench) for name in asked}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
