"""`finetune train --dry-run`: what a run would do, without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune import console, launcher
from finetune.artifacts.resolve import TOKENIZER_FILES, is_hub_id, local_folder
from finetune.artifacts.weights import tensors
from finetune.config.schema import TrainingSection
from finetune.planning.plan import Gpu
from finetune.planning.run_memory import RunMemory
from finetune.training.arguments import check_trackers
from finetune.training.run_data import RunData


def foreseen(
    training: TrainingSection, data: RunData, memory: RunMemory, start: Path | None
) -> dict[str, Any]:
    """What the run would do, as a table and as values; `start` is the checkpoint it would go on from."""
    check_trackers(training.report_to)
    section = memory.model
    folder = local_folder(section.path, section.revision, files=TOKENIZER_FILES)
    number = None if is_hub_id(section.path) else len(tensors(folder))
    held = memory.plan(Gpu(number=launcher.world_size()), folder).memory_bytes
    validation = None if data.validation is None else len(data.validation)
    steps = data.steps(training)
    console.table(
        ["", "this run would"],
        [
            ["train", f"{memory.method.kind} on {section.path}"],
            ["open", f"{number:,} tensors" if number else "the model, fetched from its hub first"],
            ["learn from", data.size() if data.stream else f"{data.size()} examples"],
            ["measure on", "nothing" if validation is None else f"{validation:,} examples"],
            ["do", f"{steps:,} steps{data.an_epoch()}"],
            ["start from", str(start) if start else "the beginning"],
            ["hold", f"about {held / 1e9:.1f} GB on each GPU, besides the driver's own"],
            ["write to", training.output_dir],
        ],
    )
    return {
        "output_dir": training.output_dir,
        "steps": steps,
        "examples": None if data.stream else len(data.train),
        "validation_examples": validation,
        "resumes_from": str(start) if start else None,
        "model_tensors": number,
        "memory_bytes_per_gpu": held,
    }
