"""The evaluation section -> what a run is measured by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.config.schema import EvaluationSection
from finetune.data.examples.collate import Collator
from finetune.data.reading.sources import read_conversations
from finetune.distributed.signals import StopFlag
from finetune.generation.generate import context_length, rows_at_once
from finetune.generation.prompts import ReplyPrompt, prompts_of
from finetune.training.measuring.choosing import Chooser
from finetune.training.measuring.keeping import KeptData
from finetune.training.measuring.validation import Validation
from finetune.training.run_data import RunData


def load_validation(
    section: EvaluationSection,
    data: RunData,
    model: Any,
    run_dir: Path,
    stop: StopFlag,
) -> Validation | None:
    """What the config asks to be evaluated; None without validation data."""
    if data.validation is None:
        return None
    template = data.template
    rows = rows_at_once(model, section.batch_size, data.max_length + section.max_new_tokens)
    section = section.model_copy(update={"batch_size": rows})
    prompts: Sequence[ReplyPrompt] = ()
    if section.generate:
        reading = data.reading.for_checkpoint(template)
        dialogues = read_conversations(data.validation_sources, reading)
        prompts = prompts_of(dialogues, template, section, context_length(model))
    kept = _kept(section, data, model)
    return Validation(
        section=section,
        examples=data.validation,
        prompts=prompts,
        collate=Collator(template.pad_id, image=template.image),
        batch_size=data.plan.batch_size,
        run_dir=run_dir,
        stop=stop,
        kept=kept,
        chooser=Chooser(run_dir, kept) if kept and section.choose != "best_metric" else None,
    )


def _kept(section: EvaluationSection, data: RunData, model: Any) -> KeptData | None:
    """What the config asks to be kept."""
    if section.keep is None:
        return None
    reading = data.reading.for_checkpoint(data.template)
    dialogues = (one for one in read_conversations(data.kept_sources, reading) if one.tools)
    prompts: Sequence[ReplyPrompt] = ()
    if data.kept_sources and section.generate:
        prompts = prompts_of(dialogues, data.template, section, context_length(model))
    return KeptData(section.keep, data.template, data.kept, prompts, data.plan.batch_size, section)
