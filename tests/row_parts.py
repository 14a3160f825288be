"""The parts of rows, and what becomes of them, for the tests of the layouts."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.data.conversation import Conversation, RowError
from finetune.data.formats import to_conversation

USER = {"role": "user", "content": "Q"}
REPLY = {"role": "assistant", "content": "A"}
CALL = {"role": "assistant", "metadata": "f", "content": "{}"}
RESULT = {"role": "observation", "content": "R"}
SYSTEM = {"role": "system", "content": "S"}

WEATHER = {
    "name": "get_weather",
    "description": "天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def messages(*items: dict[str, Any], **row: Any) -> Conversation:
    return to_conversation({"messages": list(items), **row}, "messages")


def reason(*items: Any, **row: Any) -> str:
    with pytest.raises(RowError) as error:
        messages(*items, **row)
    return str(error.value)
