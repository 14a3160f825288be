"""Jobs -> replies and losses of their models, kept so that none is computed twice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

from finetune import console
from finetune.data.examples.collate import Collator
from finetune.data.reading.sources import read_conversations
from finetune.errors import NonFiniteError
from finetune.evaluation.job import EvaluationJob, held_out_files
from finetune.evaluation.predictions import predicted
from finetune.evaluation.tasks.ask import ask
from finetune.evaluation.tasks.harness import Asking
from finetune.evaluation.tasks.table import TaskTable
from finetune.generation.prompts import PromptStream, window_size
from finetune.generation.replies import Answering, answered


def run(jobs: Sequence[EvaluationJob]) -> None:
    """Fills the results that are not there yet, on all processes together; loads every base once."""
    missing = [job for job in jobs if not job.is_done]
    for job in jobs:
        if job not in missing:
            console.say(f"{job.target.name}: evaluated before, kept in {job.results.folder}")
    if not missing:
        return
    from finetune.distributed.processes import is_rank0, joined_processes
    from finetune.generation.load import Models

    with joined_processes():
        on_rank0 = is_rank0()
        models = Models(missing[0].options.placement)
        for job in missing:
            opened = models.open(job.target.path, base=job.target.base, like=job.target.like)
            console.say(f"{job.target.name}: {job.target.path}")
            with job.results.locked() if on_rank0 else nullcontext():
                rows = _rows_at_once(job, opened.model, on_rank0)
                _ask_tasks(job, opened.model, rows)
                _measure_losses(job, opened.model, on_rank0)
                _generate_replies(job, opened.model, rows)


def _rows_at_once(job: EvaluationJob, model: Any, on_rank0: bool) -> int:
    """The batch size, of an evaluation that goes on the one that it began with."""
    from finetune.distributed.processes import broadcast_from_rank0
    from finetune.generation.generate import rows_at_once

    kept: int | None = broadcast_from_rank0(lambda: job.results.note("batch_size"))
    if kept is not None:
        return kept
    section = job.settings.evaluation
    longest = job.settings.policy.max_length + section.max_new_tokens
    rows = rows_at_once(model, section.batch_size, longest)
    if on_rank0:
        job.results.write_note("batch_size", rows)
    return rows


def _measure_losses(job: EvaluationJob, model: Any, on_rank0: bool) -> None:
    from finetune.distributed.processes import broadcast_from_rank0
    from finetune.evaluation.loss import validation_loss

    collate = Collator(job.template.pad_id, image=job.template.image)
    for name, examples in job.losses.items():
        if broadcast_from_rank0(partial(job.results.losses, name)) is not None:
            continue
        found = validation_loss(model, examples, collate, batch_size=job.settings.loss_batch_size)
        if not np.isfinite(found.losses).all():
            raise NonFiniteError(
                f"{job.target.path}: the loss on {np.sum(~np.isfinite(found.losses))} of "
                f"{len(found.losses)} held-out examples is NaN or infinite; its weights (or model.dtype "
                "float16) are the likely cause; check them, or evaluate another checkpoint"
            )
        if on_rank0:
            job.results.write_losses(name, found.losses, found.weights)


def _generate_replies(job: EvaluationJob, model: Any, rows: int) -> None:
    from finetune.distributed.processes import broadcast_from_rank0, is_rank0
    from finetune.generation.generate import Generator, context_length

    section, results, options = job.settings.evaluation, job.results, job.options
    begun = time.perf_counter()
    if broadcast_from_rank0(lambda: results.facts) is not None:
        return
    journal = results.journal(window_size(rows))
    number = broadcast_from_rank0(partial(results.num_kept, journal))
    if number:
        console.say(f"{number} replies are there already; going on behind them")
    generator = Generator(
        model,
        job.template,
        max_new_tokens=section.max_new_tokens,
        batch_size=rows,
    )
    if section.generate and job.settings.sources:
        reading = job.settings.reading.for_checkpoint(job.template)
        dialogues = read_conversations(job.settings.sources, reading)
        prompts = PromptStream.of(dialogues, job.template, section, context_length(model))
        how = Answering(
            job.template, rows, journal,
            options.sampling, options.seed, options.form,
        )  # fmt: skip
        for window in answered(generator, prompts, how, behind=number):
            pairs = (predicted(prompt, reply.ids, reply.stopped) for prompt, reply in window)
            journal.append(one.unscored_row for one in pairs)
            number += len(window)
        prompts.counts.say()
    if is_rank0():
        seconds = time.perf_counter() - begun
        job.seen.check(held_out_files(job.settings, job.template), "they were evaluated")
        facts: dict[str, Any] = {"seconds": seconds, "dtype": str(model.dtype), "replies": number}
        facts |= {"prompts_per_rank": generator.prompts_per_rank, "batch_size": rows}
        results.finish(facts)


def _ask_tasks(job: EvaluationJob, model: Any, rows: int) -> None:
    if not job.options.tasks or job.results.note(job.tasks_name) is not None:
        return
    section = job.settings.evaluation
    how = Asking(rows, section.max_samples, job.options.tasks_data)
    scores = ask(model, job.template, job.options.tasks, how)
    job.results.write_note(job.tasks_name, TaskTable(scores).note)
