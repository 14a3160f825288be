"""A held-out part of the data by group: the same question never stands on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from finetune.data.dialogue.conversation import Conversation, RowError


@dataclass(frozen=True)
class Part:
    """The held-out share of the dialogues, or the rest.

    Which side a dialogue is on depends on its group's text alone: not on its place, on a seed, or on
    what other rows there are, so that it stays where it is when the data grows.
    """

    share: float
    """Above 0 and below 1: how much is held out, on average."""
    held_out: bool
    """Whether the held-out dialogues are meant, or the others."""
    group_by: str = ""
    """The column whose value makes a group; by default dialogues that ask the same are one."""

    def takes(self, row: dict[str, Any], conversation: Conversation) -> bool:
        """Whether the dialogue belongs to this part; RowError for a row without its group."""
        number = int.from_bytes(
            blake2b(self._group(row, conversation).encode(), digest_size=8).digest(), "big"
        )
        return (number / 2**64 < self.share) == self.held_out

    def _group(self, row: dict[str, Any], conversation: Conversation) -> str:
        if self.group_by:
            if row.get(self.group_by) is None:
                raise RowError(f"the row has no {self.group_by!r}, by which data.group_by groups")
            return str(row[self.group_by])
        if conversation.text:
            return conversation.text
        asked = []
        for message in conversation.messages:
            if message.role == "assistant":
                break
            shown = "\0".join(image.path for image in message.images)
            asked.append(f"{message.role}\0{message.content}\0{shown}")
        return "\0".join(asked)

    def nothing_left(self, paths: str, dialogues: int) -> str:
        """Why a part of `dialogues` holds none, and what to do."""
        side = "held out" if self.held_out else "left to train on"
        return (
            f"{paths}: of {dialogues} dialogues none is {side} at {self.share:.1%}; there are too few "
            "groups: change data.validation, or give a file of its own"
        )
