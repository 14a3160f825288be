"""Dialogues in, replies out: one JSON line per dialogue, in their order.

    {"where": "in.jsonl:3", "messages": [..., {"role": "assistant", "content": "..."}], "stopped": true}

The last messages are the reply; everything before them is what the model was given. A reply that
calls functions brings them in OpenAI's form too, as "tool_calls". Lines are kept while they come:
`<output>.part` grows window by window, and the same command after a crash goes on behind them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from finetune import console
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.data.reading.files import expand
from finetune.data.reading.sources import BESIDE, Images, Reading, SourceSpec, read_conversations
from finetune.errors import DataError
from finetune.generation.stream import FUNCTION_NAME
from finetune.storage.files import json_line

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate
    from finetune.generation.generate import Reply

    Answer: TypeAlias = Callable[[list[list[int]]], list[Reply]]

Backend = Literal["transformers", "vllm"]

BATCHES_PER_WINDOW = 32
"""Batches that are sorted by length together and written together."""


class Question(NamedTuple):
    """A dialogue up to the reply that is asked for."""

    conversation: Conversation
    reply: int
    """Number of messages that the model is given."""


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """How replies are generated."""

    max_new_tokens: int = 512
    batch_size: int = 16
    backend: Backend = "transformers"


class _Work(NamedTuple):
    """What one call of `predict` is about."""

    target: str
    data: Sequence[str]
    base: str | None
    options: PredictOptions
    template: ChatTemplate
    lengths: Sequence[int]
    """Tokens of every prompt."""


def predict(
    target: str,
    data: Sequence[str],
    output: Path,
    *,
    base: str | None = None,
    options: PredictOptions = PredictOptions(),
) -> dict[str, Any]:
    """Writes the model's reply to every dialogue of `data` to `output`; returns counts.

    Args:
        target: what `open_model` opens.
        data: files, globs or folders of dialogues; a reply at a dialogue's end is left out.
        output: a JSONL file; replaced only when all of it is there.
        base: the adapter's base where its own record is out of date.
        options: how replies are generated.

    Raises:
        ConfigError: the backend is not installed.
        DataError: rows are no dialogues, or leave no room for a reply; before anything is generated.
        ModelError: `target` cannot be opened.
    """
    from finetune.distributed.map_batches import joined_processes
    from finetune.generation.load import open_template

    template = open_template(target, base=base)
    lengths = _prompt_lengths(data, template)  # reads every row once, so that bad ones show now
    work = _Work(target, data, base, options, template, lengths)
    journal = Journal(output, _identity(target, data, base, options))
    if options.backend == "vllm":
        return _answer_all(work, journal, _by_vllm(work))
    with joined_processes():
        return _answer_all(work, journal, _by_transformers(work))


def _by_transformers(work: _Work) -> Answer:
    """Prompts -> replies by our own generation, on all processes together."""
    from finetune.generation.generate import generate
    from finetune.generation.load import open_model

    opened = open_model(work.target, base=work.base)
    _check_context(opened.model, work)
    return lambda prompts: generate(
        opened.model,
        opened.template,
        prompts,
        max_new_tokens=work.options.max_new_tokens,
        batch_size=work.options.batch_size,
    )


def _by_vllm(work: _Work) -> Answer:
    """The same by vLLM, which makes batches of its own."""
    from finetune.data.chat.tokenizer import local_folder
    from finetune.generation.load import base_of
    from finetune.generation.vllm import open_vllm

    config = local_folder(*base_of(work.target, work.base)) / "config.json"
    settings = SimpleNamespace(**json.loads(config.read_text(encoding="utf-8")))
    _check_context(SimpleNamespace(config=settings), work)
    longest = max(work.lengths, default=1) + work.options.max_new_tokens
    return open_vllm(
        work.target,
        work.template,
        base=work.base,
        max_length=longest,
        max_new_tokens=work.options.max_new_tokens,
    )


def _check_context(model: Any, work: _Work) -> None:
    """DataError naming the dialogues that leave no room for a reply."""
    from finetune.generation.generate import check_context

    try:
        check_context(model, work.lengths, work.options.max_new_tokens)
    except DataError:
        names = [question.conversation.where for question in _questions(work.data)]
        check_context(model, work.lengths, work.options.max_new_tokens, names)


def as_reply(message: Message, tools: Sequence[Mapping[str, Any]]) -> Message:
    """The message, its first line a function's name only where a function can be meant.

    Without tools, or where the line is no name, the whole reply is text.
    """
    if not message.metadata or (tools and FUNCTION_NAME.fullmatch(message.metadata)):
        return message
    return Message("assistant", f"{message.metadata}\n{message.content}")


def reply_messages(
    ids: Sequence[int], template: ChatTemplate, tools: Sequence[Mapping[str, Any]]
) -> list[Message]:
    """The messages that generated ids hold: one, or several calls of one turn."""
    assistant = template.tokenizer.control_ids["<|assistant|>"]
    messages: list[Message] = []
    rest = list(ids)
    while not messages or (rest and messages[-1].metadata):
        end = rest.index(assistant) if assistant in rest else len(rest)
        messages.append(as_reply(template.parse(rest[:end]), tools))
        rest = rest[end + 1 :]
    return messages


def message_json(message: Message) -> dict[str, Any]:
    """The message as rows of the `messages` layout hold it."""
    plain: dict[str, Any] = {"role": message.role}
    if message.metadata:
        plain["metadata"] = message.metadata
    plain["content"] = message.content
    if message.image:
        plain["image"] = message.image
    return plain


class Journal:
    """The lines so far, kept in `<output>.part` until all are there.

    The first process reads and writes; `<output>.part.json` says what the lines answer to.
    """

    def __init__(self, output: Path, identity: str) -> None:
        self.output = output
        self.part = output.with_name(output.name + ".part")
        self._label = output.with_name(output.name + ".part.json")
        self._identity = identity

    def open(self) -> list[bool]:
        """Whether each reply stopped, of the lines that are there and belong to this very command."""
        self.part.parent.mkdir(parents=True, exist_ok=True)
        try:
            known = json.loads(self._label.read_text(encoding="utf-8"))["identity"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            known = None
        if known != self._identity or not self.part.is_file():
            self.part.write_bytes(b"")
            self._label.write_text(json_line({"identity": self._identity}), encoding="utf-8")
            return []
        stopped, whole = [], 0
        with self.part.open("rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                stopped.append(bool(json.loads(line)["stopped"]))
                whole += len(line)
            file.truncate(whole)
        return stopped

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines; they are on the disk when this returns."""
        with self.part.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(map(json_line, rows))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Gives the file its name."""
        self.part.replace(self.output)
        self._label.unlink()


def _answer_all(work: _Work, journal: Journal, answer: Answer) -> dict[str, Any]:
    from finetune.distributed.map_batches import from_the_first, place

    total, options, template = len(work.lengths), work.options, work.template
    leads = place()[0] == 0
    stopped = from_the_first(journal.open if leads else None)
    if stopped:
        console.say(
            f"{len(stopped)} of {total} dialogues are answered already; going on behind them"
        )
    questions = islice(_questions(work.data), len(stopped), None)
    while window := list(islice(questions, options.batch_size * BATCHES_PER_WINDOW)):
        replies = answer(template.prompts(window))
        stopped += [reply.stopped for reply in replies]
        if leads:
            pairs = zip(window, replies, strict=True)
            journal.append(_row(question, reply, template) for question, reply in pairs)
        if total > len(stopped):
            console.say(f"{len(stopped)} of {total} dialogues answered")
    if leads:
        journal.finish()
    cut = stopped.count(False)
    console.say(
        f"{total} replies in {journal.output}"
        + (f"; {cut} were cut at {options.max_new_tokens} tokens" if cut else "")
    )
    return {"output": str(journal.output), "replies": total, "cut": cut}


def _row(question: Question, reply: Reply, template: ChatTemplate) -> dict[str, Any]:
    conversation = question.conversation
    new = reply_messages(reply.ids, template, conversation.tools)
    messages = [*conversation.messages[: question.reply], *new]
    row: dict[str, Any] = {
        "where": conversation.where,
        "messages": [message_json(message) for message in messages],
    }
    if conversation.tools:
        row["tools"] = list(conversation.tools)
    if calls := [message for message in new if message.metadata]:
        row["tool_calls"] = [
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {"name": call.metadata, "arguments": call.content},
            }
            for number, call in enumerate(calls)
        ]
    return row | {"stopped": reply.stopped}


def _questions(data: Sequence[str], images: Images = BESIDE) -> Iterator[Question]:
    """The dialogues with the place where a reply is wanted: their end, before a reply that is there."""
    sources = [SourceSpec(path) for path in data]
    for conversation in read_conversations(sources, Reading(images=images), purpose="predict"):
        end = len(conversation.messages)
        while end and conversation.messages[end - 1].role == "assistant":
            end -= 1
        yield Question(conversation, end)


def _prompt_lengths(data: Sequence[str], template: ChatTemplate) -> list[int]:
    lengths: list[int] = []
    questions = _questions(data, Images(check=True))
    while batch := list(islice(questions, 1000)):
        lengths += map(len, template.prompts(batch))
    return lengths


def _identity(target: str, data: Sequence[str], base: str | None, options: PredictOptions) -> str:
    """Changes when the same command would give other lines."""
    files = [file for path in data for file in expand(path)]
    if (folder := Path(target)).is_dir():
        files += sorted(file for file in folder.iterdir() if file.is_file())
    stated = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((target, base, options, stated)).encode()).hexdigest()
