"""What a run says about itself before the first step and after the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune import console, methods
from finetune.config.schema import RunConfig
from finetune.distributed.processes import is_rank0, local_device, rank_and_world
from finetune.training import resume
from finetune.training.callbacks import score_text
from finetune.training.prepare_model import Tunable
from finetune.training.run_data import RunData


def announce(config: RunConfig, data: RunData, tunable: Tunable, total_steps: int) -> None:
    """What is trained on what."""
    training, (_, world) = config.training, rank_and_world()
    trained = sum(_size(p) for p in tunable.model.parameters() if p.requires_grad)
    everything = sum(_size(p) for p in tunable.model.parameters())
    per_step = training.batch_size * training.gradient_accumulation_steps * world
    tokens = int(data.items.lengths.astype(int).mean() * per_step)
    what = "rows" if config.data.packing else "examples"
    sharding = (
        f"DeepSpeed ZeRO-{tunable.deepspeed['zero_optimization'].get('stage', 0)}"
        if tunable.deepspeed
        else "data parallel"
        if world > 1
        else "one process"
    )
    console.table(
        ["", "this run"],
        [
            ["model", f"{config.model.path} in {str(tunable.dtype).removeprefix('torch.')}"],
            ["method", _method_text(config)],
            [
                "trained",
                f"{trained:,} of {everything:,} weights ({100 * trained / everything:.3g} %)",
            ],
            *[
                ["  in", f"{pattern} x {count}"]
                for pattern, count in methods.trained_modules(tunable.model).items()
            ],
            ["processes", f"{world} on {local_device().type}, {sharding}"],
            ["examples", f"{len(data.train):,}"],
            [
                "a step",
                f"{per_step} {what} ({training.batch_size} x {training.gradient_accumulation_steps} "
                f"x {world} processes), about {tokens:,} tokens",
            ],
            ["steps", f"{total_steps:,} ({data.plan.steps_per_epoch:,} an epoch)"],
            *_planned(config, data),
            ["writes to", training.output_dir],
        ],
    )


def _planned(config: RunConfig, data: RunData) -> list[list[str]]:
    """What a GPU is planned to hold; on a CPU nothing is planned for."""
    if local_device().type != "cuda" or not is_rank0():
        return []
    from finetune.artifacts.resolve import local_folder
    from finetune.planning.plan import Gpu, plan
    from finetune.planning.words import in_short

    folder = local_folder(config.model.path, config.model.revision)
    longest = config.data.max_length if config.data.packing else int(data.train.lengths.max())
    machine = Gpu(
        bytes=torch.cuda.get_device_properties(local_device()).total_memory,
        number=rank_and_world()[1],
    )
    found = plan(config, machine, folder=folder, length=longest)
    filled = 100 * found.batch * found.length / max(1, found.room)
    return [
        ["planned", f"{in_short(found)} on each GPU"],
        ["a forward pass", f"fills {filled:.0f} % of what this GPU could take at once"],
    ]


def compare(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Scores of the untuned and of the tuned model side by side."""
    rows = [
        [name, score_text(name, before[name]), score_text(name, after[name])]
        for name in after
        if name in before
    ]
    console.table(["held-out data", "before", "after"], rows)


def scores_at(log: list[dict[str, Any]], *, first: bool) -> tuple[int | None, dict[str, float]]:
    """Step and scores of the evaluation before the first step, or of the last evaluation."""
    evaluations = [entry for entry in log if any(key.startswith("eval_") for key in entry)]
    chosen = [entry for entry in evaluations if (entry["step"] == 0) is first]
    if not chosen:
        return None, {}
    entry = chosen[-1]
    scores = {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
    return int(entry["step"]), scores


def say_resumed(folder: Path, changes: Sequence[resume.Difference]) -> None:
    """Where a run goes on, and which options have changed since."""
    console.say(f"resuming from {folder}")
    for change in changes:
        console.say(f"  {change.key}: was {change.checkpoint}, now {change.now}")


def _method_text(config: RunConfig) -> str:
    options = config.method.model_dump(exclude={"kind", "target_modules"}, exclude_defaults=False)
    told = ", ".join(
        f"{name} {value}" for name, value in options.items() if value not in (None, False)
    )
    return f"{config.method.kind}{f' ({told})' if told else ''}"


def _size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
