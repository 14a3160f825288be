r"""Dialogues -> token ids with the spans that may carry loss; reply ids -> messages.

Text from data is encoded by a tokenizer that knows no control string, control tokens enter by id, and
the checkpoint's own template is the authority on everything else: it decides which of
`finetune.data.chat.layouts` is used. A reply is trained from the token after its `<|assistant|>`
up to and including its stop, which is the next control token:

    [gMASK]<sop><|user|>\nQ<|assistant|>«\nA<|user|>»            «» may carry loss
    …<|assistant|>«get_weather\n{"city": "北京"}<|observation|>»\n{"t": 20}<|assistant|>«\n20度。<|user|>»

`render` is the checkpoint's own layout, `examples` is what is trained. They differ under a thinking
checkpoint only, where the template leaves the reasoning of past replies out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from finetune.data.chat.image import BEGIN, END, ImagePrompt, check_images
from finetune.data.chat.jinja import HEADERS, JinjaTemplate
from finetune.data.chat.layouts.choice import layout_of
from finetune.data.chat.layouts.layout import ExamplePart, PlannedRun, Texts
from finetune.data.chat.spans import (
    Ids,
    MessageRun,
    Rendered,
    ReplySpan,
    TrainOn,
    shorten,
    trained_spans,
)
from finetune.data.chat.template_check import check_against_own_template, roles_with_images
from finetune.data.chat.tokenizer import ChatTokenizer, explain_panic
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.data.dialogue.images import ImageRule
from finetune.errors import DataError

__all__ = ["ChatTemplate", "MessageRun", "Rendered", "ReplySpan", "shorten", "trained_spans"]

RULES_VERSION = 1
"""Raised whenever the same dialogue would give other ids or spans."""


class Taught(NamedTuple):
    """One example of a dialogue."""

    conversation: Conversation
    """The dialogue up to the end of the example."""
    rendered: Rendered


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
        self.jinja = jinja = JinjaTemplate(tokenizer.chat_template, tokenizer.special_tokens)
        self.layout = layout_of(tokenizer, jinja)
        self._control = frozenset(tokenizer.control_ids.values())
        self._is_control = np.zeros(max(*self._control, tokenizer.vocab_size) + 1, dtype=bool)
        self._is_control[list(self._control)] = True
        self._prefix = PlannedRun(None, tuple(~i for i in tokenizer.trusted(self.layout.prefix)))
        made_of = f"{tokenizer.fingerprint} rules {RULES_VERSION}{self.layout.rules}"
        if self.image is not None:
            made_of += f" image 2 {self.image.rules}"
        self.fingerprint = hashlib.sha256(made_of.encode()).hexdigest()
        check_against_own_template(self, jinja)

    @cached_property
    def image_rule(self) -> ImageRule:
        """How many images a dialogue may show, and whose messages the checkpoint's template shows them in."""
        rule = self.tokenizer.image_rule
        return rule if rule.most is not None else replace(rule, roles=roles_with_images(self))

    @property
    def user_id(self) -> int:
        """The token that a user's message begins with."""
        return self.tokenizer.control_ids[HEADERS["user"]]

    @property
    def takes_tools(self) -> bool:
        """Whether the checkpoint's template has a place for tool definitions."""
        return self.layout.takes_tools

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        """Each dialogue as the checkpoint's own template lays it out; one call into the tokenizer.

        A reply that ends the dialogue, a call too, is followed by `<|user|>`, the stop that the
        model must write there. Plain text stands between the prefix and `<|endoftext|>`.
        """
        return self._rendered([ExamplePart(c, self.layout.stop(c)) for c in conversations])

    def examples(
        self, conversations: Sequence[Conversation], train_on: TrainOn
    ) -> list[list[Taught]]:
        """What each dialogue teaches: itself, or under a thinking checkpoint its turns with loss.

        The prompt of every reply that carries loss is a prefix of its example.
        """
        parts = []
        for conversation in conversations:
            with _named(conversation):
                parts.append(self.layout.parts(conversation, train_on))
        flat = [part for of_one in parts for part in of_one]
        taught = [
            Taught(p.conversation, r) for p, r in zip(flat, self._rendered(flat), strict=True)
        ]
        done = iter(taught)
        return [list(islice(done, len(of_one))) for of_one in parts]

    def _rendered(self, parts: Sequence[ExamplePart]) -> list[Rendered]:
        texts = Texts()
        plans = []
        for conversation, stop, opened in parts:
            plan = self._plan(conversation, len(conversation.messages), texts, opened)
            if conversation.messages and conversation.messages[-1].role == "assistant":
                plan.append(PlannedRun(None, (~self.tokenizer.control_ids[HEADERS[stop]],)))
            plans.append(plan)
        conversations = [part.conversation for part in parts]
        flat, bounds = self._assemble(plans, self._encode(texts, conversations))
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
        texts = Texts()
        plans = []
        for conversation, reply in requests:
            plan = self._plan(conversation, reply, texts, self.layout.asked(conversation, reply))
            with _named(conversation):
                plan.append(PlannedRun(None, self.layout.opening(conversation, reply)))
            plans.append(plan)
        flat, bounds = self._assemble(plans, self._encode(texts, [c for c, _ in requests]))
        ids = [flat[positions[0] : positions[-1]].tolist() for positions in bounds]
        return [self._illustrated(i, c, reply) for i, (c, reply) in zip(ids, requests, strict=True)]

    def parse(self, ids: Iterable[int], tools: Sequence[Mapping[str, Any]] = ()) -> Message:
        """The message that reply ids say, with or without their stop; of several the first."""
        return self.layout.parse(ids, tools)

    def messages(
        self, ids: Iterable[int], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Message]:
        """The messages that generated ids hold: one, or several of one turn of the model.

        `tools` are the dialogue's; their schemas may decide which arguments of a call are text.
        """
        return self.layout.messages(ids, tools)

    def visible(self, reply: Message) -> str:
        """What the checkpoint's template keeps of a reply once it is past: no reasoning under GLM-Z1."""
        return self.layout.visible(reply)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of any ids, control tokens shown; an image as the three published tokens."""
        listed = [int(i) for i in ids]
        text = str(self.tokenizer.backend.decode(listed, skip_special_tokens=False))
        if self.image is None:
            return text
        begin, patch, end = map(re.escape, (BEGIN, self.image.patch_token, END))
        return re.sub(f"({begin}{patch})(?:{patch})*({end})", r"\1\2", text)

    def _plan(
        self, conversation: Conversation, stop: int, texts: Texts, opened: int | None
    ) -> list[PlannedRun]:
        """Pieces of the prefix and of `messages[:stop]`, or of a text."""
        if any(message.images for message in conversation.messages):
            check_images(self.image_rule, conversation)
        if conversation.text:
            end = ~self.tokenizer.control_ids["<|endoftext|>"]
            return [self._prefix, PlannedRun(None, (texts.number(conversation.text), end))]
        with _named(conversation):
            return [self._prefix, *self.layout.pieces(conversation, stop, texts, opened)]

    def _illustrated(self, ids: list[int], conversation: Conversation, reply: int) -> list[int]:
        images = [image.path for m in conversation.messages[:reply] for image in m.images]
        return ImagePrompt(ids, images, self.image) if self.image and images else ids

    def _encode(self, texts: Texts, conversations: Sequence[Conversation]) -> list[list[int]]:
        listed = list(texts.numbers)
        try:
            with explain_panic():
                encodings = self.tokenizer.plain.encode_batch_fast(listed, add_special_tokens=False)
        except TypeError:
            raise _broken_text(conversations) from None
        return [encoding.ids for encoding in encodings]

    def _assemble(
        self, plans: Sequence[Sequence[PlannedRun]], texts: Sequence[list[int]]
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


@contextmanager
def _named(conversation: Conversation) -> Iterator[None]:
    """DataErrors say which dialogue they are about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{conversation.location}: {error}") from error


def _rendered(
    flat: Ids, positions: Sequence[int], plan: Sequence[PlannedRun], conversation: Conversation
) -> Rendered:
    base = positions[0]
    runs = tuple(
        MessageRun(positions[place] - base, positions[place + 1] - base, piece.message)
        for place, piece in enumerate(plan)
    )
    messages = conversation.messages
    replies = tuple(
        ReplySpan(index, start + piece.given, end + piece.stops)
        for (start, end, index), piece in zip(runs, plan, strict=True)
        if index is not None and messages[index].role == "assistant"
    )
    return Rendered(flat[base : positions[-1]], runs, replies)


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
