"""langchain: ChatOpenAI, its tools and structured output, agents, and the completion class."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asked import KEY, MODEL, QUESTION, Owner, Pet
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import ToolException, tool
from langchain_openai import ChatOpenAI, OpenAI


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


@tool
def broken(city: str) -> str:
    """Always fails."""
    raise ToolException(f"no such city as {city}")


broken.handle_tool_error = True


def model(url: str, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=url, api_key=KEY, model=MODEL, max_retries=0, **more)


def test_a_reply_whole_streamed_in_batches_and_asynchronous(random: str) -> None:
    short = model(random, max_tokens=8, stream_usage=True)
    whole = short.invoke(QUESTION)
    assert whole.content
    assert whole.usage_metadata["output_tokens"] == 8
    parts = list(short.stream(QUESTION))
    assert "".join(part.content for part in parts) == whole.content
    assert sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata) == 8
    assert [one.content for one in short.batch([QUESTION] * 3)] == [whole.content] * 3
    assert asyncio.run(short.ainvoke(QUESTION)).content == whole.content


def test_a_text_goes_on(random: str) -> None:
    text = OpenAI(
        base_url=random, api_key=KEY, model=MODEL, max_tokens=4, temperature=0, max_retries=0
    )
    assert text.invoke("once")
    assert "".join(text.stream("once")) == text.invoke("once")


@pytest.mark.parametrize("choice", ["any", "required", True, "get_weather"])
def test_a_bound_tool_that_must_be_called_is_called(random: str, choice: Any) -> None:
    bound = model(random).bind_tools([get_weather], tool_choice=choice)
    [call, *_] = bound.invoke(QUESTION).tool_calls
    assert call["name"] == "get_weather"
    assert set(call["args"]) == {"city"}
    streamed = None
    for part in bound.stream(QUESTION):
        streamed = part if streamed is None else streamed + part
    assert streamed.tool_calls[0]["args"] == call["args"]


def test_a_call_and_its_error_come_back(obedient: str) -> None:
    bound = model(obedient).bind_tools([get_weather])
    asked = [HumanMessage(QUESTION)]
    called = bound.invoke(asked)
    [call] = called.tool_calls
    failed = ToolMessage("no such city", tool_call_id=call["id"], status="error")
    assert "no such city" in bound.invoke([*asked, called, failed]).content
    odd = [*asked, AIMessage(""), HumanMessage("again"), HumanMessage("and again")]
    assert model(obedient).invoke(odd).content


@pytest.mark.parametrize("kind", [Pet, Owner])
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [None, True])
def test_structured_output(random: str, kind: Any, method: Any, strict: Any) -> None:
    structured = model(random).with_structured_output(kind, method=method, strict=strict)
    assert isinstance(structured.invoke(QUESTION), kind)


def test_structured_output_in_its_other_forms(random: str) -> None:
    schema = Pet.model_json_schema()
    assert set(model(random).with_structured_output(schema).invoke(QUESTION)) >= {"name", "kind"}
    raw = model(random).with_structured_output(Pet, include_raw=True).invoke(QUESTION)
    assert isinstance(raw["parsed"], Pet)
    anything = model(random).with_structured_output(None, method="json_mode").invoke(QUESTION)
    assert isinstance(anything, dict)
    assert list(model(random).with_structured_output(Pet).stream(QUESTION))


def test_an_agent_calls_reads_and_answers(obedient: str) -> None:
    for tools, answer in (([get_weather], "sunny in 上海"), ([broken], "no such city as 上海")):
        agent = create_agent(model(obedient), tools, system_prompt="You help.")
        said = agent.invoke({"messages": [{"role": "user", "content": QUESTION}]})["messages"]
        assert [message.type for message in said] == ["human", "ai", "tool", "ai"]
        assert answer in said[-1].content
    steps = list(agent.stream({"messages": [("user", QUESTION)]}, stream_mode="messages"))
    assert steps


@pytest.mark.parametrize("strategy", [Pet, ProviderStrategy(Pet), ToolStrategy(Pet)])
def test_an_agents_answer_is_structured(random: str, strategy: Any) -> None:
    agent = create_agent(model(random), [], response_format=strategy)
    made = agent.invoke({"messages": [("user", QUESTION)]}, {"recursion_limit": 8})
    assert isinstance(made["structured_response"], Pet)
