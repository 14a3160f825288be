"""An open model as lm-evaluation-harness asks for one: chats laid out by our template, our batches.

A chat is kept as ids under the text that it is shown as, so that no text of a task becomes a control
token. Continuations are scored in batches sorted by length; those of one context that differ in their
last token alone, such as the choices A to D, are one row.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.model import LM

from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.generation.decoder import Decoding, Request, write_replies
from finetune.generation.generate import cache_tokens, context_length
from finetune.models.kernels.products import packed

MAX_NEW_TOKENS = 1024
"""Of a reply whose task names no bound."""
_TAIL = 24
"""Tokens in whose text an end is looked for."""


class Scored(NamedTuple):
    """A continuation to be scored behind a context."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def row(self) -> tuple[int, ...]:
        """What the model reads."""
        return self.context + self.continuation[:-1]


class OpenLanguageModel(LM):
    """The model that tasks ask."""

    def __init__(self, model: Any, template: ChatTemplate, *, batch_size: int) -> None:
        super().__init__()
        self._model, self._template, self._batch_size = model, template, batch_size
        self._chats: dict[str, tuple[int, ...]] = {}
        self._room = context_length(model) or 1 << 20

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps requests under."""
        return self._template.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The text of the template, which the harness notes."""
        return self._template.fingerprint

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text; its ids are kept."""
        messages: Any = tuple(Message(one["role"], one["content"]) for one in chat_history)  # type: ignore[arg-type]
        last = messages[-1] if messages else None
        begun = "" if add_generation_prompt or last is None else last.content
        asked = messages if add_generation_prompt else messages[:-1]
        ids = [int(i) for i in self._template.prompt(Conversation(asked, location="a task"), len(asked))]  # fmt: skip
        if begun:
            ids += self._opened(begun)
        shown = str(self._template.decode(ids))
        self._chats[shown] = tuple(ids)
        return shown

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Log probability of each continuation, and whether it is the likeliest one."""
        scored = [self._scored(*one.args) for one in requests]
        rows = sorted({one.row for one in scored}, key=len, reverse=True)
        by_row: dict[tuple[int, ...], list[Scored]] = {}
        for one in dict.fromkeys(scored):
            by_row.setdefault(one.row, []).append(one)
        found: dict[Scored, tuple[float, bool]] = {}
        for first in range(0, len(rows), self._batch_size):
            batch = rows[first : first + self._batch_size]
            for row, logprobs in zip(batch, self._logprobs(batch, by_row), strict=True):
                for one in by_row[row]:
                    found[one] = _taken(logprobs[-len(one.continuation) :], one.continuation)
        return [found[one] for one in scored]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log probability of each text as a whole, in windows of the model's context."""
        totals = []
        for one in requests:
            prefix, ids = self._text_ids(""), self._encode(one.args[0])
            step = self._room - len(prefix)
            windows = [Scored(prefix, tuple(ids[at : at + step])) for at in range(0, len(ids), step)]  # fmt: skip
            rows = [window.row for window in windows]
            by_row = {window.row: [window] for window in windows}
            totals.append(
                sum(
                    _taken(logprobs[-len(window.continuation) :], window.continuation)[0]
                    for row, window in zip(rows, windows, strict=True)
                    for logprobs in self._logprobs([row], by_row)
                )
            )
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """The greedy reply to each context, up to the first of its ends."""
        asked = [self._request(*one.args) for one in requests]
        order = sorted(range(len(asked)), key=lambda at: -len(asked[at].prompt))
        longest = max((len(one.prompt) + one.decoding.max_new_tokens for one in asked), default=1)
        slots = max(1, min(self._batch_size, cache_tokens(self._model) // longest))
        with torch.no_grad(), packed(self._model):
            rows = write_replies(self._model, self._template.stop_ids, [asked[at] for at in order], slots=slots)  # fmt: skip
        replies = dict(zip(order, rows, strict=True))
        return [self._said(one.args[0], replies[at].ids, _ends(one.args[1])) for at, one in enumerate(requests)]  # fmt: skip

    def _request(self, context: str, options: Mapping[str, Any]) -> Request:
        longest = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
        ids = self._context_ids(context)[-(self._room - longest) :]
        ends, written = _ends(options), list[int]()

        def is_enough(token: int) -> bool:
            written.append(token)
            tail = self._decode(written[-_TAIL:])
            return any(end in tail for end in ends)

        return Request(ids, Decoding(longest), on_token=is_enough if ends else None)

    def _said(self, context: str, ids: Sequence[int], ends: Sequence[str]) -> str:
        """The text of a reply up to its end; of a chat without the line break that it begins with."""
        if context in self._chats:
            message = self._template.parse(ids)
            text = f"{message.metadata}\n{message.content}" if message.metadata else message.content
        else:
            text = self._decode(ids)
        for end in ends:
            text = text.split(end)[0]
        return text

    def _scored(self, context: str, continuation: str) -> Scored:
        if context in self._chats:
            before = self._chats[context]
            follows = context.endswith("<|assistant|>")
            after = self._opened(continuation.lstrip()) if follows else self._encode(continuation)
        else:
            blank = len(context) - len(context.rstrip())
            if context and blank:
                context, continuation = context[:-blank], context[-blank:] + continuation
            before, whole = self._text_ids(context), self._text_ids(context + continuation)
            after = list(whole[len(before) :])
        room = self._room + 1 - len(after)
        return Scored(tuple(before[-room:]), tuple(after))

    def _opened(self, text: str) -> list[int]:
        """A plain reply as it stands behind the prompt, such as with a line break before it."""
        lead, tokenizer = self._template.layout.lead, self._template.tokenizer
        if any(part in tokenizer.control_ids for part in tokenizer.split(lead)):
            return tokenizer.trusted(lead) + self._encode(text)
        return self._encode(lead + text)

    def _context_ids(self, context: str) -> tuple[int, ...]:
        return self._chats.get(context) or self._text_ids(context)

    def _text_ids(self, text: str) -> tuple[int, ...]:
        """A text behind the ids that begin every text, without an end."""
        [rendered] = self._template.render([Conversation((), text=text or " ")])
        ids = tuple(int(i) for i in rendered.input_ids[:-1])
        return ids if text else ids[: -len(self._encode(" "))]

    def _encode(self, text: str) -> list[int]:
        return list(self._template.tokenizer.plain.encode(text, add_special_tokens=False).ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._template.tokenizer.plain.decode(list(ids), skip_special_tokens=True))

    def _logprobs(
        self, rows: Sequence[tuple[int, ...]], by_row: Mapping[tuple[int, ...], Sequence[Scored]]
    ) -> list[torch.Tensor]:
        """Log probabilities [longest continuation, V] at the end of each row."""
        device = self._model.device
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)  # fmt: skip
        model = self._model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
        with torch.no_grad():
            output = inner.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            hidden, head = output.last_hidden_state, inner.get_output_embeddings()
            needed = [max(len(one.continuation) for one in by_row[row]) for row in rows]
            ends = [hidden[at, len(row) - number : len(row)] for at, (row, number) in enumerate(zip(rows, needed, strict=True))]  # fmt: skip
            return [head(end).float().log_softmax(dim=-1).cpu() for end in ends]


def _taken(logprobs: torch.Tensor, ids: Sequence[int]) -> tuple[float, bool]:
    """Log probability of `ids` under [T, V], and whether they are the likeliest at every place."""
    chosen = torch.tensor(ids)
    total = logprobs.gather(1, chosen[:, None]).double().sum()
    return float(total), bool((logprobs.argmax(dim=-1) == chosen).all())


def _ends(options: Mapping[str, Any]) -> list[str]:
    found = options.get("until") or []
    return [one for one in ([found] if isinstance(found, str) else found) if one]
