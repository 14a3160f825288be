"""openai-agents: text, tools, tools that fail, an output class, handing over, streams."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_default_openai_api,
    set_default_openai_client,
    set_tracing_disabled,
)
from asked import KEY, MODEL, QUESTION, Owner, Pet
from asked import run as in_one_loop

set_tracing_disabled(True)


def model(url: str) -> OpenAIChatCompletionsModel:
    client = openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0)
    return OpenAIChatCompletionsModel(model=MODEL, openai_client=client)


def run(agent: Any) -> Any:
    async def asked() -> Any:
        return await Runner.run(agent, QUESTION, max_turns=6)

    return in_one_loop(asked()).final_output


def run_streamed(agent: Any) -> Any:
    async def asked() -> Any:
        running = Runner.run_streamed(agent, QUESTION, max_turns=6)
        async for _ in running.stream_events():
            pass
        return running.final_output

    return in_one_loop(asked())


@function_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


@function_tool
def fails(city: str) -> str:
    """Always fails."""
    raise ValueError(f"no such city as {city}")


@pytest.mark.parametrize("how", [run, run_streamed])
def test_text(random: str, how: Any) -> None:
    settings = ModelSettings(max_tokens=8)
    assert how(
        Agent(name="a", instructions="You help.", model=model(random), model_settings=settings)
    )


@pytest.mark.parametrize("how", [run, run_streamed])
@pytest.mark.parametrize(
    ("tool", "answer"), [(get_weather, "sunny in 上海"), (fails, "no such city")]
)
def test_tools_are_called_and_their_errors_read(
    obedient: str, how: Any, tool: Any, answer: str
) -> None:
    assert answer in how(Agent(name="a", model=model(obedient), tools=[tool]))


@pytest.mark.parametrize("how", [run, run_streamed])
@pytest.mark.parametrize("kind", [Pet, Owner])
def test_an_output_class(random: str, how: Any, kind: Any) -> None:
    assert isinstance(how(Agent(name="a", model=model(random), output_type=kind)), kind)


@pytest.mark.parametrize("choice", ["required", "get_weather"])
def test_a_call_that_must_come_comes(random: str, choice: str) -> None:
    agent = Agent(
        name="a", model=model(random), tools=[get_weather],
        model_settings=ModelSettings(tool_choice=choice, max_tokens=60),
        tool_use_behavior="stop_on_first_tool",
    )  # fmt: skip
    assert run(agent).startswith("sunny in")


def test_one_agent_hands_over_to_another(obedient: str) -> None:
    other = Agent(name="other", model=model(obedient))
    first = Agent(name="first", model=model(obedient), handoffs=[other])
    assert run(first)


def test_one_agent_is_a_tool_of_another(obedient: str) -> None:
    other = Agent(name="other", model=model(obedient))
    tool = other.as_tool(tool_name="ask", tool_description="Asks the other.")
    assert "I was told" in run(Agent(name="first", model=model(obedient), tools=[tool]))


def test_a_session_keeps_its_calls_and_goes_on(obedient: str) -> None:
    settings = ModelSettings(parallel_tool_calls=True)
    agent = Agent(name="a", model=model(obedient), tools=[get_weather], model_settings=settings)
    session = SQLiteSession("one")

    async def asked() -> Any:
        first = await Runner.run(agent, QUESTION, session=session, max_turns=6)
        again = await Runner.run(agent, "and tomorrow?", session=session, max_turns=6)
        return first.final_output, again.final_output

    assert all("sunny in 上海" in said for said in in_one_loop(asked()))


def test_the_default_is_the_responses_api_whose_refusal_names_the_setting_that_works(
    random: str,
) -> None:
    client = openai.AsyncOpenAI(base_url=random, api_key=KEY, max_retries=0)
    set_default_openai_client(client, use_for_tracing=False)
    agent = Agent(name="a", model=MODEL, model_settings=ModelSettings(max_tokens=8))
    with pytest.raises(openai.NotFoundError, match="set_default_openai_api"):
        run(agent)
    set_default_openai_api("chat_completions")
    try:
        assert run(agent)
    finally:
        set_default_openai_api("responses")
