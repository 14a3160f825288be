"""Dialogues in, replies out: one JSON line per dialogue, in their order.

    {"where": "in.jsonl:3", "messages": [..., {"role": "assistant", "content": "..."}], "stopped": true}

The last messages are the reply; everything before them is what the model was given. A reply that
calls functions brings them in OpenAI's form too, as "tool_calls". Of a dialogue that ends with a reply
that reply is the "reference". Several replies to a dialogue follow each other, "reply": 0, 1, ... Lines are kept while they come:
`<output>.part` grows window by window, and the same command after a crash goes on behind them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from finetune import console
from finetune.errors import ConfigError, DataError
from finetune.generation.dialogues import Dialogues, Measured, RowOptions
from finetune.generation.load import GREEDY, HERE, Placement, Sampling
from finetune.generation.messages import reply_row
from finetune.generation.prompts import window_size
from finetune.generation.replies import Answering, Backend, answered
from finetune.generation.structured import ANY_FORM, Form
from finetune.storage.files import file_digest
from finetune.storage.journal import ResumableOutput, rows
from finetune.storage.outputs import check_output

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate
    from finetune.generation.prompts import ReplyPrompt

HASHED_WHOLE = 256 << 20
"""Bytes up to which a file of the model is told from another one by its content."""


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """How replies are generated."""

    max_new_tokens: int = 512
    batch_size: int = 64
    backend: Literal["transformers", "vllm"] = "transformers"
    rows: RowOptions = field(default_factory=RowOptions)
    form: Form = ANY_FORM
    """What every reply must be."""
    placement: Placement = HERE
    sampling: Sampling = GREEDY
    seed: int = 0
    """Of drawn tokens."""
    num_replies: int = 1
    """To each dialogue."""

    def check(self) -> None:
        """Raises ConfigError for what does not go together."""
        if self.num_replies > 1 and not self.sampling.temperature:
            raise ConfigError(
                f"{self.num_replies} greedy replies to a dialogue are all the same; add --temperature, or ask for one"
            )
        away = {
            "--json-schema and --require-call": self.form != ANY_FORM,
            "--device-map and --quantization": self.placement != HERE,
            "sampling and --num-replies": self.sampling != GREEDY,
        }
        for what, is_asked in away.items():
            if self.backend == "vllm" and is_asked:
                raise ConfigError(
                    f"{what} go with --backend transformers; choose that, or leave them out"
                )


class _Work(NamedTuple):
    """What one call of `predict` is about."""

    target: str
    base: str | None
    options: PredictOptions
    dialogues: Dialogues
    template: ChatTemplate
    measured: Measured


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
    from finetune.generation.load import open_template

    dialogues = Dialogues(data, options.rows.section(target))
    read = [*dialogues.files, *(path for path in map(Path, data) if path.is_dir())]
    inputs = [*read, *_files_of(target), *(_files_of(base) if base else [])]
    check_output(output, inputs, overwrite=overwrite, is_ours=_is_output)
    template = open_template(target, base=base)
    options.check()
    options.form.check(template)
    work = _Work(target, base, options, dialogues, template, dialogues.measured(template))
    window = window_size(options.batch_size)
    part = ResumableOutput(output, _identity(work), window=window, overwrite=overwrite)
    with closing(part), _backend(work) as backend:
        return _answer_all(work, part, backend)


@contextmanager
def _backend(work: _Work) -> Iterator[Backend]:
    """What generates: vLLM, or our own generation on all processes together."""
    from finetune.generation.generate import Generator, context_length

    options = work.options
    if options.backend == "vllm":
        from finetune.generation.backends.vllm import VllmGenerator, context_of

        _check_context(context_of(work.target, work.base), work)
        generator = VllmGenerator(
            work.target,
            work.template,
            base=work.base,
            max_length=max(work.measured.lengths, default=1) + options.max_new_tokens,
            max_new_tokens=options.max_new_tokens,
        )
        with closing(generator):
            yield generator
        return
    from finetune.distributed.processes import joined_processes
    from finetune.generation.load import open_model

    with joined_processes():
        opened = open_model(work.target, base=work.base, placement=work.options.placement)
        _check_context(context_length(opened.model), work)
        yield Generator(
            opened.model,
            opened.template,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
        )


def _check_context(limit: int | None, work: _Work) -> None:
    """DataError naming the dialogues that leave no room for a reply."""
    from finetune.generation.generate import check_context

    try:
        check_context(limit, work.measured.lengths, work.options.max_new_tokens)
    except DataError:
        names = [prompt.location for prompt in work.dialogues.prompts(work.template)]
        check_context(limit, work.measured.lengths, work.options.max_new_tokens, names)


def _answer_all(work: _Work, part: ResumableOutput, backend: Backend) -> dict[str, Any]:
    from finetune.distributed.processes import broadcast_from_rank0, is_rank0

    options = work.options
    total = len(work.measured.lengths) * options.num_replies
    stopped = broadcast_from_rank0(partial(part.open, _stopped))
    if stopped:
        console.say(f"{len(stopped)} of {total} replies are there already; resuming behind them")
    how = Answering(
        work.template, options.batch_size, part.journal,
        options.sampling, options.seed, options.form,
    )  # fmt: skip
    prompts = _each_several_times(work.dialogues.prompts(work.template), options.num_replies)
    for window in answered(backend, prompts, how, behind=len(stopped), total=total):
        begin = len(stopped)
        stopped += [reply.stopped for _, reply in window]
        part.journal.append(
            reply_row(prompt, reply) | _number(begin + place, options.num_replies)
            for place, (prompt, reply) in enumerate(window)
        )
        if total > len(stopped):
            console.say(f"{len(stopped)} of {total} replies written")
    stopped = broadcast_from_rank0(lambda: stopped)
    if is_rank0():
        work.measured.seen.check(
            [*work.dialogues.files, *work.measured.seen.states], "they were answered"
        )
        part.finish()
    cut = stopped.count(False)
    console.say(
        f"{total} replies in {part.output}"
        + (f"; {cut} were cut at {options.max_new_tokens} tokens" if cut else "")
    )
    return {"output": str(part.output), "replies": total, "cut": cut}


def _each_several_times(prompts: Iterable[ReplyPrompt], times: int) -> Iterator[ReplyPrompt]:
    for prompt in prompts:
        yield from repeat(prompt, times)


def _number(place: int, num_replies: int) -> dict[str, int]:
    """Which reply to its dialogue the one at this place is, where there are several."""
    return {"reply": place % num_replies} if num_replies > 1 else {}


def _stopped(row: Mapping[str, Any]) -> bool:
    return bool(row["stopped"])


def _identity(work: _Work) -> str:
    """Changes when the same command would give other lines."""
    model = []
    for file in _files_of(work.target):
        found = file.stat()
        is_small = found.st_size <= HASHED_WHOLE
        model.append(
            (str(file), file_digest(file) if is_small else found.st_mtime_ns, found.st_size)
        )
    data = [(str(file), *state) for file, state in work.measured.seen.states.items()]
    stated = (work.target, work.base, work.options, model, data)
    return hashlib.sha256(repr(stated).encode()).hexdigest()


def _files_of(target: str) -> list[Path]:
    """The files of a model folder; none for a hub id."""
    folder = Path(target)
    return sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []


def _is_output(file: Path) -> bool:
    """Whether an earlier call wrote this file."""
    row = next(rows(file), None)
    return isinstance(row, dict) and {"where", "messages", "stopped"} <= set(row)
