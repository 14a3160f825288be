"""Jobs -> replies and losses of their models, kept so that none is computed twice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np

from finetune import console
from finetune.data.examples.collate import Collator
from finetune.errors import NonFiniteError
from finetune.evaluation.job import EvaluationJob, held_out_files
from finetune.evaluation.predictions import predicted
from finetune.evaluation.tasks.ask import ask
from finetune.evaluation.tasks.harness import Asking
from finetune.evaluation.tasks.table import TaskTable
from finetune.generation.backends.choice import Replying, through_vllm
from finetune.generation.prompts import window_size
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
            console.say(f"{job.target.name}: {job.target.path}")
            with job.results.locked() if on_rank0 else nullcontext():
                if job.options.by.endpoint:
                    _generate_replies(job, _through_endpoint(job))
                    continue
                target = job.target
                model = models.open(target.path, base=target.base, like=target.like).model
                rows = _rows_at_once(job, model, on_rank0)
                _ask_tasks(job, model, rows)
                _measure_losses(job, model, on_rank0)
                if job.options.by.backend == "vllm":
                    models, model = Models(job.options.placement), None  # vLLM takes its memory
                    with _through_vllm(job, rows) as by:
                        _generate_replies(job, by)
                    continue
                _generate_replies(job, _through_model(job, model, rows))


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


def _through_model(job: EvaluationJob, model: Any, rows: int) -> Replying:
    """Our own generation, on all processes together."""
    from finetune.generation.generate import Generator, context_length

    longest = job.settings.evaluation.max_new_tokens
    generator = Generator(model, job.template, max_new_tokens=longest, batch_size=rows)

    def facts() -> dict[str, Any]:
        return {"dtype": str(model.dtype), "prompts_per_rank": generator.prompts_per_rank}

    return Replying(generator, context_length(model), rows, facts)


def _through_endpoint(job: EvaluationJob) -> Replying:
    section, target = job.settings.evaluation, job.target
    return job.options.by.at_endpoint(
        job.template, target.path, base=target.base,
        rows=section.batch_size, max_new_tokens=section.max_new_tokens,
    )  # fmt: skip


def _through_vllm(job: EvaluationJob, rows: int) -> AbstractContextManager[Replying]:
    return through_vllm(
        job.template, job.target.path, lambda room: (len(one.prompt_ids) for one in job.prompts(room)),
        base=job.target.base, rows=rows, max_new_tokens=job.settings.evaluation.max_new_tokens,
    )  # fmt: skip


def _generate_replies(job: EvaluationJob, by: Replying) -> None:
    from finetune.distributed.processes import broadcast_from_rank0, is_rank0

    section, results, options = job.settings.evaluation, job.results, job.options
    begun = time.perf_counter()
    if broadcast_from_rank0(lambda: results.facts) is not None:
        return
    journal = results.journal(window_size(by.rows))
    number = broadcast_from_rank0(partial(results.num_kept, journal))
    if number:
        console.say(f"{number} replies are there already; going on behind them")
    if section.generate and job.settings.sources:
        prompts = job.prompts(by.positions)
        how = Answering(
            job.template, by.rows, journal,
            options.sampling, options.seed, options.form,
        )  # fmt: skip
        for window in answered(by.backend, prompts, how, behind=number):
            pairs = (predicted(prompt, reply.ids, reply.stopped) for prompt, reply in window)
            journal.append(one.unscored_row for one in pairs)
            number += len(window)
        prompts.counts.say()
    if is_rank0():
        seconds = time.perf_counter() - begun
        job.seen.check(held_out_files(job.settings, job.template), "they were evaluated")
        facts: dict[str, Any] = {"seconds": seconds, "replies": number, "batch_size": by.rows}
        results.finish(facts | by.facts())


def _ask_tasks(job: EvaluationJob, model: Any, rows: int) -> None:
    if not job.options.tasks or job.results.note(job.tasks_name) is not None:
        return
    section = job.settings.evaluation
    how = Asking(rows, section.max_samples, job.options.tasks_data)
    scores = ask(model, job.template, job.options.tasks, how)
    job.results.write_note(job.tasks_name, TaskTable(scores).note)
