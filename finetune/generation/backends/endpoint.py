"""The replies of `generate`, from an endpoint that serves the same model: prompt ids in, reply ids out.

It is asked for text completions of ids, so that every token of a prompt is ours and not its chat template's.
vLLM and ours answer with the reply's ids (`return_token_ids`); of others the text is cut into tokens again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from finetune import launcher
from finetune.data.chat.image import ImagePrompt
from finetune.data.chat.template import ChatTemplate
from finetune.errors import ConfigError, DataError
from finetune.generation.backends.address import Address
from finetune.generation.decoder import Decoding
from finetune.generation.generate import Reply, Row, Window


class EndpointGenerator:
    """Answers prompts as `generate.Generator` would."""

    def __init__(
        self, address: Address, template: ChatTemplate, *, max_new_tokens: int, at_once: int
    ) -> None:
        """Nothing is asked yet.

        Args:
            address: of the endpoint, and its name for the model.
            template: gives the stop ids, and the tokens of a text.
            max_new_tokens: a reply that is cut here has not stopped.
            at_once: requests under way.

        Raises:
            ConfigError: torchrun started several processes.
        """
        if launcher.world_size() > 1:
            raise ConfigError(f"{address.option} is asked by one process: leave torchrun out")
        self._address, self._template = address, template
        self._max_new_tokens, self._at_once = max_new_tokens, at_once

    def replies(
        self,
        windows: Iterable[Window],
        *,
        note: Callable[[int, list[Row]], object] = lambda *_: None,
        total: int | None = None,
    ) -> Iterator[list[Reply]]:
        """The replies to each window's prompts, in their order."""
        with ThreadPoolExecutor(self._at_once) as threads:
            for window in windows:
                asked = [
                    (number, prompt, window.extras.request(prompt, number, self._max_new_tokens).decoding)
                    for number, prompt in enumerate(window.prompts)
                ]  # fmt: skip
                yield list(threads.map(lambda one: self._reply(*one), asked))

    def _reply(self, number: int, prompt: Any, decoding: Decoding) -> Reply:
        if isinstance(prompt, ImagePrompt):
            raise DataError(
                f"{self._address.option} takes no images; leave them out, or let the model reply here"
            )
        body = {
            "prompt": [int(token) for token in prompt],
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "seed": decoding.seed,
            "return_token_ids": True,
        }
        if decoding.seed is None:
            del body["seed"]
        answer = self._address.post("completions", body)
        try:
            [choice] = answer["choices"]
            text, stopped = str(choice["text"]), choice["finish_reason"] != "length"
            ids = choice.get("token_ids")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self._address.option}: {self._address.url} answers with no completion: {str(answer)[:200]}; check its address"
            ) from error
        if not isinstance(ids, list):
            ids = self._template.tokenizer.backend.encode(text, add_special_tokens=False).ids
        if ids and ids[-1] in self._template.stop_ids:
            ids = ids[:-1]
        return Reply(number, tuple(map(int, ids)), stopped)
