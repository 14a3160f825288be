"""A model at hand, as training has it -> the scores of its replies, made and scored as `evaluate` does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.evaluation.predictions import Prediction, Scores, predicted
from finetune.evaluation.scores.statistics import ReplyTable
from finetune.evaluation.scoring import Scoring, score
from finetune.generation.prompts import ReplyPrompt

if TYPE_CHECKING:
    from finetune.distributed.map_batches import Poll


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What a model scores on a list of prompts."""

    scores: Scores
    predictions: list[Prediction]
    """In the order of the prompts."""


def evaluate_model(
    model: Any,
    prompts: Sequence[ReplyPrompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    should_stop: Poll | None = None,
) -> EvaluationResult:
    """Scores of the greedy replies to `prompts`; the same on every process, and for any number of them.

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens`; names it.
        EvaluationStoppedError: `should_stop` returned True.
    """
    from finetune.generation.generate import check_context, context_length, generate

    ids = [prompt.prompt_ids for prompt in prompts]
    names = [prompt.name for prompt in prompts]
    check_context(context_length(model), [len(one) for one in ids], max_new_tokens, names)
    replies = generate(
        model,
        prompts[0].template,
        ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        should_stop=should_stop,
    )
    table, predictions = ReplyTable(), []
    for prompt, reply in zip(prompts, replies, strict=True):
        one = score(predicted(prompt, reply.ids, reply.stopped), Scoring())
        table.add(one.location, one.scores, one.counts)
        predictions.append(one)
    return EvaluationResult(table.scores(), predictions)
