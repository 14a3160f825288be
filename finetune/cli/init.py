"""`finetune init`: data, a model and a card -> a configuration that fits, with a word on each choice."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.artifacts.experts import num_experts
from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.plain_files import read_json
from finetune.artifacts.resolve import TOKENIZER_FILES, local_folder
from finetune.cli.inputs import planned
from finetune.config.schema import RunConfig
from finetune.config.yaml_text import one_line
from finetune.data.preview.report import SourceReport, check
from finetune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from finetune.planning.plan import Gpu, Plan

ROW = 4096
"""Tokens of a packed row: enough to keep a GPU busy."""
SHORTEST_ROW = 1024
EPOCHS = 3
FEWEST_STEPS = 50
"""Steps of a run below which no more rows are gathered for one step."""


@dataclass(frozen=True)
class Rung:
    """One way to train; each next one holds less."""

    length: int
    said: str
    checkpointing: bool = True
    shards: bool = False
    quantized: bool = False


@dataclass(frozen=True)
class Draft:
    """A configuration that fits."""

    tree: dict[str, dict[str, Any]]
    comments: dict[str, str]
    command: str
    plan: Plan

    def text(self) -> str:
        """As a file, its command in the first line."""
        lines = [
            f"# {' '.join(self.command.split())}",
            "# Written by `finetune init`; docs/config.md has every option.",
        ]
        for section, options in self.tree.items():
            lines.append(f"{section}:")
            for name, value in options.items():
                comment = self.comments.get(f"{section}.{name}")
                line = f"  {name}: {one_line(value)}"
                lines.append(f"{line:<36} # {comment}" if comment else line)
        return "\n".join(lines) + "\n"


def draft(data: str, model: str, gpu: Gpu, output: Path) -> Draft:
    """The fastest configuration that fits `gpu`, for the rows of `data`.

    Raises:
        DataError: There are bad rows.
        ConfigError: Nothing fits.
    """
    report = check([data], model=model)
    if report.num_bad:
        raise DataError(
            f"{report.num_bad} bad rows, first {report.bad_rows[0].location}: {report.bad_rows[0].reason}; "
            f"`finetune data check {data}` lists them"
        )
    for note in report.notes():
        console.warn(note)
    (source,) = report.sources
    folder = local_folder(model, files=TOKENIZER_FILES)
    config = read_json(folder / MODEL_CONFIG)
    narrow = config.get("vision_config") is None and not num_experts(config)
    least = None
    for rung in _rungs(source, gpu.number, narrow=narrow):
        tree = _tree(source, model, rung, gpu.number, output)
        _, found = planned(RunConfig.model_validate(tree), gpu)
        if found.fits:
            launch = f"finetune launch -n {gpu.number}" if gpu.number > 1 else "finetune train"
            return Draft(
                tree, _comments(source, rung, found), f"{launch} {shlex.quote(str(output))}", found
            )
        least = min(least or found.memory_bytes, found.memory_bytes)
    raise ConfigError(
        f"{model} does not fit: at the least {(least or 0) / 1e9:.1f} GB are held besides the driver's "
        f"own, and --gpu is {gpu.bytes / 1e9:g} GB; give more --gpus, a larger --gpu or a smaller --model"
    )


def _rungs(source: SourceReport, gpus: int, *, narrow: bool) -> Iterator[Rung]:
    """From the fastest on; `narrow` where the weights may be held in 4 bits."""
    length = _row(source)
    yield Rung(length, "all activations are kept, the fastest way", checkpointing=False)
    yield Rung(length, "activations are computed again: a third more time, much less memory")
    if gpus > 1:
        yield Rung(length, "the weights are cut over the GPUs", shards=True)
    while True:
        if narrow:
            yield Rung(length, "the frozen weights are held in 4 bits (QLoRA)", quantized=True)
        length //= 2
        if source.images or length < SHORTEST_ROW:
            return
        yield Rung(length, "rows are shorter, so that they fit")


def _row(source: SourceReport) -> int:
    """Tokens of a row: the longest dialogue's, or many short ones packed."""
    longest = source.lengths.longest if source.lengths else ROW
    if source.images:
        return -(-longest // 256) * 256
    only_text = source.texts == source.dialogues
    return ROW if only_text else max(ROW, -(-longest // 1024) * 1024)


def _tree(
    source: SourceReport, model: str, rung: Rung, gpus: int, output: Path
) -> dict[str, dict[str, Any]]:
    """The options that are not as they would be without being said."""
    tokens = source.lengths.tokens if source.lengths else 0
    rows = max(1, source.dialogues if source.images else tokens // rung.length)
    passes = max(1, min(8, EPOCHS * rows // (gpus * FEWEST_STEPS)))
    steps = max(1, EPOCHS * rows // (gpus * passes))
    every = max(5, steps // 10)
    held_out = "5%" if source.dialogues >= 400 else "20%" if source.dialogues >= 40 else None
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": model, "dtype": "bfloat16"},
        "data": {"train": source.path, "max_length": rung.length},
        "method": {"kind": "lora", "rank": 8, "alpha": 32.0, "dropout": 0.1},
        "training": {
            "output_dir": f"runs/{output.stem}",
            "num_epochs": EPOCHS,
            "gradient_accumulation_steps": passes,
            "learning_rate": 0.0005,
            "activation_checkpointing": rung.checkpointing,
            "save_every_steps": every,
        },
    }
    if rung.quantized:
        tree["model"]["quantization"] = "nf4"
    if source.images:
        tree["model"]["freeze"] = ["vision"]
        tree["data"]["cache_image_features"] = True
    else:
        tree["data"]["packing"] = True
    if rung.shards:
        tree["deepspeed"] = {"zero_stage": 3}
    if held_out is not None:
        tree["data"]["validation"] = held_out
        tree["evaluation"] = {"every_steps": every, "max_samples": 200}
        if source.texts == source.dialogues:
            tree["evaluation"] = {"every_steps": every, "generate": False}
    return tree


def _comments(source: SourceReport, rung: Rung, plan: Plan) -> dict[str, str]:
    """By option, why it is so."""
    lengths = source.lengths
    spread = (
        f"tokens; yours have {lengths.median:,} as a rule, {lengths.longest:,} at most"
        if lengths
        else "tokens"
    )
    memory = (
        f"{plan.memory_bytes / 1e9:.1f} of {plan.gpu.bytes / 1e9:g} GB of each GPU: {rung.said}"
    )
    return {
        "model.path": "a folder or a hub id",
        "model.quantization": 'needs: pip install "glm4-finetune[qlora]"',
        "model.freeze": "the tower stays as it is",
        "data.train": f"{source.dialogues:,} dialogues, {source.duplicates:,} of them twice",
        "data.max_length": spread,
        "data.packing": "rows are full, their dialogues blind to each other",
        "data.validation": "held out, whole groups at a time; or a file of yours",
        "training.num_epochs": "passes over the data",
        "training.gradient_accumulation_steps": "rows of each GPU for one step",
        "training.activation_checkpointing": memory,
        "evaluation.max_samples": "replies that are generated and scored",
    }
