"""The fields of a request, as OpenAI's clients send them.

None is as good as absent in every field. A field that is known and cannot be done is refused by name,
unless its value changes nothing; one that nobody knows is left out and named in the answer's header.
Fields that say nothing about the reply (`user`, `metadata` ...) are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import RowError
from finetune.generation.settings import REPETITION
from finetune.serving.errors import bad_request


def _whole(value: Any) -> Any:
    """5 for 5.0: some languages have one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _top_k(value: Any) -> Any:
    """A whole number; -1 is all, as vLLM says it."""
    value = _whole(value)
    return 0 if value == -1 else value


def _stops(value: Any) -> Any:
    """A list of stop strings; an empty one stops nothing."""
    stops = [value] if isinstance(value, str) else value
    return [stop for stop in stops if stop != ""] if isinstance(stops, list) else stops


def _prompts(value: Any) -> Any:
    """A list of prompts; one text or one list of ids is one prompt."""
    is_one = isinstance(value, str) or (
        isinstance(value, list) and value and isinstance(value[0], int)
    )
    return [value] if is_one else value


Tokens = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Stops = Annotated[list[Stop], Field(max_length=4), BeforeValidator(_stops)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = Annotated[
    list[str] | list[Ids], Field(min_length=1, max_length=64), BeforeValidator(_prompts)
]
MAX_TOOLS = 128

UNCHANGED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "prediction": (),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that are not done here, and the values that ask for nothing."""


class Strict(BaseModel):
    """Fields with values of their kinds and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """What comes at the end of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Strict):
    """A schema with a name."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool = False


class ResponseFormat(Strict):
    """What a reply that is no call must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing, which holds the schema")
        return self

    @property
    def schema_wanted(self) -> Mapping[str, Any] | None:
        """The schema of the reply; None for any text."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return {"type": "object"}
        return self.json_schema.schema_


class NamedFunction(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """A function that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class SamplingFields(Strict):
    """The fields of every request for a reply."""

    model: str
    n: Annotated[int, Field(ge=1, le=8), BeforeValidator(_whole)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0), BeforeValidator(_top_k)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=REPETITION[0], le=REPETITION[1])] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), BeforeValidator(_whole)] | None = None
    stop: Stops = []
    return_token_ids: bool = False

    # Said to the service, not to the model.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class TemplateOptions(Strict):
    """What a chat template takes besides the dialogue."""

    enable_thinking: bool | None = None


class ChatRequest(SamplingFields):
    """The fields of `/v1/chat/completions`."""

    messages: list[Any]
    tools: Annotated[list[Any], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20), BeforeValidator(_whole)] = 0
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()


class CompletionRequest(SamplingFields):
    """The fields of `/v1/completions`."""

    prompt: Prompts
    max_tokens: Tokens = 16
    logprobs: Annotated[int, Field(ge=0, le=20), BeforeValidator(_whole)] | None = None


KNOWN_ELSEWHERE = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
"""Such as `messages` beside a `prompt`: a mistake, which is refused."""
AnyRequest = TypeVar("AnyRequest", bound=Strict)


def parse(body: bytes, kind: type[AnyRequest]) -> tuple[AnyRequest, list[str]]:
    """The fields of a body and the names of unknown ones; ApiError for what cannot be done."""
    said, unknown = _said(read_json(body)), list[str]()
    if isinstance(said, dict):
        known = KNOWN_ELSEWHERE | UNCHANGED.keys() | kind.model_fields.keys()
        unknown = [key for key in said if key not in known]
        said = {key: item for key, item in said.items() if key in known}
    try:
        return kind.model_validate(said), unknown
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        fields = [_named(one["loc"]) for one in found]
        reasons = [_reason(field, one) for field, one in zip(fields, found, strict=True)]
        raise bad_request("; ".join(reasons[:5]), fields[0]) from error


def read_json(body: bytes) -> Any:
    """The value of a body; ApiError when it is no clean JSON."""
    try:
        return strict_json.parse(body.decode().removeprefix("\ufeff"))  # a mark of some clients
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except RowError as error:
        raise bad_request(f"the body is not JSON that can be read: {error}") from error


def _said(value: Any) -> Any:
    """The fields that say something."""
    if not isinstance(value, dict):
        return value
    said = {key: item for key, item in value.items() if item is not None}
    said = {key: item for key, item in said.items() if not _changes_nothing(key, item)}
    for key in ("stream_options", "response_format", "tool_choice"):
        if isinstance(said.get(key), dict):
            said[key] = {name: item for name, item in said[key].items() if item is not None}
    named = said.get("response_format")
    if isinstance(named, dict) and isinstance(named.get("json_schema"), dict):
        schema = {name: item for name, item in named["json_schema"].items() if item is not None}
        said["response_format"] = {**named, "json_schema": schema}
    return said


def _changes_nothing(key: str, value: Any) -> bool:
    """Whether a field that is not done here asks for nothing; 1.0 is 1, but true is not."""
    return any(
        value == one and isinstance(value, bool) == isinstance(one, bool)
        for one in UNCHANGED.get(key, ())
    )


def _named(parts: Sequence[int | str]) -> str:
    """The field by its path, without the alternatives that pydantic tried."""
    shown = [str(part) for part in parts if str(part).islower() or isinstance(part, int)]
    return ".".join(part for part in shown if "[" not in part) or "the body"


def _reason(field: str, error: Any) -> str:
    if error["type"] != "extra_forbidden":
        return f"{field}: {error['msg']}"
    harmless = UNCHANGED.get(field, ())
    if harmless:
        return f"{field}: is not supported here, except {' or '.join(map(repr, harmless))}"
    return f"{field}: is not supported here"
