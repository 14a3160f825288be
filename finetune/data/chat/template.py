r"""Dialogues -> token ids with the spans that may carry loss; reply ids -> messages.

The only place that knows the chat layout. Text from data is encoded by a tokenizer that knows no
control string, control tokens enter by id, and the checkpoint's own template is the authority on
everything else (`finetune.data.chat.jinja`). A reply is trained from the token after its `<|assistant|>`
up to and including its stop, which is the next control token:

    [gMASK]<sop><|user|>\nQ<|assistant|>«\nA<|user|>»            «» may carry loss
    …<|assistant|>«get_weather\n{"city": "北京"}<|observation|>»\n{"t": 20}<|assistant|>«\n20度。<|user|>»

`render` is the checkpoint's own layout, `examples` is what is trained. They differ under a thinking
checkpoint only, see `finetune.data.chat.thinking`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np

from finetune.data.chat import thinking
from finetune.data.chat.image import ImagePrompt
from finetune.data.chat.jinja import HEADERS, ROLES, JinjaTemplate, describe, tools_text
from finetune.data.chat.spans import (
    Ids,
    MessageRun,
    Rendered,
    ReplySpan,
    TrainOn,
    shorten,
    trained_spans,
)
from finetune.data.chat.template_check import check_against_own_template
from finetune.data.chat.tokenizer import ChatTokenizer, explain_panic
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.errors import DataError

__all__ = ["ChatTemplate", "MessageRun", "Rendered", "ReplySpan", "shorten", "trained_spans"]

RULES_VERSION = 1
"""Raised whenever the same dialogue would give other ids or spans."""

BEGIN, END = "<|begin_of_image|>", "<|end_of_image|>"


class Taught(NamedTuple):
    """One example of a dialogue."""

    conversation: Conversation
    """The dialogue up to the end of the example."""
    rendered: Rendered


class _Piece(NamedTuple):
    """A run before encoding. An op below 0 is the control id `~op`, else the number of a text."""

    message: int | None
    ops: tuple[int, ...]
    given: int = 1
    """Tokens at the start of a reply that the prompt ends in: its header, and what follows it there."""


@dataclass(slots=True)
class _Batch:
    """Texts of one call into the tokenizer, equal ones once."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


class ChatTemplate:
    """The chat layout of one checkpoint.

    Raises DataError at construction when what it lays out is not what the checkpoint's own template
    does, on a probe dialogue; the message shows both texts.
    """

    trained_spans = staticmethod(trained_spans)
    shorten = staticmethod(shorten)

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = tokenizer.stop_ids
        self.pad_id = tokenizer.pad_id
        self.image = tokenizer.image
        self._jinja = JinjaTemplate(tokenizer.chat_template, tokenizer.special_tokens)
        self.layout = describe(self._jinja)
        ids = tokenizer.control_ids
        self._headers = {role: ~ids[HEADERS[role]] for role in ROLES}
        self._control = frozenset(ids.values())
        self._is_control = np.zeros(max(*self._control, tokenizer.vocab_size) + 1, dtype=bool)
        self._is_control[list(self._control)] = True
        self._prefix = _Piece(None, tuple(~i for i in self._trusted(self.layout.prefix)))
        self._suffix = tuple(~i for i in self._trusted(self.layout.suffix))
        self._thinks = self.layout.thinking
        self._keeps_suffix = bool(self._suffix) and not self._thinks
        self._tools_text = lru_cache(maxsize=4096)(self._render_tools)
        made_of = f"{tokenizer.fingerprint} rules {RULES_VERSION}"
        if self.layout.thinking:
            made_of += " turns"
        if self.image is not None:
            made_of += f" image {self.image.rules}"
        self.fingerprint = hashlib.sha256(made_of.encode()).hexdigest()
        check_against_own_template(self, self._jinja)

    @property
    def user_id(self) -> int:
        """The token that a user's message begins with."""
        return self.tokenizer.control_ids[HEADERS["user"]]

    @property
    def takes_tools(self) -> bool:
        """Whether the checkpoint's template has a place for tool definitions."""
        return self.layout.tools != "none"

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        """Each dialogue as the checkpoint's own template lays it out; one call into the tokenizer.

        A reply that ends the dialogue, a call too, is followed by `<|user|>`, the stop that the
        model must write there. Plain text stands between the prefix and `<|endoftext|>`.
        """
        nobody = [None] * len(conversations)
        return self._rendered(conversations, nobody, ["user"] * len(conversations))

    def examples(
        self, conversations: Sequence[Conversation], train_on: TrainOn
    ) -> list[list[Taught]]:
        """What each dialogue teaches: itself, or under a thinking checkpoint its turns with loss.

        The prompt of every reply that carries loss is a prefix of its example.
        """
        if not self.layout.thinking:
            rendered = self.render(conversations)
            return [[Taught(c, r)] for c, r in zip(conversations, rendered, strict=True)]
        turns = [thinking.turns_with_loss(c, train_on) for c in conversations]
        flat = [part for parts in turns for part in parts]
        stops = [
            whole.messages[len(part.messages)].role
            if len(part.messages) < len(whole.messages)
            else "user"
            for whole, parts in zip(conversations, turns, strict=True)
            for part in parts
        ]
        starts = [thinking.turn_start(part.messages, len(part.messages)) for part in flat]
        done = iter(map(Taught, flat, self._rendered(flat, starts, stops)))
        return [list(islice(done, len(parts))) for parts in turns]

    def _rendered(
        self,
        conversations: Sequence[Conversation],
        opened: Sequence[int | None],
        stops: Sequence[str],
    ) -> list[Rendered]:
        """Dialogues with the message that is laid out behind the prompt, and the role that stops each."""
        batch = _Batch()
        plans = [
            self._plan(c, len(c.messages), batch, opened=o)
            for c, o in zip(conversations, opened, strict=True)
        ]
        for plan, conversation, stop in zip(plans, conversations, stops, strict=True):
            if conversation.messages and conversation.messages[-1].role == "assistant":
                plan.append(_Piece(None, (self._headers[stop],)))
        flat, bounds = self._assemble(plans, self._encode(batch, conversations))
        return [
            _rendered(flat, positions, plan, conversation)
            for positions, plan, conversation in zip(bounds, plans, conversations, strict=True)
        ]

    def prompt(self, conversation: Conversation, reply: int) -> list[int]:
        """The ids that the model is given to write message `reply`; nothing of it is in them.

        They end as the checkpoint's generation prompt does. `reply` may be the number of messages:
        the reply that comes next.
        """
        return self.prompts([(conversation, reply)])[0]

    def prompts(self, requests: Sequence[tuple[Conversation, int]]) -> list[list[int]]:
        """`prompt` for many (dialogue, reply) pairs with one call into the tokenizer.

        Those of dialogues that show an image are `ImagePrompt`s.
        """
        batch = _Batch()
        plans = []
        for conversation, reply in requests:
            # A turn of several calls goes on by itself, behind its first one's thought.
            start = thinking.turn_start(conversation.messages, reply) if self._thinks else None
            suffix = self._suffix if start is None else ()
            opening = _Piece(None, (self._headers["assistant"], *suffix))
            plans.append([*self._plan(conversation, reply, batch, opened=start), opening])
        flat, bounds = self._assemble(plans, self._encode(batch, [c for c, _ in requests]))
        ids = [flat[positions[0] : positions[-1]].tolist() for positions in bounds]
        return [self._illustrated(i, c, reply) for i, (c, reply) in zip(ids, requests, strict=True)]

    def parse(self, ids: Iterable[int]) -> Message:
        """The message that reply ids say, with or without their stop, up to the first control token.

        The first line is a function's name, or empty for a plain reply; text without a line break is
        a plain reply. Under a thinking checkpoint, ids that continue the generation prompt get its
        `<think>` back; an empty thought goes, and so does that of a call.
        """
        text = self._reply_text(ids)
        suffix = self.layout.suffix
        if (
            suffix
            and not text.startswith(suffix)
            and (not self.layout.thinking or thinking.THINK_END in text)
        ):
            text = suffix + text
        name, line_break, content = text.partition("\n")
        if not line_break:
            return Message("assistant", text)
        if self.layout.thinking and not name:
            return thinking.as_message(content)
        return Message("assistant", content, metadata=name.strip())

    def visible(self, reply: Message) -> str:
        """What the checkpoint's template keeps of a reply once it is past: no reasoning under GLM-Z1."""
        return self.layout.clean["assistant"](reply.content)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of any ids, control tokens shown; an image as the three published tokens."""
        text = str(self.tokenizer.backend.decode(_to_list(ids), skip_special_tokens=False))
        if self.image is None:
            return text
        begin, patch, end = map(re.escape, (BEGIN, self.image.patch_token, END))
        return re.sub(f"({begin}{patch})(?:{patch})*({end})", r"\1\2", text)

    def _reply_text(self, ids: Iterable[int]) -> str:
        listed = _to_list(ids)
        end = next((place for place, i in enumerate(listed) if i in self._control), len(listed))
        return str(self.tokenizer.plain.decode(listed[:end], skip_special_tokens=False))

    def _trusted(self, text: str) -> list[int]:
        """Ids of text that the checkpoint's template wrote, its control strings matched."""
        with explain_panic():
            return list(self.tokenizer.backend.encode(text, add_special_tokens=False).ids)

    def _plan(
        self, conversation: Conversation, stop: int, batch: _Batch, *, opened: int | None
    ) -> list[_Piece]:
        """Pieces of `messages[:stop]`; message `opened` is laid out behind the generation prompt."""
        pieces = [self._prefix]
        if conversation.text:
            end = ~self.tokenizer.control_ids["<|endoftext|>"]
            return [self._prefix, _Piece(None, (batch.number(conversation.text), end))]
        if conversation.tools:
            text = self._tools(conversation)
            pieces.append(_Piece(None, (self._headers["system"], batch.number(text))))
        suffix = self.layout.suffix
        for index, message in enumerate(conversation.messages[:stop]):
            if message.role == "system" and not message.content:
                continue
            name, body = self._texts(conversation, index)
            header, text, given = self._headers[message.role], f"{name}\n{body}", 1
            if message.image is not None:
                ops = (
                    header,
                    batch.number(name + "\n"),
                    *self._image(message.image),
                    batch.number(body),
                )
            elif index == opened:
                written = thinking.behind_prompt(message, name, body)
                ops, given = (header, *self._suffix, batch.number(written)), 1 + len(self._suffix)
            elif self._keeps_suffix and message.role == "assistant" and text.startswith(suffix):
                # These very ids stand at the end of the prompt too.
                ops = (header, *self._suffix, batch.number(text.removeprefix(suffix)))
            else:
                ops = (header, batch.number(text))
            pieces.append(_Piece(index, ops, given))
        return pieces

    def _texts(self, conversation: Conversation, index: int) -> tuple[str, str]:
        """Name and content of a message as the checkpoint's template writes them."""
        role, content, name = (message := conversation.messages[index]).role, message.content, ""
        problem = ""
        if message.metadata:
            if role in self.layout.named_roles:
                name = message.metadata
            elif role == "assistant":
                problem = "this checkpoint's chat template has no place for tool calls"
            if "\n" in name:
                problem = f"its name has a line break: {name!r}"
        if not content:
            problem = "it has no text, and the published template leaves such a message out"
        elif role not in self.layout.clean:
            problem = "this checkpoint's chat template does not know the role"
        if problem:
            raise DataError(
                f"{conversation.location}: message {index + 1} ({role}): {problem}; correct or remove it"
            )
        return name, self.layout.clean[role](content)

    def _illustrated(self, ids: list[int], conversation: Conversation, reply: int) -> list[int]:
        images = [m.image for m in conversation.messages[:reply] if m.image is not None]
        if self.image is None or not images:
            return ids
        return ImagePrompt(ids, images[0], self.image)

    def _image(self, path: str) -> tuple[int, ...]:
        """Ops of an image's span: with as many placeholders as the model has patches for it."""
        ids = self.tokenizer.control_ids
        tokens = (BEGIN, self.image.patch_token if self.image else "<|endoftext|>", END)
        missing = [token for token in tokens if token not in ids]
        if missing:
            raise DataError(f"this checkpoint's tokenizer has no {missing[0]}: it takes no images; use GLM-4V-9B, or leave the images out")  # fmt: skip
        begin, patch, end = (~ids[token] for token in tokens)
        return (begin, *[patch] * (self.image.patches_of(path) if self.image else 1), end)

    def _tools(self, conversation: Conversation) -> str:
        if not self.takes_tools:
            raise DataError(
                f"{conversation.location}: the dialogue has tools, but this checkpoint's chat template "
                "has no place for them; use a chat checkpoint or leave the tools out"
            )
        # As JSON: a key by value, and plain values for the template to work on.
        try:
            return self._tools_text(json.dumps(conversation.tools, ensure_ascii=False))
        except DataError as error:
            raise DataError(f"{conversation.location}: {error}") from error

    def _render_tools(self, tools_json: str) -> str:
        return tools_text(self._jinja, self.layout, json.loads(tools_json))

    def _encode(self, batch: _Batch, conversations: Sequence[Conversation]) -> list[list[int]]:
        texts = list(batch.numbers)
        try:
            with explain_panic():
                encodings = self.tokenizer.plain.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            raise _broken_text(conversations) from None
        return [encoding.ids for encoding in encodings]

    def _assemble(
        self, plans: Sequence[Sequence[_Piece]], texts: Sequence[list[int]]
    ) -> tuple[Ids, list[list[int]]]:
        """All ids in one array, and per plan the positions of its pieces' starts and its end."""
        flat: list[int] = []
        bounds: list[list[int]] = []
        placed = 0
        for plan in plans:
            positions = [len(flat)]
            for piece in plan:
                for op in piece.ops:
                    if op < 0:
                        flat.append(~op)
                        placed += ~op in self._control
                    else:
                        flat += texts[op]
                positions.append(len(flat))
            bounds.append(positions)
        ids = np.fromiter(flat, dtype=np.int32, count=len(flat))
        ids.flags.writeable = False
        found = int(np.count_nonzero(self._is_control[ids]))
        assert found == placed, f"{found - placed} control ids came out of plain text"
        return ids, bounds


def _rendered(
    flat: Ids, positions: Sequence[int], plan: Sequence[_Piece], conversation: Conversation
) -> Rendered:
    base = positions[0]
    runs = tuple(
        MessageRun(positions[place] - base, positions[place + 1] - base, piece.message)
        for place, piece in enumerate(plan)
    )
    messages = conversation.messages
    replies = tuple(
        ReplySpan(index, start + piece.given, end + 1)
        for (start, end, index), piece in zip(runs, plan, strict=True)
        if index is not None and messages[index].role == "assistant"
    )
    return Rendered(flat[base : positions[-1]], runs, replies)


def _to_list(ids: Iterable[int]) -> list[int]:
    return [int(i) for i in ids]


def _broken_text(conversations: Iterable[Conversation]) -> DataError:
    """Names the message that is not valid Unicode."""
    for conversation in conversations:
        for index, message in enumerate(conversation.messages):
            try:
                f"{message.metadata}{message.content}".encode()
            except UnicodeEncodeError as error:
                return DataError(
                    f"{conversation.location}: message {index + 1} ({message.role}) is not valid Unicode "
                    f"({error.reason} at character {error.start}); repair or remove the row"
                )
    return DataError("a tool definition is not valid Unicode; repair or remove its row")
