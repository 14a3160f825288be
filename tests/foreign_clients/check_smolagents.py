"""smolagents: its model class, the agent that calls tools, and the agent that writes code."""

from __future__ import annotations

from typing import Any

import pytest
from asked import KEY, MODEL, QUESTION
from smolagents import ChatMessage, CodeAgent, LiteLLMModel, OpenAIModel, ToolCallingAgent, tool


@tool
def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: its name
    """
    return f"sunny in {city}"


def model(url: str, **more: Any) -> OpenAIModel:
    return OpenAIModel(
        model_id=MODEL, api_base=url, api_key=KEY, client_kwargs={"max_retries": 0}, **more
    )


def test_messages_whole_and_streamed(random: str) -> None:
    asked = [ChatMessage(role="user", content=[{"type": "text", "text": QUESTION}])]
    said = model(random, max_tokens=8).generate(asked).content
    assert said
    parts = model(random, max_tokens=8).generate_stream(asked)
    assert "".join(part.content or "" for part in parts) == said


@pytest.mark.parametrize("stream", [False, True])
def test_the_agent_that_calls_tools_comes_to_an_end(random: str, stream: bool) -> None:
    agent = ToolCallingAgent([get_weather], model(random), max_steps=4, stream_outputs=stream)
    agent.run(QUESTION)
    calls = [
        call.name for step in agent.memory.steps for call in getattr(step, "tool_calls", None) or []
    ]
    assert calls
    assert set(calls) <= {"get_weather", "final_answer"}


@pytest.mark.parametrize("structured", [False, True])
def test_the_agent_that_writes_code_is_answered(random: str, structured: bool) -> None:
    agent = CodeAgent(
        [get_weather], model(random, max_tokens=60), max_steps=2, use_structured_outputs_internally=structured
    )  # fmt: skip
    agent.run(QUESTION)
    steps = [step for step in agent.memory.steps if hasattr(step, "model_output")]
    assert steps
    assert all(step.model_output for step in steps[:2])


def test_messages_go_by_litellm_too(random: str) -> None:
    asked = [ChatMessage(role="user", content=[{"type": "text", "text": QUESTION}])]
    by_litellm = LiteLLMModel(
        model_id=f"openai/{MODEL}", api_base=random, api_key=KEY, max_tokens=8
    )
    assert by_litellm.generate(asked).content == model(random, max_tokens=8).generate(asked).content


def test_the_steps_of_an_agent_are_streamed(random: str) -> None:
    agent = ToolCallingAgent([get_weather], model(random), max_steps=2, stream_outputs=True)
    steps = [type(step).__name__ for step in agent.run(QUESTION, stream=True)]
    assert {"ChatMessageStreamDelta", "ToolCall", "ActionStep"} <= set(steps)
