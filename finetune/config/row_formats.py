"""The names of the ways to write a dialogue into a row; `data.dialogue.formats` reads each."""

from __future__ import annotations

from typing import Literal

RowFormat = Literal[
    "auto", "messages", "openai", "sharegpt", "alpaca", "pairs", "chatglm3", "conversation", "glaive",
    "moss", "xlam", "chatml", "text",
]  # fmt: skip
