"""Dialogues in, replies out: one JSON line per dialogue, in their order.

    {"where": "in.jsonl:3", "messages": [..., {"role": "assistant", "content": "..."}], "stopped": true}

The last messages are the reply; everything before them is what the model was given. A reply that
calls functions brings them in OpenAI's form too, as "tool_calls". Lines are kept while they come:
`<output>.part` grows window by window, and the same command after a crash goes on behind them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from finetune import console
from finetune.artifacts.model_config import read_model_config
from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.plain_files import read_json
from finetune.artifacts.resolve import TOKENIZER_FILES, is_folder, local_folder, model_base
from finetune.config.row_formats import RowFormat
from finetune.config.schema import DataSection
from finetune.data.dialogue.columns import Columns
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.data.reading.files import expand
from finetune.data.reading.section import ROW_OPTIONS, reading_of, sources_of, with_rows
from finetune.data.reading.sources import read_conversations
from finetune.errors import ConfigError, DataError
from finetune.generation.settings import settings_of
from finetune.generation.stream import FUNCTION_NAME
from finetune.generation.structured import ANY_FORM, Form
from finetune.storage.files import file_digest
from finetune.storage.journal import ResumableOutput, rows
from finetune.storage.outputs import check_output
from finetune.storage.seen import SeenFiles

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate
    from finetune.generation.generate import Reply

    Answer: TypeAlias = Callable[[list[list[int]], list["Question"]], list[Reply]]

Backend = Literal["transformers", "vllm"]

HASHED_WHOLE = 256 << 20
"""Bytes up to which a file of the model is told from another one by its content."""
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
    batch_size: int = 64
    backend: Backend = "transformers"
    columns: Columns | None = None
    """Names of the prompt and response columns; by default those of the run."""
    format: RowFormat = "auto"
    image_root: str | None = None
    """The folder that images' paths are relative to; by default the data file's own."""
    rows: tuple[str, ...] = ()
    """Other options of the data section about rows, as `name=value`."""
    form: Form = ANY_FORM
    """What every reply must be."""


class _Work(NamedTuple):
    """What one call of `predict` is about."""

    target: str
    data: Sequence[str]
    base: str | None
    options: PredictOptions
    rows: DataSection
    template: ChatTemplate
    lengths: Sequence[int]
    """Tokens of every prompt."""
    seen: SeenFiles
    """The data and its images, as they were when the prompts were counted."""


def predict(
    target: str,
    data: Sequence[str],
    output: Path,
    *,
    base: str | None = None,
    options: PredictOptions = PredictOptions(),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the model's reply to every dialogue of `data` to `output`; returns counts.

    Args:
        target: what `open_model` opens.
        data: files, globs or folders of dialogues; a reply at a dialogue's end is left out.
        output: a JSONL file; takes its name only when all of it is there.
        base: the adapter's base where its own record is out of date.
        options: how replies are generated.
        overwrite: whether `output` may be a file that this program did not write.

    Raises:
        ConfigError: a library is not installed, a schema is none, or `output` may not be written.
        DataError: rows are no dialogues, or leave no room for a reply, before anything is generated;
            or the data changed meanwhile.
        ModelError: `target` cannot be opened.
        OutputInUseError: another process writes `output`.
    """
    from finetune.distributed.processes import joined_processes
    from finetune.generation.load import open_template

    read = [*_files(data), *(path for path in map(Path, data) if path.is_dir())]
    inputs = [*read, *_files_of(target), *(_files_of(base) if base else [])]
    check_output(output, inputs, overwrite=overwrite, is_ours=_is_output)
    template = open_template(target, base=base)
    if options.backend == "vllm" and options.form != ANY_FORM:
        raise ConfigError("--json-schema and --require-call go with --backend transformers")
    options.form.check(template)
    # Reads every row once, so that bad ones show now.
    rows = _rows(target, options)
    lengths, images = _prompt_lengths(data, rows, template)
    seen = SeenFiles.of([*_files(data), *images])
    work = _Work(target, data, base, options, rows, template, lengths, seen)
    identity = _identity(work)
    journal = ResumableOutput(output, identity, overwrite=overwrite)
    with closing(journal):
        if options.backend == "vllm":
            return _answer_all(work, journal, _by_vllm(work))
        with joined_processes():
            return _answer_all(work, journal, _by_transformers(work))


def _by_transformers(work: _Work) -> Answer:
    """Prompts -> replies by our own generation, on all processes together."""
    from finetune.generation.generate import Extras, generate
    from finetune.generation.load import open_model

    opened = open_model(work.target, base=work.base)
    _check_context(opened.model, work)

    def answer(prompts: list[list[int]], questions: list[Question]) -> list[Reply]:
        tools = [question.conversation.tools for question in questions]
        return generate(
            opened.model,
            opened.template,
            prompts,
            max_new_tokens=work.options.max_new_tokens,
            batch_size=work.options.batch_size,
            extras=Extras(constraint_at=work.options.form.constraint_at(opened.template, tools)),
        )

    return answer


def _by_vllm(work: _Work) -> Answer:
    """The same by vLLM, which makes batches of its own."""
    from finetune.generation.vllm import open_vllm

    weights = model_base(work.target, work.base)
    folder = local_folder(weights.path, weights.revision, files=TOKENIZER_FILES)
    is_here = is_folder(weights.path)  # of a hub id only the small files are
    values = read_model_config(folder) if is_here else read_json(folder / MODEL_CONFIG)
    settings = SimpleNamespace(**values)
    _check_context(SimpleNamespace(config=settings), work)
    longest = max(work.lengths, default=1) + work.options.max_new_tokens
    answer = open_vllm(
        work.target,
        work.template,
        base=work.base,
        max_length=longest,
        max_new_tokens=work.options.max_new_tokens,
    )
    return lambda prompts, _: answer(prompts)


def _check_context(model: Any, work: _Work) -> None:
    """DataError naming the dialogues that leave no room for a reply."""
    from finetune.generation.generate import check_context

    try:
        check_context(model, work.lengths, work.options.max_new_tokens)
    except DataError:
        names = [question.conversation.where for question in _questions(work.data, work.rows)]
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


def _answer_all(work: _Work, journal: ResumableOutput, answer: Answer) -> dict[str, Any]:
    from finetune.distributed.processes import broadcast_from_rank0, is_rank0

    total, options, template = len(work.lengths), work.options, work.template
    leads = is_rank0()
    stopped = broadcast_from_rank0(partial(journal.open, _stopped))
    if stopped:
        console.say(
            f"{len(stopped)} of {total} dialogues are answered already; resuming behind them"
        )
    questions = islice(_questions(work.data, work.rows), len(stopped), None)
    while window := list(islice(questions, options.batch_size * BATCHES_PER_WINDOW)):
        replies = answer(template.prompts(window), window)
        stopped += [reply.stopped for reply in replies]
        if leads:
            pairs = zip(window, replies, strict=True)
            journal.append(_row(question, reply, template) for question, reply in pairs)
        if total > len(stopped):
            console.say(f"{len(stopped)} of {total} dialogues answered")
    if leads:
        work.seen.check([*_files(work.data), *work.seen.states], "they were answered")
        journal.finish()
    cut = stopped.count(False)
    console.say(
        f"{total} replies in {journal.output}"
        + (f"; {cut} were cut at {options.max_new_tokens} tokens" if cut else "")
    )
    return {"output": str(journal.output), "replies": total, "cut": cut}


def _stopped(row: Mapping[str, Any]) -> bool:
    return bool(row["stopped"])


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


def _rows(target: str, options: PredictOptions) -> DataSection:
    """What rows are like: for a run's checkpoint as its training data's, but for their layout."""
    trained = settings_of(target).data
    kept = {name: getattr(trained, name) for name in ("columns", *ROW_OPTIONS)}
    return with_rows(
        DataSection(train=[], **kept),
        columns=options.columns,
        format=options.format,
        image_root=options.image_root,
        options=options.rows,
    )


def _questions(
    data: Sequence[str], rows: DataSection, *, check_images: bool = False
) -> Iterator[Question]:
    """The dialogues with the place where a reply is wanted: their end, before a reply that is there."""
    reading = reading_of(rows)
    reading = replace(reading, images=replace(reading.images, check=check_images))
    for conversation in read_conversations(sources_of(rows, data), reading, purpose="predict"):
        end = len(conversation.messages)
        while end and conversation.messages[end - 1].role == "assistant":
            end -= 1
        yield Question(conversation, end)


def _prompt_lengths(
    data: Sequence[str], rows: DataSection, template: ChatTemplate
) -> tuple[list[int], list[Path]]:
    """Tokens of every prompt, and the images that prompts show."""
    lengths: list[int] = []
    images: dict[str, None] = {}
    questions = _questions(data, rows, check_images=True)
    while batch := list(islice(questions, 1000)):
        lengths += map(len, template.prompts(batch))
        messages = (message for question in batch for message in question.conversation.messages)
        images |= dict.fromkeys(message.image for message in messages if message.image)
    return lengths, [Path(image) for image in images]


def _identity(work: _Work) -> str:
    """Changes when the same command would give other lines."""
    model = []
    for file in _files_of(work.target):
        found = file.stat()
        is_small = found.st_size <= HASHED_WHOLE
        model.append(
            (str(file), file_digest(file) if is_small else found.st_mtime_ns, found.st_size)
        )
    data = [(str(file), *state) for file, state in work.seen.states.items()]
    stated = (work.target, work.base, work.options, model, data)
    return hashlib.sha256(repr(stated).encode()).hexdigest()


def _files(data: Sequence[str]) -> list[Path]:
    return [file for path in data for file in expand(path)]


def _files_of(target: str) -> list[Path]:
    """The files of a model folder; none for a hub id."""
    folder = Path(target)
    return sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []


def _is_output(file: Path) -> bool:
    """Whether an earlier call wrote this file."""
    row = next(rows(file), None)
    return isinstance(row, dict) and {"where", "messages", "stopped"} <= set(row)
