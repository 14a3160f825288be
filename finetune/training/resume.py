"""What a resumed run must share with its checkpoint, and what a difference in each option means."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from finetune import __version__, console
from finetune.artifacts import checkpoint
from finetune.artifacts.checkpoint import checkpoints, newest_good
from finetune.artifacts.names import RUN_RECORD, UNTUNED
from finetune.errors import CheckpointError
from finetune.storage.manifest import verify, walk

SHARDS = "global_step"
"""How the folders of DeepSpeed's states begin."""


class Rule(Enum):
    """What happens when an option differs from the checkpoint's."""

    MATCH = "refused"
    """Training would silently become another run."""
    CHANGE = "allowed, listed"
    """It takes effect from here on."""
    FREE = "allowed"
    """It does not touch what is learnt; or what it leads to (a fact) is compared instead."""


# Facts are worked out by the run, not written by the user; all of these must match.
FACTS = {
    "model": "the base model's weights and config",
    "template": "the tokenizer and chat template",
    "data": "the training examples",
    "global_batch": "training.batch_size x accumulation x processes (/ sequence_parallel)",
    "dtype": "the number format of the weights",
    "deepspeed": "the DeepSpeed settings",
    "trainable": "the trained parameters",
}

# These may differ; the difference is said.
LISTED_FACTS = {
    "validation": "the held-out examples",
    "general": "the general set of evaluation.keep",
    # Only with DeepSpeed, which cuts the optimizer's state into as many parts.
    "processes": "the number of processes",
}

OF_DATA = (LISTED_FACTS["validation"], LISTED_FACTS["general"])
COMPARED = ("evaluation.best_metric", "evaluation.choose", "evaluation.keep", *OF_DATA)
"""What a score is judged against: when it changes, the best score so far says nothing any more."""
COMPARED_REPLIES = ("evaluation.replies", "evaluation.max_new_tokens", "evaluation.max_samples")
"""The same for scores of generated replies."""

RULES: dict[str, Rule] = {
    "model.path": Rule.FREE,  # the fact "model" is compared
    "model.revision": Rule.FREE,
    "model.dtype": Rule.FREE,  # the fact "dtype" is compared
    "model.attention": Rule.CHANGE,
    "model.adapter": Rule.MATCH,
    "model.quantization": Rule.MATCH,
    "model.freeze": Rule.MATCH,
    "model.kernels": Rule.CHANGE,
    "data.train": Rule.FREE,  # the fact "data" is compared
    "data.replay": Rule.FREE,  # the fact "data" is compared
    "data.validation": Rule.CHANGE,
    "data.format": Rule.FREE,
    "data.columns": Rule.FREE,
    "data.max_length": Rule.MATCH,
    "data.train_on": Rule.MATCH,
    "data.on_too_long": Rule.MATCH,
    "data.ignore_columns": Rule.FREE,
    "data.turns": Rule.FREE,  # the fact "data" is compared
    "data.calls_in_text": Rule.FREE,
    "data.reasoning": Rule.FREE,
    "data.streaming": Rule.MATCH,
    "data.shuffle_buffer": Rule.MATCH,
    "data.group_by": Rule.FREE,  # the fact "data" is compared
    "data.stop": Rule.FREE,
    "data.temperature": Rule.FREE,
    "data.deduplicate": Rule.FREE,
    "data.max_overlap": Rule.FREE,
    "data.on_bad_row": Rule.FREE,
    "data.max_bad_rows": Rule.FREE,
    "data.image_root": Rule.FREE,
    "data.packing": Rule.MATCH,
    "data.group_by_length": Rule.MATCH,
    "data.loader_workers": Rule.FREE,
    "data.cache_dir": Rule.FREE,
    "data.cache_image_features": Rule.CHANGE,
    "method": Rule.MATCH,  # the whole section, whatever its kind
    "training.output_dir": Rule.FREE,
    "training.max_steps": Rule.CHANGE,
    "training.num_epochs": Rule.CHANGE,
    "training.batch_size": Rule.FREE,  # the fact "global_batch" is compared
    "training.gradient_accumulation_steps": Rule.FREE,
    "training.tokens_per_step": Rule.FREE,
    "training.profile": Rule.FREE,
    # The optimizer's saved state holds rate and decay: a new value would have no effect.
    "training.learning_rate": Rule.MATCH,
    "training.learning_rates": Rule.MATCH,
    "training.optimizer": Rule.MATCH,
    "training.weight_decay": Rule.MATCH,
    "training.lr_schedule": Rule.MATCH,
    "training.warmup_steps": Rule.MATCH,
    "training.max_grad_norm": Rule.CHANGE,
    **dict.fromkeys(
        ("training.activation_checkpointing", "training.offload_activations"), Rule.CHANGE
    ),
    "training.sequence_parallel": Rule.FREE,  # the fact "global_batch" is compared
    "training.seed": Rule.MATCH,
    "training.log_every_steps": Rule.FREE,
    "training.save_every_steps": Rule.FREE,
    "training.deterministic": Rule.CHANGE,
    "training.save": Rule.FREE,
    "training.save_weights_every_steps": Rule.FREE,
    "training.async_save": Rule.FREE,
    "training.keep_checkpoints": Rule.FREE,
    "training.on_full_disk": Rule.FREE,
    "training.on_end": Rule.FREE,
    "training.resume": Rule.FREE,
    "training.report_to": Rule.FREE,
    "training.process_timeout_minutes": Rule.FREE,
    "training.extra": Rule.MATCH,
    "deepspeed.zero_stage": Rule.MATCH,
    "deepspeed.offload_optimizer": Rule.MATCH,
    "deepspeed.offload_parameters": Rule.MATCH,
    "deepspeed.config": Rule.FREE,  # the fact "deepspeed" is compared
    "evaluation.every_steps": Rule.CHANGE,
    "evaluation.at_start": Rule.FREE,
    "evaluation.generate": Rule.CHANGE,
    "evaluation.replies": Rule.CHANGE,
    "evaluation.max_new_tokens": Rule.CHANGE,
    "evaluation.max_samples": Rule.CHANGE,
    "evaluation.batch_size": Rule.FREE,
    "evaluation.best_metric": Rule.CHANGE,
    **dict.fromkeys(("evaluation.patience", "evaluation.keep", "evaluation.choose"), Rule.CHANGE),
}


@dataclass(frozen=True)
class Difference:
    """One line of the table: what the checkpoint was made with, and what is asked for now."""

    key: str
    checkpoint: str
    now: str


@dataclass(frozen=True)
class ResumeComparison:
    """The differences between a checkpoint's record and this run's."""

    refusals: tuple[Difference, ...]
    changes: tuple[Difference, ...]


def record(
    config: Mapping[str, Any], facts: Mapping[str, Any], versions: Mapping[str, str]
) -> dict[str, Any]:
    """What a checkpoint keeps about its run: options, facts (see FACTS), library versions.

    ``config`` is the resolved configuration as a mapping of sections.
    """
    unknown = sorted(set(facts) - set(FACTS) - set(LISTED_FACTS))
    assert not unknown, f"facts without a meaning: {unknown}"
    return {
        "format": 1,
        "config": options_of(config),
        "facts": dict(facts),
        "versions": {**versions, "finetune": __version__},
    }


def text_of(saved: Mapping[str, Any]) -> str:
    """The record as a checkpoint holds it."""
    return json.dumps(saved, ensure_ascii=False, indent=1, default=str) + "\n"


def read(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint; CheckpointError when it has none."""
    try:
        found = json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))
        if not all(isinstance(found[part], dict) for part in ("config", "facts", "versions")):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder / RUN_RECORD} is missing or damaged, so the run that wrote this checkpoint is unknown; "
            "resume from a checkpoint that `finetune train` wrote"
        ) from None
    return dict(found)


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> ResumeComparison:
    """Which differences between two records forbid resuming and which only need saying."""
    # Through JSON once, so that a tuple and a list, 1 and 1.0, compare as what was written.
    now = json.loads(json.dumps(now, ensure_ascii=False, default=str))
    refusals: list[Difference] = []
    changes: list[Difference] = []
    for key, was, is_now in _differences(saved["config"], now["config"]):
        rule = _rule(key)
        if rule is Rule.MATCH and not _is_new_option(key, saved["config"], now["config"]):
            refusals.append(Difference(key, was, is_now))
        elif rule is not Rule.FREE:
            changes.append(Difference(key, was, is_now))
    for key, was, is_now in _differences(saved["facts"], now["facts"]):
        if key not in LISTED_FACTS:
            refusals.append(Difference(FACTS.get(key, key), was, is_now))
        elif key in saved["facts"]:  # versions before this fact did not keep it
            changes.append(Difference(LISTED_FACTS[key], was, is_now))
    for key, was, is_now in _differences(saved["versions"], now["versions"]):
        changes.append(Difference(f"version of {key}", was, is_now))
    return ResumeComparison(tuple(refusals), tuple(changes))


def check(folder: Path, now: Mapping[str, Any]) -> tuple[Difference, ...]:
    """The harmless differences to a checkpoint; CheckpointError with a table of the others."""
    found = compare(read(folder), now)
    if found.refusals:
        rows = [("", "checkpoint", "now"), *((d.key, d.checkpoint, d.now) for d in found.refusals)]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        table = "\n".join(
            f"  {key:<{widths[0]}}  {was:<{widths[1]}}  {is_now}" for key, was, is_now in rows
        )
        raise CheckpointError(
            f"{folder} was made by a different run and cannot be continued by this one:\n{table}\n"
            "Put these back as they were, or start anew in another training.output_dir"
            + "".join(_remedies(found.refusals))
        )
    return found.changes


def _remedies(refusals: tuple[Difference, ...]) -> Iterator[str]:
    """What else can be done about some differences."""
    refused = {difference.key: difference for difference in refusals}
    if found := refused.get(FACTS["global_batch"]):
        yield (
            f"\nAny number of processes can go on whose batch_size x gradient_accumulation_steps x "
            f"processes is {found.checkpoint}"
        )


def choose(run_dir: Path, resume: str) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The checkpoint that `training.resume` means, and the damaged ones passed over with reasons.

    `auto`: the newest good one, None when there is none. `never`: None, and CheckpointError when
    the run has checkpoints. A path: that one or CheckpointError, never another in its place.
    """
    if resume == "auto":
        return newest_good(run_dir, resumable=True)
    if resume == "never":
        present = checkpoints(run_dir)
        if present:
            raise CheckpointError(
                f"{run_dir} holds {len(present)} checkpoints of an earlier run (newest: {present[-1].name}) and "
                "training.resume is never; choose another training.output_dir or training.resume=auto"
            )
        return None, []
    folder = Path(resume)
    if not folder.is_dir():
        raise CheckpointError(
            f"training.resume must be auto, never or a checkpoint directory; got {resume!r}"
        )
    if not checkpoint.is_resumable(folder):
        raise CheckpointError(
            f"{folder} holds weights only, and nothing can be resumed from it; start another run with "
            "model.adapter (or model.path, if it is a whole model) set to it"
        )
    problems = verify(folder)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(
            f"{folder} is damaged and will not be resumed:\n{listed}\n"
            "Name another checkpoint, or set training.resume=auto for the newest good one"
        )
    return folder, []


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    folder: Path | None = None
    """The checkpoint that it goes on from."""
    step: int = 0
    """Optimizer steps that are done."""
    compares_anew: bool = False
    """Whether the best score so far was judged by something else."""


def start(run_dir: Path, resume: str, now: Mapping[str, Any]) -> Start:
    """The checkpoint that `training.resume` means, verified and compared; says what has changed.

    Raises:
        CheckpointError: It belongs to another run, or `training.resume` forbids what is there.
    """
    checkpoint.best(run_dir)  # is refused when damaged, before hours of training
    folder, skipped = choose(run_dir, resume)
    for damaged, reason in skipped:
        console.warn(f"{damaged} is passed over: {reason}")
    if folder is None:
        _refuse_other_weights(run_dir, now)
        return Start()
    changes = check(folder, now)
    console.say(f"resuming from {folder}")
    for change in changes:
        console.say(f"  {change.key}: was {change.checkpoint}, now {change.now}")
    by_replies = now["config"]["evaluation.best_metric"] != "loss"
    compared = COMPARED + (COMPARED_REPLIES if by_replies else ())
    anew = any(change.key in compared for change in changes)
    if anew:
        console.say("  so the best checkpoint and evaluation.patience begin anew")
        checkpoint.forget_best(run_dir)
    if any(change.key in OF_DATA for change in changes):  # what the untuned model scored on others
        (run_dir / UNTUNED).unlink(missing_ok=True)
    return Start(folder, checkpoint.step_of(folder) or 0, anew)


def start_together(run_dir: Path, resume: str, now: Mapping[str, Any]) -> Start:
    """`start` as rank 0 finds it, in every process."""
    from finetune.distributed.processes import broadcast_from_rank0, patient_group

    return broadcast_from_rank0(lambda: start(run_dir, resume, now), patient_group())


def _refuse_other_weights(run_dir: Path, now: Mapping[str, Any]) -> None:
    """A run that only keeps weights must not add to those of an earlier one."""
    present = checkpoints(run_dir)
    if present and now["config"].get("training.save") == "weights":
        raise CheckpointError(
            f"{run_dir} holds {present[-1].name} of an earlier run, and with training.save: weights no "
            "run can be resumed; choose another training.output_dir, or remove them"
        )


def check_owner(run_dir: Path, resume: str) -> None:
    """CheckpointError when a checkpoint that `training.resume` may mean has states that others wrote.

    Only folders with DeepSpeed's states are looked at. That they are whole is checked by their
    manifest when they are chosen; a manifest says nothing about who wrote them.
    """
    if resume == "never":
        return
    folders = checkpoint.checkpoints(run_dir) if resume == "auto" else [Path(resume)]
    for folder in filter(checkpoint.is_resumable, folders):
        if folder.is_dir() and any(folder.glob(f"{SHARDS}*")):
            files, subfolders, _ = walk(folder)
            _refuse_others(folder, [folder, *(folder / name for name in files + subfolders)])


def _refuse_others(folder: Path, paths: Sequence[Path]) -> None:
    user = os.getuid()
    for path in paths:
        found = path.lstat()
        writable = found.st_mode & 0o002
        if found.st_uid != user or writable:
            whose = "anybody can write to" if writable else f"user {found.st_uid} wrote"
            raise CheckpointError(
                f"{folder} holds optimizer states of DeepSpeed, which are pickles, and {whose} "
                f"{path.name}; resume only from a checkpoint of your own, or say that you trust this "
                "one with --trust-checkpoint"
            )


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options by ``section.key``; sections that are left out give no keys."""
    return {f"{section}.{key}": value for section, options in config.items() for key, value in (options or {}).items()}  # fmt: skip


def _rule(key: str) -> Rule:
    return RULES.get(key) or RULES.get(key.split(".")[0]) or Rule.MATCH


def _is_new_option(key: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether only one of the two versions of this framework knows the option."""
    section = key.split(".")[0] + "."
    sections_of_both = (any(name.startswith(section) for name in side) for side in (saved, now))
    return (key in saved) != (key in now) and all(sections_of_both)


def _differences(
    saved: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    for key in [*saved, *(key for key in now if key not in saved)]:
        if key not in saved or key not in now or saved[key] != now[key]:
            yield key, _shown(saved, key), _shown(now, key)


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "(not set)"
    value = values[key]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
