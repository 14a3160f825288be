"""langchain: ChatOpenAI, its tools and structured output, agents, and the completion class."""

from __future__ import annotations

from typing import Any

import pytest
from asked import KEY, MODEL, QUESTION, Owner, Pet, run
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import ToolException, tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from openai import NotFoundError


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
    assert run(short.ainvoke(QUESTION)).content == whole.content


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


def test_calls_and_classes_come_asynchronously_and_streamed(random: str) -> None:
    bound = model(random).bind_tools([get_weather], tool_choice="any", parallel_tool_calls=True)
    structured = model(random).with_structured_output(Pet)

    async def asked() -> Any:
        joined = None
        async for part in bound.astream(QUESTION):
            joined = part if joined is None else joined + part
        whole = await bound.ainvoke(QUESTION)
        parts = [part async for part in structured.astream(QUESTION)]
        several = await structured.abatch([QUESTION] * 2)
        events = [event["event"] async for event in bound.astream_events(QUESTION)]
        return joined, whole, parts, several, events

    joined, whole, parts, several, events = run(asked())
    assert [call["args"] for call in joined.tool_calls] == [
        call["args"] for call in whole.tool_calls
    ]
    assert isinstance(parts[-1], Pet)
    assert several == [parts[-1]] * 2
    assert "on_chat_model_stream" in events


def test_an_agent_works_asynchronously_and_answers_in_a_class_after_its_tools(
    random: str, obedient: str
) -> None:
    plain = create_agent(model(obedient), [get_weather])
    structured = create_agent(model(random), [get_weather], response_format=ProviderStrategy(Pet))
    asked: Any = {"messages": [("user", QUESTION)]}

    async def steps() -> Any:
        streamed = [part async for part in plain.astream(asked, stream_mode="updates")]
        said = await plain.ainvoke(asked)
        return streamed, said, await structured.ainvoke(asked, {"recursion_limit": 8})

    streamed, said, made = run(steps())
    assert [next(iter(part)) for part in streamed] == ["model", "tools", "model"]
    assert "sunny in 上海" in said["messages"][-1].content
    assert isinstance(made["structured_response"], Pet)


def test_results_of_two_calls_of_one_turn_are_read(obedient: str) -> None:
    calls: Any = [{"name": "get_weather", "args": {"city": c}, "id": c} for c in ("a", "b")]
    results = [ToolMessage(f"fine in {c}", tool_call_id=c) for c in ("a", "b")]
    history = [HumanMessage(QUESTION), AIMessage("", tool_calls=calls), *results]
    assert "fine in b" in model(obedient).bind_tools([get_weather]).invoke(history).content


def test_what_is_not_served_says_what_to_set(random: str) -> None:
    with pytest.raises(NotFoundError, match="use_responses_api=False"):
        model(random, use_responses_api=True).invoke(QUESTION)
    embeddings = OpenAIEmbeddings(
        base_url=random, api_key=KEY, model=MODEL, check_embedding_ctx_length=False
    )
    with pytest.raises(NotFoundError, match="give no embeddings"):
        embeddings.embed_query("once")
