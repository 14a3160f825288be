"""Held-out dialogues -> prompts -> answers, the same in training and afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.config.schema import EvaluationSection
from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Conversation
from finetune.evaluation.answers import Answer, answered
from finetune.generation.prompts import PromptCounts, PromptStream, ReplyPrompt, ReplyPrompts

if TYPE_CHECKING:
    from finetune.distributed.map_batches import Poll
    from finetune.generation.generate import Extras

BATCHES_PER_WINDOW = 64
"""Batches whose prompts are sorted by length together, and whose answers are kept together."""


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
    stream = asked(conversations, template, section, positions)
    prompts = ReplyPrompts(list(stream), stream.counts)
    say_counts(prompts.counts)
    return prompts


def asked(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    section: EvaluationSection,
    positions: int | None,
) -> PromptStream:
    """The prompts of `ask`, one after another; what is left out is counted and not yet said."""
    return PromptStream(
        conversations,
        template,
        replies=section.replies,
        max_prompt=None if positions is None else positions - section.max_new_tokens,
        max_samples=section.max_samples,
    )


def answers(
    model: Any,
    template: ChatTemplate,
    prompts: Iterator[ReplyPrompt],
    section: EvaluationSection,
    *,
    should_stop: Poll | None = None,
    extras_at: Callable[[int], Extras] | None = None,
) -> Iterator[list[Answer]]:
    """The replies to `prompts` window by window, in their order, on every process.

    Memory holds one window. What a window is depends on `section.batch_size` alone, so that the
    same prompts are generated in the same batches wherever this runs. `extras_at` is given the
    number of a window's first prompt.
    """
    from finetune.generation.generate import Extras, check_context, generate

    first = 0
    while window := list(islice(prompts, section.batch_size * BATCHES_PER_WINDOW)):
        ids = [prompt.prompt_ids for prompt in window]
        names = [f"{prompt.where} message {prompt.index + 1}" for prompt in window]
        check_context(model, [len(one) for one in ids], section.max_new_tokens, names)
        replies = generate(
            model,
            template,
            ids,
            max_new_tokens=section.max_new_tokens,
            batch_size=section.batch_size,
            should_stop=should_stop,
            extras=extras_at(first) if extras_at else Extras(),
        )
        first += len(window)
        yield [
            answered(prompt, reply.ids, reply.stopped, template)
            for prompt, reply in zip(window, replies, strict=True)
        ]


def say_counts(counts: PromptCounts) -> None:
    """What was left out, and why."""
    if counts.sampled < counts.replies:
        console.say(
            f"generating {counts.sampled} of {counts.replies} replies, always the same ones"
        )
    if counts.shortened:
        console.say(f"{counts.shortened} prompts lost their oldest turns to fit into the context")
    if counts.dropped:
        named = "".join(f"\n  {line}" for line in counts.named)
        console.warn(f"{counts.dropped} prompts do not fit into the context, left out:{named}")
