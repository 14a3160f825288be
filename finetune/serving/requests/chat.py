"""A dialogue -> prompts with what is wanted of their replies.

A dialogue that training data could hold arrives at the same tokens here and there; what else chats
come to is laid out by the rules of `history`. What is large is counted before it is worked on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import Conversation, RowError
from finetune.data.dialogue.tool_calls import tool_name
from finetune.errors import ConfigError, DataError
from finetune.generation.decoder import Constraint
from finetune.serving.errors import bad_request
from finetune.serving.requests import history
from finetune.serving.requests.fields import ChatRequest, NamedTool, parse, read_json
from finetune.serving.requests.images import (
    PREFIX,
    check_sources,
    with_image_files,
    without_folders,
)
from finetune.serving.requests.rules import ReplyRequest, RequestRules, decoding, rules_of

BOUNDS = {"messages": 4096, "content parts": 8192, "calls": 1024}
"""Of one request; a dialogue that a model answers well is far below."""


class AskedChat:
    """A request of `/v1/chat/completions`; ApiError for those of too much work, which is not begun."""

    def __init__(self, body: bytes, models: Mapping[str, RequestRules]) -> None:
        self._request, self.unknown = parse(body, ChatRequest)
        self.rules = rules_of(self._request.model, models)
        self.rules.check_unknown(self.unknown)
        messages = self._request.messages
        check_sources(messages)
        sizes = history.sizes(messages)
        self.shows_image = bool(sizes["images"])
        if self.shows_image and self.rules.template.image is None:
            raise bad_request("this model takes no images; GLM-4V does", "messages")
        for what, bound in (BOUNDS | {"images": self.rules.most_images}).items():
            if sizes[what] > bound:
                raise bad_request(
                    f"{sizes[what]} {what} are more than the {bound} taken", "messages"
                )

    def keep_images(self, folder: Path) -> None:
        """Writes its images into `folder`; ApiError for paths, addresses and what is no image."""
        messages = with_image_files(self._request.messages, folder)
        self._request = self._request.model_copy(update={"messages": messages})

    def replies(self) -> list[ReplyRequest]:
        """The `n` replies that are asked for; after `keep_images`."""
        return _replies(self._request, self.rules)


def image_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for the images of a request, whose name `without_folders` knows."""
    return tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)


def read_tokens(body: bytes, models: Mapping[str, RequestRules]) -> tuple[list[int], RequestRules]:
    """The ids of a `prompt`, a text that is no dialogue, or those that `messages` become; and whose.

    Beside `prompt` the model may be left out where one is served.
    """
    value = read_json(body)
    if isinstance(value, dict) and "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise bad_request("prompt: Input should be a text", "prompt")
        name = value.get("model")
        rules = rules_of(str(name), models) if name is not None else next(iter(models.values()))
        rules.check_length([value["prompt"]], times=8)
        plain = rules.template.tokenizer.plain
        return list(plain.encode(value["prompt"], add_special_tokens=False).ids), rules
    asked = AskedChat(body, models)
    with image_folder() as folder:
        asked.keep_images(Path(folder))
        return list(asked.replies()[0].prompt), asked.rules


def _replies(request: ChatRequest, rules: RequestRules) -> list[ReplyRequest]:
    conversation = _conversation(request, rules)
    tools = [strict_json.dump(tool) for tool in conversation.tools]
    rules.check_length([*(message.content for message in conversation.messages), *tools])
    try:
        prompt = rules.template.prompt(conversation, len(conversation.messages))
    except DataError as error:
        raise bad_request(without_folders(str(error)), "messages") from error
    wanted = request.max_completion_tokens or request.max_tokens
    chosen = decoding(request, len(prompt), rules, wanted=wanted)
    return [
        ReplyRequest(
            prompt=prompt,
            decoding=replace(chosen, seed=None if request.seed is None else request.seed + number),
            tools=conversation.tools,
            stops=tuple(request.stop),
            model=rules.name,
            many_calls=request.parallel_tool_calls,
            stream=request.stream,
            include_usage=request.stream_options.include_usage,
            constraint=_constraint(request, conversation, rules),
            thinks=conversation.thinks,
            top_logprobs=request.top_logprobs if request.logprobs else None,
            tells_ids=request.return_token_ids,
        )
        for number in range(request.n)
    ]


def _conversation(request: ChatRequest, rules: RequestRules) -> Conversation:
    tools = None if request.tool_choice == "none" else request.tools
    layout, thinks = rules.template.layout, request.chat_template_kwargs.enable_thinking
    if thinks is False and layout.thinking and not layout.has_switch:
        raise bad_request("enable_thinking: this model's template has no switch for it", "chat_template_kwargs")  # fmt: skip
    try:
        if rules.history == "strict":
            conversation = history.strict(request.messages, tools)
        else:
            conversation = history.lenient(request.messages, tools, thoughts=layout.has_switch)
    except RowError as error:
        raise bad_request(str(error), "messages") from error
    return replace(conversation, thinks=thinks) if layout.has_switch else conversation


def _constraint(
    request: ChatRequest, conversation: Conversation, rules: RequestRules
) -> Constraint | None:
    """What the reply must be, if anything is said about it."""
    tools: Sequence[Mapping[str, Any]] = conversation.tools
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
    opened = rules.template.layout.opens(conversation, len(conversation.messages))
    structure = Structure(schema, tools, request.parallel_tool_calls, strict, opened)
    field = "tools" if must_call else "response_format"
    try:
        return rules.structures.constraint(structure)
    except (ConfigError, DataError) as error:
        raise bad_request(f"{field}: {error}", field) from error
