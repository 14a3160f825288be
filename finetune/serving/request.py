"""The body of a request -> a prompt with what is wanted of its reply.

What OpenAI's clients send is read with the readers of training data, so that a dialogue arrives at
the same tokens here and there. What cannot be done is refused by name, never left out in silence;
fields that say nothing about the reply (`user`, `metadata` ...) are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import Conversation, RowError
from finetune.data.dialogue.formats import to_conversation
from finetune.errors import DataError
from finetune.generation.decoding import Decoding
from finetune.serving.errors import ApiError, bad_request
from finetune.serving.images import with_image_files

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate

Zero = Annotated[float, Field(ge=0, le=0)]
Tokens = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Stops = Annotated[
    list[Stop],
    Field(max_length=4),
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What comes at the end of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(_Strict):
    """The one `response_format` there is."""

    type: Literal["text"]


class ChatRequest(_Strict):
    """The fields of `/v1/chat/completions`; None is as good as absent."""

    model: str
    messages: list[Any]
    tools: list[Any] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None

    # Only the value that changes nothing.
    n: Literal[1] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logprobs: Literal[False] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None

    # Said to the service, not to the model.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What a request is measured against."""

    name: str
    """The model's id."""
    template: ChatTemplate
    context: int | None
    """Prompt and reply have at most this many tokens together."""
    max_new_tokens: int
    """Longest reply of a request that names no length."""


@dataclass(frozen=True, slots=True)
class ChatAsk:
    """One reply that is asked for."""

    prompt: list[int]
    decoding: Decoding
    tools: tuple[Mapping[str, Any], ...]
    stops: tuple[str, ...]
    many_calls: bool
    """The reply may hold more than one call."""
    stream: bool
    include_usage: bool


def read_request(body: bytes, rules: Rules, folder: Path) -> ChatAsk:
    """What the body asks for; ApiError with the reason when that cannot be answered.

    Args:
        body: JSON as OpenAI's clients send it.
        rules: the model that is served, and its limits.
        folder: a new folder, in which the images of this request may be kept.
    """
    request = _parse(body)
    if request.model != rules.name:
        raise ApiError(
            404,
            f"the model {request.model!r} is not served here, {rules.name!r} is",
            param="model",
            code="model_not_found",
        )
    conversation = _conversation(request, rules.template, folder)
    try:
        prompt = rules.template.prompt(conversation, len(conversation.messages))
    except DataError as error:
        raise bad_request(str(error), "messages") from error
    return ChatAsk(
        prompt=prompt,
        decoding=_decoding(request, len(prompt), rules),
        tools=conversation.tools,
        stops=tuple(request.stop or ()),
        many_calls=request.parallel_tool_calls is not False,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
    )


def _parse(body: bytes) -> ChatRequest:
    try:
        value = strict_json.parse(body.decode())
        return ChatRequest.model_validate(value)
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except RowError as error:
        raise bad_request(f"the body is not JSON that can be read: {error}") from error
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        fields = [".".join(str(part) for part in one["loc"]) or "the body" for one in found]
        reasons = [
            f"{field}: {'is not supported here' if one['type'] == 'extra_forbidden' else one['msg']}"
            for field, one in zip(fields, found, strict=True)
        ]
        raise bad_request("; ".join(reasons[:5]), fields[0]) from error


def _conversation(request: ChatRequest, template: ChatTemplate, folder: Path) -> Conversation:
    messages = with_image_files(request.messages, folder)
    tools = None if request.tool_choice == "none" else request.tools
    row = {"messages": messages, "tools": tools}
    try:
        conversation = to_conversation(row, "openai", where="messages", purpose="predict")
    except RowError as error:
        raise bad_request(str(error), "messages") from error
    if conversation.messages[-1].role == "assistant":
        raise bad_request("the last message is the assistant's; what shall it answer?", "messages")
    if template.image is None and any(message.image for message in conversation.messages):
        raise bad_request("this model takes no images; GLM-4V does", "messages")
    return conversation


def _decoding(request: ChatRequest, prompt: int, rules: Rules) -> Decoding:
    wanted = request.max_completion_tokens or request.max_tokens
    room = rules.context - prompt if rules.context is not None else None
    length = wanted or min(rules.max_new_tokens, max(room, 1) if room is not None else 2**31)
    if room is not None and length > room:
        raise bad_request(
            f"{prompt} tokens of the prompt and {length} of the reply are more than the "
            f"{rules.context} that fit; shorten the messages or lower max_tokens",
            "messages",
            "context_length_exceeded",
        )
    temperature = 0.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    return Decoding(length, temperature, top_p, request.seed)
