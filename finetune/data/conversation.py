"""What a valid dialogue is: the one form in which every input format arrives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "observation"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. A tool call is an assistant message whose metadata is the function's name."""

    role: Role
    content: str
    metadata: str = ""
    train: bool | None = None
    """Whether this reply carries loss; None leaves it to `data.train_on`."""
    weight: float = 1.0
    """Weight of this reply's tokens in the loss."""
    image: str | None = None
    """Path of an image shown with a user message (GLM-4V)."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A dialogue: system messages first, then user, observation and assistant messages."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tool definitions as `{"type": "function", "function": {...}}` or `{"type": "python"}`."""
    where: str = ""
    """`file:line` for reports."""
