"""instructor: every mode for this kind of endpoint, parts, lists, and answers sent back as wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import instructor
import openai
import pytest
from asked import KEY, MODEL, QUESTION, Owner, Pet, run
from instructor import Mode
from pydantic import BaseModel, field_validator

ASK = [{"role": "user", "content": QUESTION}]
ENFORCED = [Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA]
MODES = [*ENFORCED, Mode.JSON, Mode.MD_JSON]
"""The last two show the schema to the model and do not enforce it; the obedient model follows it."""


@pytest.fixture
def endpoint(random: str, obedient: str, mode: Mode) -> str:
    return random if mode in ENFORCED else obedient


def client(url: str, mode: Mode) -> Any:
    return instructor.from_openai(
        openai.OpenAI(base_url=url, api_key=KEY, max_retries=0), mode=mode
    )


@pytest.mark.parametrize("kind", [Pet, Owner])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_class(endpoint: str, mode: Mode, kind: Any) -> None:
    made = client(endpoint, mode).chat.completions.create(
        model=MODEL, messages=ASK, response_model=kind, max_retries=0
    )
    assert isinstance(made, kind)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_parts_and_lists(endpoint: str, mode: Mode) -> None:
    chats = client(endpoint, mode).chat.completions
    asked: Any = {"model": MODEL, "messages": ASK}
    parts = list(chats.create_partial(response_model=Pet, **asked))
    assert parts[-1].kind in ("cat", "dog")
    assert isinstance(
        next(iter(chats.create_iterable(response_model=Pet, **asked)), None), Pet | None
    )


def test_the_default_way(random: str) -> None:
    made = instructor.from_provider(f"openai/{MODEL}", base_url=random, api_key=KEY)
    assert isinstance(made.chat.completions.create(messages=ASK, response_model=Pet), Pet)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_works_asynchronously(endpoint: str, mode: Mode) -> None:
    async def asked() -> Any:
        async with openai.AsyncOpenAI(base_url=endpoint, api_key=KEY, max_retries=0) as other:
            chats = instructor.from_openai(other, mode=mode).chat.completions
            options: Any = {"model": MODEL, "messages": ASK, "response_model": Pet}
            made, raw = await chats.create_with_completion(**options)
            parts = [part async for part in chats.create_partial(**options)]
            return made, raw, parts[-1]

    made, raw, last = run(asked())
    assert isinstance(made, Pet)
    assert raw.usage.completion_tokens > 0
    assert last.model_dump() == made.model_dump()


@pytest.mark.parametrize("mode", [Mode.RESPONSES_TOOLS])
def test_the_modes_of_the_responses_api_say_what_to_set(random: str, mode: Mode) -> None:
    with pytest.raises(Exception, match="does not begin with RESPONSES"):
        client(random, mode).chat.completions.create(
            model=MODEL, messages=ASK, response_model=Pet, max_retries=0
        )


def test_several_calls_at_once(obedient: str) -> None:
    made = client(obedient, Mode.PARALLEL_TOOLS).chat.completions.create(
        model=MODEL, messages=ASK, response_model=Iterable[Pet | Owner]
    )
    assert all(isinstance(one, Pet | Owner) for one in made)


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_that_does_not_hold_is_sent_back(endpoint: str, mode: Mode) -> None:
    seen: list[str] = []

    class Picky(BaseModel):
        word: str

        @field_validator("word")
        @classmethod
        def second(cls, word: str) -> str:
            seen.append(word)
            if len(seen) < 2:
                raise ValueError("not this one")
            return word

    made = client(endpoint, mode).chat.completions.create(
        model=MODEL, messages=ASK, response_model=Picky, max_retries=3
    )
    assert isinstance(made, Picky)
    assert len(seen) == 2
