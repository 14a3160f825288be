"""llama-index: OpenAILike over both addresses, tools, structured prediction, an agent."""

from __future__ import annotations

from typing import Any

import pytest
from asked import KEY, MODEL, QUESTION, Owner, Pet, run
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

ASK = [ChatMessage(role="user", content=QUESTION)]


def get_weather(city: str) -> str:
    """The weather of a city."""
    if city != "上海":
        raise ValueError(f"no such city as {city!r}")
    return f"sunny in {city}"


def fails(city: str) -> str:
    """Always fails."""
    raise ValueError(f"no such city as {city}")


def model(url: str, **more: Any) -> OpenAILike:
    options = {
        "is_chat_model": True,
        "is_function_calling_model": True,
        "max_retries": 0,
        "temperature": 0,
    }
    return OpenAILike(model=MODEL, api_base=url, api_key=KEY, context_window=8192, **options | more)


def test_chats_and_texts_whole_streamed_and_asynchronous(random: str) -> None:
    for chats in (True, False):
        llm = model(random, is_chat_model=chats, max_tokens=8)
        said = llm.complete("once").text
        assert said
        assert list(llm.stream_complete("once"))[-1].text == said
        assert run(llm.acomplete("once")).text == said
        answer = llm.chat(ASK).message.content
        assert answer
        assert list(llm.stream_chat(ASK))[-1].message.content == answer


def test_no_length_is_a_length_too(random: str) -> None:
    assert model(random, is_chat_model=False).complete("once").text


@pytest.mark.parametrize("required", [True, False])
def test_tools_are_called(random: str, obedient: str, required: bool) -> None:
    llm = model(random if required else obedient)
    tool = FunctionTool.from_defaults(get_weather)
    made = llm.chat_with_tools([tool], user_msg=QUESTION, tool_required=required)
    [call, *_] = llm.get_tool_calls_from_response(made)
    assert call.tool_name == "get_weather"
    failed = ChatMessage(
        role=MessageRole.TOOL, content="it failed", additional_kwargs={"tool_call_id": call.tool_id}
    )
    assert llm.chat([*ASK, made.message, failed]).message.content is not None
    said = model(obedient).predict_and_call([tool], user_msg=QUESTION, error_on_tool_error=False)
    assert str(said)


@pytest.mark.parametrize("kind", [Pet, Owner])
def test_structured_prediction(random: str, kind: Any) -> None:
    prompt = PromptTemplate("{question}")
    assert isinstance(model(random).structured_predict(kind, prompt, question=QUESTION), kind)
    structured = model(random).as_structured_llm(kind)
    assert isinstance(structured.chat(ASK).raw, kind)
    parts = list(model(random).stream_structured_predict(kind, prompt, question=QUESTION))
    assert parts
    native = model(random, should_use_structured_outputs=True)
    assert isinstance(native.structured_predict(kind, prompt, question=QUESTION), kind)


@pytest.mark.parametrize(
    ("function", "answer"), [(get_weather, "sunny in 上海"), (fails, "no such")]
)
def test_an_agent_calls_reads_and_answers(obedient: str, function: Any, answer: str) -> None:
    agent = FunctionAgent(tools=[function], llm=model(obedient), system_prompt="You help.")

    async def answered() -> str:
        return str(await agent.run(user_msg=QUESTION))

    assert answer in run(answered())


def test_calls_and_classes_come_asynchronously_and_streamed(random: str, obedient: str) -> None:
    llm, willing = model(random), model(obedient)  # streamed, the library does not make it call
    tool = FunctionTool.from_defaults(get_weather)
    prompt = PromptTemplate("{question}")

    async def asked() -> Any:
        whole = await llm.achat_with_tools([tool], user_msg=QUESTION, tool_required=True)
        parts = [
            part
            async for part in await llm.astream_chat_with_tools(
                [tool], user_msg=QUESTION, tool_required=True
            )
        ]
        made = await llm.astructured_predict(Pet, prompt, question=QUESTION)
        growing = [
            part
            async for part in await willing.astream_structured_predict(
                Pet, prompt, question=QUESTION
            )
        ]
        said = [part async for part in await llm.astream_chat(ASK)]
        return whole, parts[-1], made, growing[-1], said[-1]

    whole, last, made, grown, said = run(asked())
    calls = [llm.get_tool_calls_from_response(answer) for answer in (whole, last)]
    assert calls[0][0].tool_kwargs == calls[1][0].tool_kwargs
    assert isinstance(made, Pet)
    assert grown.kind in ("cat", "dog")
    assert grown.age == 3
    assert said.message.content
