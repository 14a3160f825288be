"""All prompts of some dialogues at once; the product takes them from a stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Conversation
from finetune.generation.prompts import PromptCounts, PromptStream, ReplyPrompt


class ReplyPrompts(list[ReplyPrompt]):
    """Prompts in the order of the data, with their counts."""

    def __init__(self, prompts: Iterable[ReplyPrompt], counts: PromptCounts) -> None:
        super().__init__(prompts)
        self.counts = counts


def reply_prompts(
    conversations: Iterable[Conversation], template: ChatTemplate, **options: Any
) -> ReplyPrompts:
    stream = PromptStream(conversations, template, **options)
    prompts = list(stream)
    return ReplyPrompts(prompts, stream.counts)
