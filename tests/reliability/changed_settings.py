"""What each option of a config is changed to between two starts, and what then happens."""

from __future__ import annotations

import json
import shutil
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tests.reliability.frame import Case
from tests.reliability.tiny_runs import FULL, LORA, PREFIX, STEPS, Bench, Kind

REFUSED = "refused"
"""Exit 3 with a table that names it."""
LISTED = "listed"
"""Goes on, and says that it was changed."""
SAME = "same"
"""Goes on without a word, and ends in the same weights."""
FREE = "free"
"""Goes on without a word; sums in another order may leave other last digits."""


@dataclass(frozen=True)
class Change:
    """One option, changed between two starts."""

    key: str
    value: Any
    happens: str
    said: str = ""
    """What must be said; by default the key."""
    also: dict[str, Any] = field(default_factory=dict)
    """Other options that are changed with it."""
    kind: str = "lora"
    """Of KINDS: the run whose option is changed."""

    @property
    def name(self) -> str:
        """For the list."""
        return f"key: {self.key} = {str(self.value)[:24]!r} is {self.happens}" + ("" if self.kind == "lora" else f", {self.kind}")  # fmt: skip


KINDS = {
    "lora": Kind("lora", LORA),
    "prefix": Kind("prefix", PREFIX),
    "full": Kind("full", FULL),
    "pairs": Kind("pairs", LORA),  # with rows of a prompt and a response
    "evaluated": Kind("evaluated", LORA),  # on held-out dialogues
    "ZeRO-2": Kind("lora, ZeRO-2", LORA, 1, 2),
    "ZeRO-3": Kind("lora, ZeRO-3", LORA, 1, 3),
}
DATA, TEMPLATE, BATCH = "the training examples", "the tokenizer", "training.batch_size x"

CHANGES = [
    Change("model.path", "another folder", SAME),
    Change("model.path", "other weights", REFUSED, "the base model's weights"),
    Change("model.revision", "main", SAME),
    Change("model.dtype", "bfloat16", REFUSED, "the number format"),
    Change("model.dtype", "float32", SAME),
    Change("model.attention", "eager", LISTED),
    Change("model.kernels", "torch", SAME),
    Change("model.quantization", "nf4 before", REFUSED),
    Change("model.freeze", ["layers.0."], REFUSED),
    Change("model.adapter", "elsewhere", REFUSED),
    Change("data.train", "the same file in a list", SAME),
    Change("data.train", "the same file elsewhere", SAME),
    Change("data.validation", "the same file", LISTED),
    Change("data.format", "messages", REFUSED, DATA),
    Change("data.columns", {"prompt": "prompt", "response": "response"}, REFUSED, DATA, kind="pairs"),
    Change("data.ignore_columns", ["notes"], REFUSED, DATA),
    Change("data.turns", "merge", REFUSED, DATA),
    Change("data.calls_in_text", "read", REFUSED, DATA),
    Change("data.reasoning", "drop", REFUSED, DATA),
    Change("data.max_overlap", 1.0, SAME),
    Change("data.stop", "first", REFUSED, DATA),
    Change("data.temperature", 2.0, REFUSED, DATA, also={"data__stop": "all"}),
    Change("data.deduplicate", "exact", REFUSED, DATA),
    Change("data.max_length", 128, REFUSED),
    Change("data.train_on", "last_reply", REFUSED),
    Change("data.on_too_long", "drop", REFUSED),
    Change("data.on_bad_row", "skip", SAME),
    Change("data.max_bad_rows", 0.02, SAME, also={"data__on_bad_row": "skip"}),
    Change("data.image_root", "a folder", SAME),
    Change("data.packing", True, REFUSED),
    Change("data.group_by_length", False, REFUSED),
    Change("data.loader_workers", 1, SAME),
    Change("data.cache_dir", "a folder", SAME),
    Change("data.cache_image_features", True, LISTED),
    Change("method.kind", "full", REFUSED),
    Change("method.rank", 8, REFUSED),
    Change("method.alpha", 16.0, REFUSED),
    Change("method.dropout", 0.2, REFUSED),
    Change("method.target_modules", ["q_proj"], REFUSED),
    Change("method.use_rslora", True, REFUSED),
    Change("method.use_dora", True, REFUSED),
    Change("method.lora_plus_ratio", 4.0, REFUSED),
    Change("method.kind", "lora", REFUSED, kind="full"),
    Change("method.num_virtual_tokens", 6, REFUSED, kind="prefix"),
    Change("method.prefix_projection", True, REFUSED, kind="prefix"),
    Change("method.encoder_hidden_size", 8, REFUSED, kind="prefix", also={"method__prefix_projection": True}),
    Change("training.deterministic", True, LISTED),
    Change("training.optimizer", "muon", REFUSED),
    Change("training.async_save", True, SAME),
    Change("training.save_weights_every_steps", 2, SAME),
    Change("training.output_dir", "another folder", SAME),
    Change("training.max_steps", STEPS + 1, LISTED),
    Change("training.num_epochs", 1.0, LISTED, also={"training__max_steps": None}),
    Change("training.batch_size", 3, REFUSED, BATCH),
    Change("training.batch_size", 1, FREE, also={"training__gradient_accumulation_steps": 2}),
    Change("training.gradient_accumulation_steps", 2, REFUSED, BATCH),
    Change("training.learning_rate", 1e-3, REFUSED),
    Change("training.learning_rates", {"lora_B": 1e-3}, REFUSED),
    Change("training.lr_schedule", "constant", REFUSED),
    Change("training.warmup_steps", 2, REFUSED),
    Change("training.weight_decay", 0.1, REFUSED),
    Change("training.max_grad_norm", 0.5, LISTED),
    Change("training.max_grad_norm", 0.5, LISTED, kind="ZeRO-2"),
    Change("training.activation_checkpointing", True, LISTED),
    Change("training.offload_activations", True, LISTED, also={"training__activation_checkpointing": True}),
    Change("training.seed", 7, REFUSED),
    Change("training.log_every_steps", 2, SAME),
    Change("training.save_every_steps", 3, SAME),
    Change("training.keep_checkpoints", 2, SAME),
    Change("training.on_full_disk", "stop", SAME),
    Change("training.resume", "the checkpoint", SAME),
    Change("training.report_to", ["tensorboard"], SAME),
    Change("training.profile", 2, SAME),
    Change("training.on_end", "true", SAME),
    Change("training.process_timeout_minutes", 5.0, SAME),
    Change("training.extra", {"adam_beta1": 0.8}, REFUSED),
    Change("deepspeed.zero_stage", 1, REFUSED, kind="ZeRO-2"),
    Change("deepspeed.zero_stage", 2, REFUSED),
    Change("deepspeed.offload_optimizer", "cpu", REFUSED, kind="ZeRO-2"),
    Change("deepspeed.offload_parameters", "cpu", REFUSED, kind="ZeRO-3"),
    Change("deepspeed.config", {"zero_optimization": {"stage": 1}}, REFUSED, "the DeepSpeed settings", kind="ZeRO-2"),
    Change("evaluation.every_steps", 2, LISTED),
    Change("evaluation.at_start", True, SAME),
    Change("evaluation.generate", False, LISTED),
    Change("evaluation.replies", "last_reply", LISTED),
    Change("evaluation.max_new_tokens", 4, LISTED),
    Change("evaluation.max_samples", 2, LISTED),
    Change("evaluation.batch_size", 4, SAME),
    Change("evaluation.best_metric", "bleu-4", LISTED, kind="evaluated"),
    Change("evaluation.patience", 3, LISTED, kind="evaluated"),
]  # fmt: skip


def option_names() -> set[str]:
    """Every option of a config as `section.key`, methods of all kinds included."""
    from finetune.config.schema import RunConfig

    return {
        f"{section}.{key}" for section, model in _models(RunConfig) for key in model.model_fields
    }


def _models(config: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for section, info in config.model_fields.items():
        yield from ((section, model) for model in _inside(info.annotation))


def _inside(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    elif typing.get_origin(kind) in (typing.Union, types.UnionType, typing.Annotated):
        for part in typing.get_args(kind):
            yield from _inside(part)


ELSEWHERE = {
    "data.replay": "the model writes replies first; tests/test_forgetting.py",
    "data.streaming": "reads other files than the bench's; tests/test_stream.py",
    "data.shuffle_buffer": "of a stream; tests/test_stream.py",
    "evaluation.choose": "needs evaluation.keep; tests/test_forgetting.py",
    "training.sequence_parallel": "needs several processes; tests/test_ranks.py",
    "evaluation.keep": "is measured beside the held-out set; tests/test_forgetting.py",
    "training.save": "leaves nothing to resume from; tests/test_saves.py",
    "data.group_by": "needs a column to group by; tests/test_mixing.py",
    "training.tokens_per_step": "is settled into gradient_accumulation_steps; tests/test_plan.py",
}
"""Options that the bench's run cannot change alone, and who tests them."""


def unclassified() -> list[str]:
    """Options that have no class, and options that no case changes."""
    from finetune.training.resume import RULES

    names = option_names()
    changed = {change.key for change in CHANGES} | ELSEWHERE.keys()
    without = [name for name in names if name not in RULES and name.partition(".")[0] not in RULES]
    return sorted({*without, *(names - changed), *(changed - names)})


def changed_keys(bench: Bench) -> list[Case]:
    """Each option changed in turn, and that none is forgotten."""

    def none_forgotten(folder: Path) -> str:
        return f"unclassified or never changed: {found}" if (found := unclassified()) else ""

    cases = [Case(change.name, partial(changed, bench, change)) for change in CHANGES]
    return [*cases, Case("key: every one has a class and a case", none_forgotten)]


def changed(bench: Bench, change: Change, folder: Path) -> str:
    """What an option's class says happens: refused by name, listed by name, or nothing."""
    kind = KINDS[change.kind]
    if change.kind == "pairs":
        kind = replace(kind, changes={"data__train": str(pairs(bench))})
    if change.kind == "evaluated":
        held_out = {"data__validation": str(bench.data), "evaluation__every_steps": 2}
        kind = replace(kind, changes=held_out)
    run_dir = bench.begin(kind, folder, [STEPS - 1])
    options = {change.key.replace(".", "__"): value_of(bench, change, folder)} | change.also
    if change.key == "training.output_dir":
        options["training__resume"] = str(run_dir / f"checkpoint-{STEPS - 1}")
    ended = bench.start(kind, folder, **options)
    said = change.said or change.key
    if change.happens == REFUSED:
        good = ended.codes == [3] and said in ended.said
        left_alone = not (run_dir / f"checkpoint-{STEPS}").exists()
        return "" if good and left_alone else f"{ended.codes}: {ended.said[-400:]}"
    if not ended.well:
        return f"{ended.codes}: {ended.said[-400:]}"
    if change.happens == LISTED:
        return "" if said in ended.said else f"not listed: {ended.said[-400:]}"
    if f"{change.key} " in ended.said:
        return f"it is listed: {ended.said[-400:]}"
    if change.key == "training.output_dir":
        shutil.rmtree(run_dir)
        (folder / "elsewhere").rename(run_dir)
    return "" if change.happens == FREE else other_weights(bench, kind, folder)


def pairs(bench: Bench) -> Path:
    """Rows of a prompt and a response."""
    file = bench.folder / "pairs.jsonl"
    rows = [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def other_weights(bench: Bench, kind: Kind, folder: Path) -> str:
    """Why the last weights are not those of the run without a change."""
    last = f"checkpoint-{STEPS}"
    for file in (bench.whole(kind) / last).glob("*.safetensors"):
        if (folder / "run" / last / file.name).read_bytes() != file.read_bytes():
            return f"{file.name} has other weights"
    return ""


def rewrite_record(checkpoint: Path, key: str, value: Any) -> None:
    """A checkpoint of a run in which an option had another value."""
    from finetune.artifacts.names import RUN_RECORD
    from finetune.storage import manifest
    from finetune.training import resume

    record = resume.read(checkpoint)
    assert record["config"][key] != value
    record["config"][key] = value
    (checkpoint / RUN_RECORD).write_text(resume.text_of(record), encoding="utf-8")
    (checkpoint / manifest.MANIFEST).unlink()
    manifest.seal(checkpoint)


def value_of(bench: Bench, change: Change, folder: Path) -> Any:
    """The value, where its words in the table stand for something that must be made first."""
    elsewhere = folder / "elsewhere"
    if change.key == "model.path":
        shutil.copytree(bench.model, elsewhere)
        if change.value == "other weights":
            import tiny

            tiny.save_model(elsewhere, "glm", seed=1)
        return str(elsewhere)
    if change.value == "nf4 before":  # which needs a library to be asked for now
        rewrite_record(folder / f"run/checkpoint-{STEPS - 1}", change.key, "nf4")
        return None
    if change.value == "the same file in a list":
        return [str(bench.data)]
    if change.value == "the same file elsewhere":
        return str(shutil.copy(bench.data, folder / "copy.jsonl"))
    if change.value == "the same file":
        return str(bench.data)
    if change.value == "the checkpoint":
        return str(folder / f"run/checkpoint-{STEPS - 1}")
    if change.key == "deepspeed.config":
        file = folder / "deepspeed.json"
        file.write_text(json.dumps(change.value))
        return str(file)
    if change.value in ("a folder", "another folder"):
        elsewhere.mkdir()
        return str(elsewhere)
    return change.value
