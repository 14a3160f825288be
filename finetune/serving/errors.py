"""What a client is told when its request cannot be answered, in OpenAI's form."""

from __future__ import annotations

from typing import Any

NOT_HERE = {
    "responses": "the Responses API is not served; ask /v1/chat/completions instead: openai-agents with "
    "set_default_openai_api('chat_completions'), langchain with use_responses_api=False, pydantic-ai with "
    "OpenAIChatModel ('openai-chat:NAME'), litellm with use_chat_completions_api=True, instructor with a mode "
    "whose name does not begin with RESPONSES, smolagents with OpenAIModel",
    "embeddings": "the models served here write text and give no embeddings; point the embedding client at "
    "another server",
    "messages": "Anthropic's API is not served; use a client of /v1/chat/completions",
    **dict.fromkeys(
        ("assistants", "threads", "conversations"),
        "dialogues are not kept here; send them whole to /v1/chat/completions",
    ),
    **dict.fromkeys(
        ("audio", "images", "videos", "realtime", "moderations"),
        "only text is written here; images go in as parts of a message to /v1/chat/completions",
    ),
    **dict.fromkeys(
        ("files", "uploads", "batches", "vector_stores", "fine_tuning", "fine-tunes", "evals"),
        "nothing is stored here; `finetune predict` answers files and `finetune train` tunes",
    ),
}
"""What else OpenAI's clients ask for below /v1/, and what to set in them."""


def not_here(path: str) -> str:
    """What to do instead of asking an address that is not served."""
    first = path.removeprefix("/").removeprefix("v1/").partition("/")[0]
    if first in NOT_HERE:
        return NOT_HERE[first]
    if path.removeprefix("/") in ("chat/completions", "completions", "models"):
        return f"the client's base URL lacks /v1; the address is /v1{path}"
    if path.startswith("/v1/v1/"):
        return f"/v1 stands in it twice; the client adds its own, so the address is {path[3:80]}"
    return (
        "served are /v1/chat/completions, /v1/completions, /v1/models, /tokenize, /metrics, /health"
    )


class ApiError(Exception):
    """An HTTP status with `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client must change something: 400."""
    return ApiError(400, message, param=param, code=code)
