"""What all libraries are asked."""

from __future__ import annotations

import asyncio
import os
from typing import Literal

from pydantic import BaseModel

KEY = "a key of the clients"
MODEL = "tiny"
QUESTION = "What is the weather in 上海?"

run = asyncio.Runner().run
"""Runs a coroutine in one loop for all: libraries keep connections, which belong to the loop that opened them."""

os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": KEY}


class Pet(BaseModel):
    """A pet."""

    name: str
    kind: Literal["cat", "dog"]
    age: int
    tags: list[str]
    weight: float | None = None


class Owner(BaseModel):
    """Somebody with a pet."""

    name: str
    pet: Pet
