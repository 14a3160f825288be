"""What is asked of a model: its limits, and one reply with its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from finetune.generation.decoder import Constraint, Decoding
from finetune.serving.errors import ApiError, bad_request
from finetune.serving.requests.fields import SamplingFields

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate
    from finetune.generation.structured import Structures


MANY_IMAGES = 32
"""Of a request, for models that take any number."""
NEVER_TAKEN = {
    "chat_template": "prompts are laid out by the checkpoint's own template",
    "trust_remote_code": "no code of a checkpoint is ever run",
}
"""Fields of other servers that would run what a client brings: never left out in silence."""


_PIECE, _CUT = 50_000, 16


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

    strict_fields: bool = False
    """Whether fields that nobody knows are refused."""

    def check_unknown(self, names: Sequence[str]) -> None:
        """Raises ApiError for the names of unknown fields where they are refused."""
        for name in names:
            if name in NEVER_TAKEN:
                raise bad_request(f"{name}: {NEVER_TAKEN[name]}", name)
        if names and self.strict_fields:
            reasons = [f"{name[:60]}: is not supported here" for name in names[:5]]
            raise bad_request("; ".join(reasons), names[0][:60])

    def check_length(self, texts: Sequence[str], *, times: int = 1) -> None:
        """Raises ApiError for texts of far more tokens than the context has, `times` over.

        No more of them are counted than that, and in pieces, between which others are read. What is
        cut in the middle of a word makes a few tokens more, which are not counted.
        """
        most = self.context and times * self.context
        if most is None or sum(map(len, texts)) <= 4 * most:
            return
        plain, left = self.template.tokenizer.plain, most
        for text in texts:
            for begin in range(0, len(text), _PIECE):
                piece = text[begin : begin + _PIECE]
                left -= max(0, len(plain.encode(piece, add_special_tokens=False).ids) - _CUT)
                if left < 0:
                    raise bad_request(
                        f"the prompt has more than the {most} tokens that fit; shorten the messages",
                        "messages",
                        "context_length_exceeded",
                    )

    @property
    def most_images(self) -> int:
        """How many images a request may show."""
        most = self.template.image_rule.most
        return MANY_IMAGES if most is None else most

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
    model: str
    """The id of the model that writes it."""
    many_calls: bool
    """The reply may hold more than one call."""
    stream: bool
    include_usage: bool
    is_text: bool = False
    """The reply is text as it comes, without the layout of a dialogue."""
    constraint: Constraint | None = None
    thinks: bool | None = None
    """Whether the model is to think, where its template has a switch."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens are told beside each token; None: no probabilities at all."""
    tells_ids: bool = False
    """The reply's ids are told, too; one that is text then goes on to a stop, as in `generate`."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the longest reply."""
        return len(self.prompt) + self.decoding.max_new_tokens


class Asked(Protocol):
    """A request whose fields are read and whose work is not yet begun."""

    @property
    def rules(self) -> RequestRules:
        """The model that is asked, and its limits."""

    @property
    def unknown(self) -> Sequence[str]:
        """Names of fields that are left out, as nobody knows them."""

    @property
    def shows_image(self) -> bool:
        """There are images to be read, one request at a time."""

    def keep_images(self, folder: Path) -> None:
        """Writes its images into `folder`; ApiError for paths, addresses and what is no image."""

    def replies(self) -> list[ReplyRequest]:
        """What is asked for, with seeds that follow each other; ApiError when it cannot be answered."""


def decoding(
    fields: SamplingFields, prompt: int, rules: RequestRules, *, wanted: int | None
) -> Decoding:
    """How a reply to `prompt` tokens is chosen; a length that does not fit is lowered.

    Args:
        fields: what the client said.
        prompt: tokens of it.
        rules: the model's limits.
        wanted: the longest reply that was asked for; None: as long as the server's rule says.
    """
    length = rules.max_new_tokens if wanted is None else wanted
    if rules.context is not None:
        room = rules.context - prompt
        if room < 1:
            raise bad_request(
                f"{prompt} tokens of the prompt leave no room for a reply among the "
                f"{rules.context} that fit; shorten the messages",
                "messages",
                "context_length_exceeded",
            )
        length = min(length, room)
    return Decoding(
        length,
        fields.temperature,
        fields.top_p,
        fields.seed,
        top_k=fields.top_k,
        min_p=fields.min_p,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
    )


def rules_of(model: str, models: Mapping[str, RequestRules]) -> RequestRules:
    """The rules of a model by its id; ApiError for one that is not served."""
    if model in models:
        return models[model]
    served = " and ".join(repr(name) for name in models)
    verb = "is" if len(models) == 1 else "are"
    raise ApiError(
        404,
        f"the model {model!r} is not served here, {served} {verb}",
        param="model",
        code="model_not_found",
    )
