"""A text to be gone on with -> prompts: what stands before it in training stands before it here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.dialogue.conversation import Conversation
from finetune.errors import DataError
from finetune.serving.errors import bad_request
from finetune.serving.requests.fields import CompletionRequest, parse
from finetune.serving.requests.rules import ReplyRequest, RequestRules, decoding, rules_of

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate

PADDING = "<|endoftext|>"
"""GLM-4V's placeholder, which stands for many things."""
MAX_REPLIES = 64
"""Of one request: prompts times `n`."""


class AskedCompletion:
    """A request of `/v1/completions`."""

    shows_image = False

    def __init__(self, body: bytes, models: Mapping[str, RequestRules]) -> None:
        self._request, self.unknown = parse(body, CompletionRequest)
        self.rules = rules_of(self._request.model, models)
        self.rules.check_unknown(self.unknown)
        if len(self._request.prompt) * self._request.n > MAX_REPLIES:
            raise bad_request(f"more than {MAX_REPLIES} replies are asked for", "prompt")

    def keep_images(self, folder: Path) -> None:
        """There are none."""

    def replies(self) -> list[ReplyRequest]:
        """The `n` replies to every prompt, prompt by prompt."""
        return [
            reply
            for prompt in self._request.prompt
            for reply in _replies(self._request, _ids(prompt, self.rules), self.rules)
        ]


def _replies(
    request: CompletionRequest, prompt: list[int], rules: RequestRules
) -> list[ReplyRequest]:
    chosen = decoding(request, len(prompt), rules, wanted=request.max_tokens)
    seeds = [None if request.seed is None else request.seed + n for n in range(request.n)]
    return [
        ReplyRequest(
            prompt=prompt,
            decoding=replace(chosen, seed=seed),
            tools=(),
            stops=tuple(request.stop),
            model=rules.name,
            many_calls=False,
            stream=request.stream,
            include_usage=request.stream_options.include_usage,
            is_text=True,
            top_logprobs=request.logprobs,
            tells_ids=request.return_token_ids,
        )
        for seed in seeds
    ]


def _image_ids(template: ChatTemplate) -> set[int]:
    """Tokens that stand for an image and nothing else: without one the model fails on them."""
    assert template.image is not None
    ids = template.tokenizer.control_ids
    patch = template.image.patch_token
    return {template.image.begin_id} | (
        {ids[patch]} if patch in ids and patch != PADDING else set()
    )


def _ids(prompt: str | Sequence[int], rules: RequestRules) -> list[int]:
    """The tokens of a prompt; ids of a client's own stay as they are."""
    template = rules.template
    if not isinstance(prompt, str):
        if max(prompt) >= template.tokenizer.vocab_size:
            raise bad_request(
                f"prompt: {max(prompt)} is no token, of which there are "
                f"{template.tokenizer.vocab_size}",
                "prompt",
            )
        if template.image is not None and _image_ids(template) & set(prompt):
            raise bad_request(
                "prompt: holds tokens of an image, which a completion does not show; ask "
                "/v1/chat/completions",
                "prompt",
            )
        return list(prompt)
    rules.check_length([prompt])
    try:
        [rendered] = template.render([Conversation((), text=prompt)])
    except DataError as error:
        raise bad_request(f"prompt: {error}", "prompt") from error
    ids: list[int] = rendered.input_ids.tolist()
    return ids[:-1] if prompt else ids  # behind a text that goes on there is no end
