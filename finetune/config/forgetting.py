"""Options against forgetting: what is replayed, and what is measured beside the held-out data."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune.config.section import Positive, Section


class ReplaySection(Section):
    """Replies of the untuned model itself that are trained beside `train`, so that it forgets less."""

    prompts: str | list[str] | None = None
    """Dialogues that end with a user's message, in any layout of `train`; by default ours, some 330 general ones and ones with tools in Chinese and English."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each reply is seen per epoch, as the `weight` of a source."""

    max_new_tokens: Positive = 512
    """Longest reply in tokens; one that does not end by then is not used."""


class KeepSection(Section):
    """What a tuned model must not lose, measured beside the held-out data at every evaluation."""

    data: str | list[str] | None = None
    """General dialogues, with tools or without: their loss, and the tool calls of the replies where there are tools. By default the replies that `data.replay` holds out."""

    tasks: list[str] = []
    """Public tasks as `finetune evaluate --tasks` takes them, such as `calls:FOLDER`; in one process."""

    loss_margin: Annotated[float, Field(gt=0)] = 0.05
    """The general loss may be worse than the untuned model's by less than this."""

    score_margin: Annotated[float, Field(gt=0)] = 5.0
    """Scores of tool calls and tasks, 0 to 100, may be worse by less than this."""
