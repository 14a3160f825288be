"""A model and prompts with references -> scores and every prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.prompts import ReplyPrompt
from finetune.data.template import ChatTemplate
from finetune.evaluation import metrics
from finetune.evaluation.generate import Poll, check_context, generate
from finetune.evaluation.predictions import Prediction


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What a model scores on a list of prompts."""

    scores: metrics.Scores
    predictions: list[Prediction]
    """In the order of the prompts."""


def evaluate_model(
    model: Any,
    template: ChatTemplate,
    prompts: Sequence[ReplyPrompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    should_stop: Poll | None = None,
) -> EvaluationResult:
    """Scores of the greedy replies to `prompts`; the same on every process, and for any number of them.

    The one way in which replies are scored, during training and by `finetune evaluate` (law 10).

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens`; names it.
        GenerationStoppedError: `should_stop` returned True.
    """
    ids = [prompt.prompt_ids for prompt in prompts]
    names = [f"{prompt.where} message {prompt.index}" for prompt in prompts]
    check_context(model, [len(prompt) for prompt in ids], max_new_tokens, names)
    replies = generate(
        model,
        template,
        ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        should_stop=should_stop,
    )
    predictions = []
    for prompt, reply in zip(prompts, replies, strict=True):
        message = template.parse(reply.ids)
        pair = metrics.Pair(message, prompt.reference, reply.stopped, tuple(prompt.tools))
        predictions.append(
            Prediction(
                where=prompt.where,
                message=prompt.index,
                prompt=prompt.text,
                reference=metrics.text(prompt.reference),
                prediction=metrics.text(message),
                stopped=reply.stopped,
                scores=metrics.score_pair(pair),
            )
        )
    return EvaluationResult(metrics.mean([one.scores for one in predictions]), predictions)
