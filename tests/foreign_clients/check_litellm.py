"""litellm: completions of both kinds, streams, tools, structured output, its errors and its router."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest
from asked import KEY, MODEL, QUESTION, Pet, run
from check_openai import CLOCK, WEATHER

ASK = [{"role": "user", "content": QUESTION}]


def ask(url: str, **more: Any) -> Any:
    options = {"model": f"openai/{MODEL}", "messages": ASK, "api_base": url, "api_key": KEY}
    return litellm.completion(**options | {"num_retries": 0} | more)


def test_a_reply_whole_streamed_and_asynchronous(random: str) -> None:
    whole = ask(random, max_tokens=8).choices[0].message.content
    assert whole
    parts = list(ask(random, max_tokens=8, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == whole
    assert litellm.stream_chunk_builder(parts).choices[0].message.content == whole
    later = litellm.acompletion(
        model=f"openai/{MODEL}", messages=ASK, api_base=random, api_key=KEY, max_tokens=8
    )
    assert run(later).choices[0].message.content == whole


def test_a_text_goes_on(random: str) -> None:
    made = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="once", api_base=random, api_key=KEY, max_tokens=4
    )  # fmt: skip
    assert made.choices[0].text


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "clock"}}]
)
def test_a_call_that_must_come_comes(random: str, choice: Any) -> None:
    made = ask(random, tools=[WEATHER, CLOCK], tool_choice=choice)
    assert made.choices[0].message.tool_calls
    assert list(ask(random, tools=[WEATHER, CLOCK], tool_choice=choice, stream=True))


def test_a_call_and_its_error_come_back(obedient: str) -> None:
    message = ask(obedient, tools=[WEATHER]).choices[0].message
    [call] = message.tool_calls
    failed = {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "failed"}
    said = ask(obedient, tools=[WEATHER], messages=[*ASK, message.model_dump(), failed])
    assert said.choices[0].message.content == "I was told: failed"


@pytest.mark.parametrize("form", [Pet, {"type": "json_object"}, {
    "type": "json_schema",
    "json_schema": {"name": "pet", "schema": Pet.model_json_schema(), "strict": True},
}], ids=["class", "object", "schema"])  # fmt: skip
def test_structured_output(random: str, form: Any) -> None:
    text = ask(random, response_format=form).choices[0].message.content
    assert isinstance(json.loads(text), dict)
    if form != {"type": "json_object"}:
        Pet.model_validate_json(text)
    parts = ask(random, response_format=form, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == text


def test_errors_are_the_librarys_own(random: str) -> None:
    with pytest.raises(litellm.NotFoundError):
        ask(random, model="openai/other")
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(random, temperature=9)
    with pytest.raises(litellm.AuthenticationError):
        ask(random, api_key="another")


def test_the_router_passes_on(random: str) -> None:
    location = {"model": f"openai/{MODEL}", "api_base": random, "api_key": KEY}
    router = litellm.Router([{"model_name": "mine", "litellm_params": location}])
    assert router.completion(model="mine", messages=ASK, max_tokens=4).choices[0].message.content


def test_calls_and_objects_come_asynchronously_and_streamed(random: str) -> None:
    options: Any = {"model": f"openai/{MODEL}", "messages": ASK, "api_base": random, "api_key": KEY}
    must: Any = {"tools": [WEATHER, CLOCK], "tool_choice": "required"}

    async def asked() -> Any:
        streams = [
            await litellm.acompletion(**options, **more, stream=True)
            for more in (must, {"response_format": Pet})
        ]
        return [[part async for part in stream] for stream in streams]

    called, written = (litellm.stream_chunk_builder(parts) for parts in run(asked()))
    [call, *_] = called.choices[0].message.tool_calls
    [whole, *_] = ask(random, **must).choices[0].message.tool_calls
    assert call.function.arguments == whole.function.arguments
    Pet.model_validate_json(written.choices[0].message.content)


def test_the_responses_api_goes_over_chats_and_its_refusal_says_how(
    random: str,
) -> None:
    options: Any = {"input": QUESTION, "api_base": random, "api_key": KEY, "max_output_tokens": 8}
    made = litellm.responses(model=f"openai/{MODEL}", use_chat_completions_api=True, **options)
    assert made.output[-1].content[0].text
    with pytest.raises(litellm.BadRequestError, match="use_chat_completions_api=True"):
        litellm.responses(model=f"openai/{MODEL}", **options)
    with pytest.raises(litellm.BadRequestError, match="give no embeddings"):
        litellm.embedding(model=f"openai/{MODEL}", input=["a"], api_base=random, api_key=KEY)
