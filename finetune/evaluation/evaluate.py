"""A model and prompts with references -> scores and every prediction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune import console
from finetune.config import EvaluationSection
from finetune.data.conversation import Conversation
from finetune.data.prompts import ReplyPrompt, ReplyPrompts, reply_prompts
from finetune.data.template import ChatTemplate
from finetune.evaluation import metrics
from finetune.evaluation.generate import check_context, generate
from finetune.evaluation.predictions import Prediction
from finetune.evaluation.turns import Poll


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What a model scores on a list of prompts."""

    scores: metrics.Scores
    predictions: list[Prediction]
    """In the order of the prompts."""


def ask(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    section: EvaluationSection,
    *,
    positions: int | None,
) -> ReplyPrompts:
    """The prompts that `section` asks for, the same in training and afterwards; says what is left out.

    Args:
        conversations: the held-out dialogues.
        template: the checkpoint's.
        section: which replies, how many, and how long they may be.
        positions: `context_length(model)`; a prompt that leaves no room for a reply loses its
            oldest turns.
    """
    prompts = reply_prompts(
        conversations,
        template,
        replies=section.replies,
        max_prompt=None if positions is None else positions - section.max_new_tokens,
        max_samples=section.max_samples,
    )
    counts = prompts.counts
    if counts.sampled < counts.replies:
        console.say(
            f"generating {counts.sampled} of {counts.replies} replies, always the same ones"
        )
    if counts.shortened:
        console.say(f"{counts.shortened} prompts lost their oldest turns to fit into the context")
    if counts.dropped:
        named = "".join(f"\n  {line}" for line in counts.named)
        console.warn(f"{counts.dropped} prompts do not fit into the context, left out:{named}")
    return prompts


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
        EvaluationStoppedError: `should_stop` returned True.
    """
    ids = [prompt.prompt_ids for prompt in prompts]
    names = [f"{prompt.where} message {prompt.index + 1}" for prompt in prompts]
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
