"""What a model answered, before it is scored: the form between generation and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.data.dialogue.conversation import Message
from finetune.evaluation.slices import slices_of

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate
    from finetune.generation.prompts import ReplyPrompt


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply beside its reference."""

    where: str
    """`file:line` of the dialogue."""
    message: int
    """Which message of the dialogue is the reference."""
    prompt: str
    """The prompt as text, control tokens spelled out."""
    reply: Message
    reference: Message
    stopped: bool | None
    """A stop token ended the reply; None when it is not known."""
    tools: tuple[Mapping[str, Any], ...] = ()
    slices: dict[str, str] = field(default_factory=dict)
    """Which parts of the data it belongs to."""
    images: tuple[str, ...] = ()
    """Paths of the images that the prompt shows."""

    @property
    def row(self) -> dict[str, Any]:
        """The line of a file of answers."""
        return {
            "where": self.where,
            "message": self.message,
            "prompt": self.prompt,
            "reply": [self.reply.metadata, self.reply.content],
            "reference": [self.reference.metadata, self.reference.content],
            "stopped": self.stopped,
            "tools": list(self.tools),
            "slices": self.slices,
            "images": list(self.images),
        }


def answer_of(row: Mapping[str, Any]) -> Answer:
    """The answer of a line."""
    texts = {
        name: Message("assistant", content, metadata)
        for name in ("reply", "reference")
        for metadata, content in [row[name]]
    }
    return Answer(
        where=row["where"],
        message=row["message"],
        prompt=row["prompt"],
        stopped=row["stopped"],
        tools=tuple(row["tools"]),
        slices=row["slices"],
        images=tuple(row["images"]),
        **texts,
    )


def answered(
    prompt: ReplyPrompt, ids: tuple[int, ...], stopped: bool, template: ChatTemplate
) -> Answer:
    """The answer that a model's new tokens are."""
    return Answer(
        where=prompt.where,
        message=prompt.index,
        prompt=prompt.text,
        reply=template.parse(ids),
        reference=prompt.reference,
        stopped=stopped,
        tools=tuple(prompt.tools),
        slices=slices_of(prompt),
        images=prompt.images,
    )
