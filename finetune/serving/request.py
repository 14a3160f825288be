"""The body of a request -> a prompt with what is wanted of its reply.

A dialogue that training data could hold arrives at the same tokens here and there; what else chats
come to is laid out by the rules of `history`. What is large is counted before it is worked on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.data.dialogue.conversation import Conversation, RowError
from finetune.data.dialogue.tool_calls import tool_name
from finetune.errors import ConfigError, DataError
from finetune.generation.decoder import Constraint, Decoding
from finetune.serving import history
from finetune.serving.errors import ApiError, bad_request
from finetune.serving.fields import ChatRequest, NamedTool, parse, read_json
from finetune.serving.images import check_sources, with_image_files

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate
    from finetune.generation.structured import Structures

BOUNDS = {"messages": 4096, "content parts": 8192, "calls": 1024, "images": 1}
"""Of one request; a dialogue that a model answers well is far below."""


@dataclass(frozen=True)
class RequestRules:
    """What a request is measured against."""

    name: str
    """The model's id."""
    template: ChatTemplate
    context: int | None
    """Prompt and reply have at most this many tokens together."""
    max_new_tokens: int
    """Longest reply of a request that names no length."""
    history: Literal["lenient", "strict"] = "lenient"
    """Whether dialogues are taken that training data could not hold."""

    @cached_property
    def structures(self) -> Structures:
        """What compiles structured output; ConfigError when its library is missing."""
        from finetune.generation.structured import Structures

        return Structures(self.template)


@dataclass(frozen=True, slots=True)
class ReplyRequest:
    """One reply that is asked for."""

    prompt: list[int]
    decoding: Decoding
    tools: tuple[Mapping[str, Any], ...]
    stops: tuple[str, ...]
    many_calls: bool
    """The reply may hold more than one call."""
    stream: bool
    include_usage: bool
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    """How many of the likeliest tokens are told beside each token; None: no probabilities at all."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the longest reply."""
        return len(self.prompt) + self.decoding.max_new_tokens


def read_request(body: bytes, rules: RequestRules, folder: Path) -> ReplyRequest:
    """What the body asks for; ApiError with the reason when that cannot be answered.

    Args:
        body: JSON as OpenAI's clients send it.
        rules: the model that is served, and its limits.
        folder: a new folder, in which the images of this request may be kept.
    """
    return reply_requests(with_images(read_fields(body, rules), folder), rules)[0]


def read_tokens(body: bytes, rules: RequestRules) -> list[int]:
    """The ids of a `prompt`, a text that is no dialogue, or those that `messages` become, as a prompt."""
    value = read_json(body)
    if isinstance(value, dict) and "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise bad_request("prompt: Input should be a text", "prompt")
        plain = rules.template.tokenizer.plain
        return list(plain.encode(value["prompt"], add_special_tokens=False).ids)
    with tempfile.TemporaryDirectory(prefix="finetune-serve-") as folder:
        return list(read_request(body, rules, Path(folder)).prompt)


def read_fields(body: bytes, rules: RequestRules) -> ChatRequest:
    """The fields; ApiError for those of another model or of too much work, which is not begun."""
    request = parse(body)
    if request.model != rules.name:
        raise ApiError(
            404,
            f"the model {request.model!r} is not served here, {rules.name!r} is",
            param="model",
            code="model_not_found",
        )
    check_sources(request.messages)
    sizes = history.sizes(request.messages)
    if sizes["images"] and rules.template.image is None:
        raise bad_request("this model takes no images; GLM-4V does", "messages")
    for what, bound in BOUNDS.items():
        if sizes[what] > bound:
            raise bad_request(f"{sizes[what]} {what} are more than the {bound} taken", "messages")
    return request


def shows_image(request: ChatRequest) -> bool:
    """Whether there are images to be read, one request at a time."""
    return bool(history.sizes(request.messages)["images"])


def with_images(request: ChatRequest, folder: Path) -> ChatRequest:
    """The request with its images in files of `folder`; ApiError for paths, addresses and no images."""
    messages = with_image_files(request.messages, folder)
    return request.model_copy(update={"messages": messages})


def reply_requests(request: ChatRequest, rules: RequestRules) -> list[ReplyRequest]:
    """The `n` replies that are asked for, with seeds that follow each other; after `with_images`."""
    conversation = _conversation(request, rules)
    try:
        prompt = rules.template.prompt(conversation, len(conversation.messages))
    except DataError as error:
        raise bad_request(str(error), "messages") from error
    decoding = _decoding(request, len(prompt), rules)
    return [
        ReplyRequest(
            prompt=prompt,
            decoding=replace(
                decoding, seed=None if request.seed is None else request.seed + number
            ),
            tools=conversation.tools,
            stops=tuple(request.stop),
            many_calls=request.parallel_tool_calls,
            stream=request.stream,
            include_usage=request.stream_options.include_usage,
            constraint=_constraint(request, conversation.tools, rules),
            top_logprobs=request.top_logprobs if request.logprobs else None,
        )
        for number in range(request.n)
    ]


def _conversation(request: ChatRequest, rules: RequestRules) -> Conversation:
    tools = None if request.tool_choice == "none" else request.tools
    read = history.lenient if rules.history == "lenient" else history.strict
    try:
        return read(request.messages, tools)
    except RowError as error:
        raise bad_request(str(error), "messages") from error


def _constraint(
    request: ChatRequest, tools: Sequence[Mapping[str, Any]], rules: RequestRules
) -> Constraint | None:
    """What the reply must be, if anything is said about it."""
    choice, wanted = request.tool_choice, request.response_format
    must_call = choice == "required" or isinstance(choice, NamedTool)
    schema = wanted.schema_wanted if wanted is not None and not must_call else None
    if not must_call and schema is None:
        return None
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool_name(tool) == choice.function.name]
    if must_call and not tools:
        raise bad_request("tool_choice: there is no such function among the tools", "tool_choice")
    from finetune.generation.structured import Structure

    strict = bool(wanted and wanted.json_schema and wanted.json_schema.strict)
    structure = Structure(schema, tools, request.parallel_tool_calls, strict)
    field = "tools" if must_call else "response_format"
    try:
        return rules.structures.constraint(structure)
    except (ConfigError, DataError) as error:
        raise bad_request(f"{field}: {error}", field) from error


def _decoding(request: ChatRequest, prompt: int, rules: RequestRules) -> Decoding:
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
    return Decoding(
        length,
        request.temperature,
        request.top_p,
        request.seed,
        top_k=request.top_k,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
    )
