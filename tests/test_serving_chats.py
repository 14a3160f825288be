"""What chats come to: fields that say nothing, and histories that no training data would hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pictures
import pytest
import serving
from dialogues import CONTROL_STRINGS
from rows import TOOL

from finetune.data.dialogue.conversation import Message, RowError
from finetune.generation.load import OpenedModel, open_model
from finetune.serving.errors import ApiError
from finetune.serving.requests import history
from finetune.serving.requests.fields import UNCHANGED, ChatRequest
from finetune.serving.requests.rules import ReplyRequest, RequestRules

CALL = '{"city": "北京"}'
CALLING = Message("assistant", CALL, metadata="get_weather")
QUESTION = Message("user", "weather?")
HI = {"role": "user", "content": "hi"}
WEATHER = {"role": "user", "content": QUESTION.content}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    return open_model(serving.save_talkative(tmp_path_factory.mktemp("base") / "talkative"))


def read(opened: OpenedModel, folder: Path, how: str = "lenient", **fields: Any) -> ReplyRequest:
    rules = RequestRules("tiny", opened.template, None, 8, how)  # type: ignore[arg-type]
    body = {"model": "tiny", "messages": [HI]} | fields
    return serving.read_chat(body, rules, folder)


def call(arguments: Any, call_id: str | None = "c1", **more: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"role": "assistant", "content": None} | more | {
        "tool_calls": [{"id": call_id, "type": "function", "function": function}]
    }  # fmt: skip


def result(content: Any, call_id: str = "c1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def user(text: str) -> Message:
    return Message("user", text)


def said(text: str) -> Message:
    return Message("assistant", text)


def called(arguments: str) -> Message:
    return Message("assistant", arguments, "get_weather")


def seen(text: str) -> Message:
    return Message("observation", text)


HISTORIES: dict[str, tuple[list[Any], list[Message]]] = {
    "an empty reply of its own": (
        [HI, {"role": "assistant", "content": ""}, WEATHER], [user("hi"), QUESTION]
    ),
    "a reply that is null": (
        [HI, {"role": "assistant", "content": None}, WEATHER], [user("hi"), QUESTION]
    ),
    "a reply without content": ([HI, {"role": "assistant"}, WEATHER], [user("hi"), QUESTION]),
    "no parts": ([HI, {"role": "assistant", "content": []}, WEATHER], [user("hi"), QUESTION]),
    "a refusal": (
        [HI, {"role": "assistant", "content": None, "refusal": "No."}, WEATHER],
        [user("hi"), said("No."), QUESTION],
    ),
    "a refusal as a part": (
        [HI, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, WEATHER],
        [user("hi"), said("No."), QUESTION],
    ),
    "what OpenAI adds": (
        [HI, {"role": "assistant", "content": "yes", "refusal": None, "annotations": [],
              "audio": None, "function_call": None, "tool_calls": None, "reasoning_content": "hm"},
         WEATHER],
        [user("hi"), said("yes"), QUESTION],
    ),
    "cut arguments and their error": (
        [WEATHER, call('{"city": '), result("no JSON")],
        [QUESTION, called('{"city": '), seen("no JSON")],
    ),
    "arguments that are a list": (
        [WEATHER, call("[1]"), result("no object")], [QUESTION, called("[1]"), seen("no object")]
    ),
    "no arguments": ([WEATHER, call(""), result("20")], [QUESTION, called("{}"), seen("20")]),
    "null arguments": ([WEATHER, call(None), result("20")], [QUESTION, called("{}"), seen("20")]),
    "arguments as an object": (
        [WEATHER, call({"city": "北京"}), result("20")], [QUESTION, called(CALL), seen("20")]
    ),
    "a call in the spelling of training": (
        [WEATHER, call('{"city":"北京"}'), result("20")], [QUESTION, called(CALL), seen("20")]
    ),
    "an empty result": ([WEATHER, call(CALL), result("")], [QUESTION, CALLING, seen(" ")]),
    "a null result": ([WEATHER, call(CALL), result(None)], [QUESTION, CALLING, seen(" ")]),
    "a cancelled call": ([WEATHER, call(CALL), HI], [QUESTION, CALLING, user("hi")]),
    "a call at the end": ([WEATHER, call(CALL)], [QUESTION, CALLING]),
    "a result of no call": ([WEATHER, result("20")], [QUESTION, seen("20")]),
    "a result of another call": (
        [WEATHER, call(CALL), result("20", "c9")], [QUESTION, CALLING, seen("20")]
    ),
    "two results, one call": (
        [WEATHER, call(CALL), result("20"), result("30")],
        [QUESTION, CALLING, seen("20"), seen("30")],
    ),
    "text beside a call": (
        [WEATHER, call(CALL, content="one moment"), result("20")],
        [QUESTION, said("one moment"), CALLING, seen("20")],
    ),
    "a question before the reply to a result": (
        [WEATHER, call(CALL), result("20"), HI], [QUESTION, CALLING, seen("20"), user("hi")]
    ),
    "two questions": ([HI, WEATHER], [user("hi"), QUESTION]),
    "two replies": (
        [HI, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, WEATHER],
        [user("hi"), said("a"), said("b"), QUESTION],
    ),
    "an assistant that opens": (
        [{"role": "assistant", "content": "Welcome."}, HI], [said("Welcome."), user("hi")]
    ),
    "an assistant that ends": (
        [HI, {"role": "assistant", "content": "yes"}], [user("hi"), said("yes")]
    ),
    "instructions in the middle": (
        [HI, {"role": "assistant", "content": "a"}, {"role": "developer", "content": "Be brief."},
         WEATHER],
        [user("hi"), said("a"), Message("system", "Be brief."), QUESTION],
    ),
    "an empty system message": ([{"role": "system", "content": ""}, HI], [user("hi")]),
    "an empty question": ([HI, {"role": "user", "content": ""}], [user("hi"), user(" ")]),
    "a null question": ([{"role": "user", "content": None}], [user(" ")]),
    "an empty question before": ([{"role": "user", "content": ""}, HI], [user("hi")]),
    "a call of OpenAI's older way": (
        [WEATHER, {"role": "assistant", "content": None, "function_call": call(CALL)["tool_calls"][0]["function"]},
         {"role": "function", "name": "get_weather", "content": "20"}],
        [QUESTION, CALLING, seen("20")],
    ),
    "both ways at once": (
        [WEATHER, call(CALL, function_call={"name": "other", "arguments": "{}"}), result("20")], [QUESTION, CALLING, seen("20")]
    ),
    "a call that stands in no list": (
        [WEATHER, {"role": "assistant", "tool_calls": call(CALL)["tool_calls"][0]}, result("20")], [QUESTION, CALLING, seen("20")]
    ),
    "a call that is nothing but its function": (
        [WEATHER, {"role": "assistant", "tool_calls": [{"name": " get_weather ", "arguments": CALL}]}, result("20")],
        [QUESTION, CALLING, seen("20")],
    ),
    "arguments that are a number": ([WEATHER, call(5), result("odd")], [QUESTION, called("5"), seen("odd")]),
    "arguments that are blank": ([WEATHER, call(" \n"), result("20")], [QUESTION, called("{}"), seen("20")]),
    "a call of a built-in tool": (
        [WEATHER, {"role": "assistant", "tool_calls": [{"function": {"name": "python", "arguments": "print(1)"}}]}, result("1")],
        [QUESTION, Message("assistant", "print(1)", "python"), seen("1")],
    ),
    "a built-in tool that is told nothing": (
        [WEATHER, {"role": "assistant", "tool_calls": [{"function": {"name": "python", "arguments": ""}}]}, result("1")],
        [QUESTION, Message("assistant", " ", "python"), seen("1")],
    ),
    "a text and a refusal": (
        [HI, {"role": "assistant", "content": "yes", "refusal": "No."}, WEATHER], [user("hi"), said("yes"), QUESTION]
    ),
    "a part that is null": (
        [{"role": "user", "content": [{"type": "text", "text": None}, {"type": "text", "text": "hi"}]}], [user("hi")]
    ),
    "a refusal part that is null beside text": (
        [HI, {"role": "assistant", "content": [{"type": "refusal", "refusal": None}, {"type": "text", "text": "a"}]}, WEATHER],
        [user("hi"), said("a"), QUESTION],
    ),
    "no parts of a result": ([WEATHER, call(CALL), result([])], [QUESTION, CALLING, seen(" ")]),
    "reasoning of any form": (
        [HI | {"thinking": ["x"]}, {"role": "assistant", "content": "a", "reasoning": {"x": 1}, "thinking": [{"type": "thinking"}], "reasoning_content": 5, "audio": {"id": "x"}},
         WEATHER], [user("hi"), said("a"), QUESTION],
    ),
    "nulls in a message": ([{**HI, "name": None, "tool_call_id": None, "image": None}], [user("hi")]),
}  # fmt: skip


@pytest.mark.parametrize("name", HISTORIES)
def test_a_chat_goes_on_whatever_has_happened_in_it(
    opened: OpenedModel, tmp_path: Path, name: str
) -> None:
    messages, laid_out = HISTORIES[name]
    asked = read(opened, tmp_path, messages=messages, tools=[TOOL])
    assert asked.prompt == serving.prompt_of(opened.template, *laid_out, tools=[TOOL])


@pytest.mark.parametrize(
    "function", [{}, {"name": ""}, {"name": " "}, {"name": "a\nb"}, {"name": 5}, None, "f"]
)
def test_a_call_without_a_name_is_refused_by_the_number_of_its_message(
    opened: OpenedModel, tmp_path: Path, function: Any
) -> None:
    messages = [HI, {"role": "assistant", "tool_calls": [{"id": "c", "function": function}]}, HI]
    with pytest.raises(ApiError, match=r"^message 2: a call has no function name$") as caught:
        read(opened, tmp_path, messages=messages)
    assert caught.value.param == "messages"


def test_a_message_that_cannot_be_read_is_named_by_its_place_in_the_dialogue() -> None:
    for message, reason in (({"role": "robot"}, "role 'robot' is"), ({"content": "a"}, "has no role"), ({"role": "user", "content": 5}, "content is"), (5, "is a number, not an object")):  # fmt: skip
        with pytest.raises(RowError, match=f"^message 3: {reason}"):
            history.lenient([HI, HI, message], None)
    for message in (HI | {"content": ""}, {"role": "system", "content": "x"}):
        asked = [message | {"role": "system"}]
        with pytest.raises(RowError, match="there is nothing to answer: the messages are empty"):
            history.lenient(asked, None)


THOUGHT = "<think>\nso\n</think>\n\n"
REPLY = {"role": "assistant", "content": "a", "reasoning_content": " so\n"}
CALLED = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}] * 2}


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        (REPLY, [THOUGHT + "a"]), ({**REPLY, "reasoning_content": None, "reasoning": "so"}, [THOUGHT + "a"]), ({**REPLY, "reasoning": "no"}, [THOUGHT + "a"]),
        ({**REPLY, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, [THOUGHT + "ab"]),
        ({**REPLY, "reasoning_content": " "}, ["a"]), ({**REPLY, "reasoning_content": 5}, ["a"]), ({**REPLY, "role": "user"}, ["a"]),
        ({**CALLED, "reasoning": "so"}, [THOUGHT + "{}", "{}"]), ({**REPLY, **CALLED}, [THOUGHT + "a", "{}", "{}"]),
    ],
    ids=lambda one: str(one)[-60:],
)  # fmt: skip
def test_reasoning_stands_once_before_the_reply_where_the_template_has_a_place_for_it(
    reply: dict[str, Any], kept: list[str]
) -> None:
    def contents(thoughts: bool) -> list[str]:
        read = history.lenient([HI, reply, HI], None, thoughts=thoughts)
        return [message.content for message in read.messages[1:-1]]

    assert contents(thoughts=True) == kept
    assert contents(thoughts=False) == [text.removeprefix(THOUGHT) for text in kept]


STRICT = [
    "an empty reply of its own", "cut arguments and their error", "an empty result", "two questions",
    "a cancelled call", "a result of no call", "an assistant that opens", "an assistant that ends",
    "instructions in the middle", "an empty question",
]  # fmt: skip


@pytest.mark.parametrize("name", STRICT)
def test_a_strict_history_is_read_as_training_data_is(
    opened: OpenedModel, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ApiError) as caught:
        read(opened, tmp_path, "strict", messages=HISTORIES[name][0], tools=[TOOL])
    assert caught.value.status == 400
    same = read(opened, tmp_path, "strict", messages=[HI]).prompt
    assert same == read(opened, tmp_path, messages=[HI]).prompt


def test_results_of_several_calls_stand_in_the_order_of_the_calls(
    opened: OpenedModel, tmp_path: Path
) -> None:
    calls = call(CALL)["tool_calls"] + call(CALL, "c2")["tool_calls"]
    messages = [WEATHER, {"role": "assistant", "tool_calls": calls}, result("2", "c2"), result("1")]
    asked = read(opened, tmp_path, messages=messages, tools=[TOOL])
    laid_out = (QUESTION, CALLING, CALLING, seen("1"), seen("2"))
    assert asked.prompt == serving.prompt_of(opened.template, *laid_out, tools=[TOOL])


@pytest.mark.parametrize("typed", CONTROL_STRINGS)
def test_broken_arguments_and_refusals_bring_no_control_token(
    opened: OpenedModel, tmp_path: Path, typed: str
) -> None:
    control = set(opened.template.tokenizer.control_ids.values())

    def num_control(text: str) -> int:
        refusal = {"role": "assistant", "refusal": text}
        messages = [HI, refusal, WEATHER, call(f'{{"city": {text}'), result(f"{text}")]
        prompt = read(opened, tmp_path, messages=messages, tools=[TOOL]).prompt
        return sum(i in control for i in prompt)

    assert num_control(typed) == num_control("plain")


FIELDS = [*ChatRequest.model_fields, *UNCHANGED, "some_field_of_the_future"]


@pytest.mark.parametrize("field", [name for name in FIELDS if name not in ("model", "messages")])
def test_null_is_absence_in_any_field(opened: OpenedModel, tmp_path: Path, field: str) -> None:
    plain = read(opened, tmp_path)
    assert read(opened, tmp_path, **{field: None}) == plain


def test_null_is_absence_inside_of_fields_too(opened: OpenedModel, tmp_path: Path) -> None:
    plain = read(opened, tmp_path)
    assert read(opened, tmp_path, stream_options={"include_usage": None}) == plain
    form = {"type": "text", "json_schema": None}
    assert read(opened, tmp_path, response_format=form) == plain


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, value) for name, values in UNCHANGED.items() for value in values]
    + [("stop", ""), ("stop", []), ("stop", [""]), ("max_tokens", 8.0), ("presence_penalty", 0),
       ("repetition_penalty", 1.0), ("top_k", -1), ("top_k", 0), ("min_p", 0), ("n", 1), ("logprobs", False), ("top_logprobs", 0), ("response_format", {"type": "text"})],
)  # fmt: skip
def test_a_value_that_changes_nothing_is_taken(
    opened: OpenedModel, tmp_path: Path, field: str, value: Any
) -> None:
    assert read(opened, tmp_path, **{field: value}) == read(opened, tmp_path)


def test_an_image_needs_no_question(tmp_path: Path) -> None:
    seeing = open_model(pictures.save_model(tmp_path / "glm4v"))
    image = {"type": "image_url", "image_url": {"url": serving.data_url()}}
    for content in ([image], [{"type": "text", "text": ""}, image]):
        asked = read(seeing, tmp_path, messages=[{"role": "user", "content": content}])
        assert pictures.BOI in asked.prompt
        later = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}, HI]
        assert pictures.BOI in read(seeing, tmp_path, messages=later).prompt
