"""openai: sync, async, streaming, tools, structured output, texts, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from asked import KEY, MODEL, QUESTION, Owner, Pet

ASK: Any = [{"role": "user", "content": QUESTION}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CLOCK: Any = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}


_open: list[openai.OpenAI] = []


def client(url: str, **more: Any) -> openai.OpenAI:
    """A client that is closed behind the test: the server would keep its connection for a while."""
    _open.append(openai.OpenAI(base_url=url, **{"api_key": KEY, "max_retries": 0} | more))
    return _open[-1]


@pytest.fixture(autouse=True)
def closed_clients() -> Iterator[None]:
    yield
    while _open:
        _open.pop().close()


def test_a_reply_whole_streamed_and_asynchronous(random: str) -> None:
    asked: Any = {"model": MODEL, "messages": ASK, "max_tokens": 8}
    whole = client(random).chat.completions.create(**asked).choices[0].message.content
    assert whole
    chunks = list(client(random).chat.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole

    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=random, api_key=KEY, max_retries=0) as other:
            replies = [other.chat.completions.create(**asked) for _ in range(3)]
            return [one.choices[0].message.content for one in await asyncio.gather(*replies)]

    assert asyncio.run(ask()) == [whole] * 3


def test_models_and_texts(random: str) -> None:
    assert [model.id for model in client(random).models.list()] == [MODEL]
    assert client(random).models.retrieve(MODEL).id == MODEL
    made = client(random).completions.create(model=MODEL, prompt=["a", "b"], max_tokens=4)
    assert len(made.choices) == 2
    parts = client(random).completions.create(model=MODEL, prompt="a", max_tokens=4, stream=True)
    assert "".join(part.choices[0].text for part in parts) == made.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_its_result_and_the_answer(obedient: str, stream: bool) -> None:
    asked: Any = {"model": MODEL, "tools": [WEATHER]}
    if stream:
        with client(obedient).chat.completions.stream(**asked, messages=ASK) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = client(obedient).chat.completions.create(**asked, messages=ASK).choices[0].message
    [call] = message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "上海"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "error: no such city"}
    messages = [*ASK, message, result]
    said = client(obedient).chat.completions.create(**asked, messages=messages)
    assert said.choices[0].message.content == "I was told: error: no such city"
    again = [*messages, said.choices[0].message, {"role": "user", "content": "and now?"}]
    assert client(obedient).chat.completions.create(**asked, messages=again).choices


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "clock"}}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_come_comes(random: str, choice: Any, stream: bool) -> None:
    asked: Any = {"model": MODEL, "messages": ASK, "tools": [WEATHER, CLOCK], "tool_choice": choice}
    if stream:
        with client(random).chat.completions.stream(**asked) as events:
            made = events.get_final_completion()
    else:
        made = client(random).chat.completions.create(**asked, parallel_tool_calls=False)
    call = made.choices[0].message.tool_calls[0]
    assert call.function.name in ("get_weather", "clock")
    assert isinstance(json.loads(call.function.arguments), dict)
    assert choice == "required" or call.function.name == "clock"


@pytest.mark.parametrize("kind", [Pet, Owner])
def test_parse_gives_the_class(random: str, kind: Any) -> None:
    chats = client(random).chat.completions
    made = chats.parse(model=MODEL, messages=ASK, response_format=kind)
    assert isinstance(made.choices[0].message.parsed, kind)
    with chats.stream(model=MODEL, messages=ASK, response_format=kind) as events:
        assert isinstance(events.get_final_completion().choices[0].message.parsed, kind)
    tool = openai.pydantic_function_tool(kind)
    made = chats.parse(model=MODEL, messages=ASK, tools=[tool], tool_choice="required")
    call = made.choices[0].message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, kind)


def test_an_object_of_any_kind(random: str) -> None:
    made = client(random).chat.completions.create(
        model=MODEL, messages=ASK, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(made.choices[0].message.content), dict)


def test_errors_are_the_librarys_own(random: str) -> None:
    ask = client(random).chat.completions.create
    with pytest.raises(openai.NotFoundError, match="'gpt-4o' is not served here"):
        ask(model="gpt-4o", messages=ASK)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(model=MODEL, messages=ASK, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client(random, api_key="another").chat.completions.create(model=MODEL, messages=ASK)
    with pytest.raises(openai.NotFoundError, match="give no embeddings"):
        client(random).embeddings.create(model=MODEL, input="a")


def test_the_responses_api_is_refused_with_the_address_that_is_served(random: str) -> None:
    responses = client(random).responses
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        responses.create(model=MODEL, input=QUESTION)
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        responses.parse(model=MODEL, input=QUESTION, text_format=Pet)
    with (
        pytest.raises(openai.NotFoundError, match="/v1/chat/completions"),
        responses.stream(model=MODEL, input=QUESTION) as events,
    ):
        list(events)


def test_what_an_agent_sends_back_when_things_went_wrong(random: str) -> None:
    broken = {"id": "a", "type": "function", "function": {"name": "clock", "arguments": '{"x'}}
    history: list[Any] = [
        {"role": "developer", "content": "be brief"},
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [broken]},
        {"role": "tool", "tool_call_id": "a", "content": "invalid JSON"},
        {"role": "user", "content": "try again"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "and again"}]},
    ]
    made = client(random).chat.completions.create(
        model=MODEL, messages=history, tools=[CLOCK], tool_choice="required"
    )
    assert made.choices[0].message.tool_calls


def test_a_streamed_call_comes_in_parts_that_join(random: str) -> None:
    asked: Any = {"model": MODEL, "messages": ASK, "tools": [WEATHER, CLOCK], "seed": 1}
    asked |= {"tool_choice": "required"}
    whole = client(random).chat.completions.create(**asked).choices[0].message.tool_calls

    async def parts() -> Any:
        async with openai.AsyncOpenAI(base_url=random, api_key=KEY, max_retries=0) as other:
            chunks = await other.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
            return [chunk async for chunk in chunks]

    chunks = asyncio.run(parts())
    assert chunks[-1].usage.completion_tokens > 0
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "tool_calls"
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        for part in chunk.choices[0].delta.tool_calls or [] if chunk.choices else []:
            call = calls.setdefault(part.index, ["", ""])
            call[0] += part.function.name or ""
            call[1] += part.function.arguments or ""
    assert list(calls) == list(range(len(whole)))
    assert [tuple(call) for call in calls.values()] == [
        (call.function.name, call.function.arguments) for call in whole
    ]


def test_an_asynchronous_stream_of_a_class_tells_its_parts(random: str) -> None:
    async def parts() -> Any:
        async with openai.AsyncOpenAI(base_url=random, api_key=KEY, max_retries=0) as other:
            chats = other.chat.completions
            whole = await chats.parse(model=MODEL, messages=ASK, response_format=Pet)
            async with chats.stream(model=MODEL, messages=ASK, response_format=Pet) as stream:
                kinds = [event.type async for event in stream]
                return whole, kinds, await stream.get_final_completion()

    whole, kinds, streamed = asyncio.run(parts())
    assert {"content.delta", "content.done"} <= set(kinds)
    assert streamed.choices[0].message.parsed == whole.choices[0].message.parsed


def test_two_calls_of_one_turn_and_both_results_are_read(obedient: str) -> None:
    calls = [
        {"id": name, "type": "function", "function": {"name": "clock", "arguments": "{}"}}
        for name in "ab"
    ]
    history: list[Any] = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "first"},
        {"role": "tool", "tool_call_id": "b", "content": "second"},
    ]
    made = client(obedient).chat.completions.create(
        model=MODEL, messages=history, tools=[CLOCK], parallel_tool_calls=True
    )
    assert "second" in made.choices[0].message.content


def test_raw_answers_are_given_too(random: str) -> None:
    asked: Any = {"model": MODEL, "messages": ASK, "max_tokens": 4}
    raw = client(random).chat.completions.with_raw_response.create(**asked)
    assert raw.http_response.status_code == 200
    with client(random).chat.completions.with_streaming_response.create(
        **asked, stream=True
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert raw.parse().choices[0].message.content
