"""pydantic-ai: text, its three ways to structured output, tools that ask again, streams."""

from __future__ import annotations

from typing import Any

import pytest
from asked import KEY, MODEL, QUESTION, Owner, Pet, run
from pydantic_ai import Agent, ModelRetry, NativeOutput, PromptedOutput, ToolOutput, UsageLimits
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

FEW = UsageLimits(request_limit=8)


def model(url: str) -> OpenAIChatModel:
    return OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key=KEY))


def test_text_whole_and_streamed(random: str) -> None:
    agent = Agent(model(random), system_prompt="You help.", model_settings={"max_tokens": 8})
    said = agent.run_sync(QUESTION)
    assert said.output
    again = agent.run_sync("and then?", message_history=said.all_messages())
    assert again.output

    async def stream() -> str:
        async with agent.run_stream(QUESTION) as run:
            return "".join([part async for part in run.stream_text(delta=True)])

    assert run(stream()) == said.output


@pytest.mark.parametrize("kind", [Pet, Owner])
@pytest.mark.parametrize("way", [lambda kind: kind, ToolOutput, NativeOutput, PromptedOutput])
def test_structured_output(random: str, obedient: str, kind: Any, way: Any) -> None:
    # A schema that is only shown to the model wants one that follows it.
    url = obedient if way is PromptedOutput else random
    agent: Any = Agent(model(url), output_type=way(kind))
    assert isinstance(agent.run_sync(QUESTION, usage_limits=FEW).output, kind)

    async def stream() -> Any:
        async with agent.run_stream(QUESTION, usage_limits=FEW) as run:
            return await run.get_output()

    assert isinstance(run(stream()), kind)


def test_one_of_several_classes(random: str) -> None:
    agent: Any = Agent(model(random), output_type=[Pet, Owner])
    assert isinstance(agent.run_sync(QUESTION, usage_limits=FEW).output, Pet | Owner)


def test_a_tool_that_asks_again_is_asked_again(obedient: str) -> None:
    agent = Agent(model(obedient), retries=3)
    tries: list[str] = []

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather of a city."""
        tries.append(city)
        if len(tries) < 2:
            raise ModelRetry("which one?")
        return f"sunny in {city}"

    said = agent.run_sync(QUESTION, usage_limits=FEW).output
    assert tries == ["上海"]
    assert "which one?" in said
    assert "sunny" in agent.run_sync(QUESTION, usage_limits=FEW).output


def test_events_are_streamed_while_tools_are_called(obedient: str) -> None:
    agent = Agent(model(obedient))

    @agent.tool_plain
    async def get_weather(city: str) -> str:
        """The weather of a city."""
        return f"sunny in {city}"

    async def asked() -> Any:
        kinds = []
        async with agent.iter(QUESTION, usage_limits=FEW) as run:
            async for node in run:
                if Agent.is_model_request_node(node) or Agent.is_call_tools_node(node):
                    async with node.stream(run.ctx) as events:
                        kinds += [event.event_kind async for event in events]
        return kinds, run.result.output

    kinds, said = run(asked())
    assert {"part_start", "function_tool_call", "function_tool_result"} <= set(kinds)
    assert "sunny in 上海" in said


def test_a_class_grows_while_it_is_streamed(random: str) -> None:
    agent: Any = Agent(model(random), output_type=NativeOutput(Pet))

    async def asked() -> Any:
        async with agent.run_stream(QUESTION, usage_limits=FEW) as run:
            return [part async for part in run.stream_output(debounce_by=None)]

    assert isinstance(run(asked())[-1], Pet)


def test_the_responses_api_says_what_to_set(random: str) -> None:
    other = OpenAIResponsesModel(MODEL, provider=OpenAIProvider(base_url=random, api_key=KEY))
    with pytest.raises(ModelHTTPError, match="OpenAIChatModel"):
        Agent(other).run_sync(QUESTION)
