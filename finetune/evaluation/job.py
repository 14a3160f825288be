"""Held-out dialogues -> prompts -> replies and losses of one model, kept so that none is made twice.

`build_prompts` and `predict_windows` serve evaluation during training too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune import console
from finetune.artifacts.resolve import model_base
from finetune.config.schema import EvaluationSection
from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Conversation
from finetune.data.examples.collate import Collator
from finetune.data.examples.dataset import PreparedDataset, load_examples
from finetune.data.reading.files import expand
from finetune.data.reading.section import sources_of
from finetune.data.reading.sources import SourceSpec, read_conversations
from finetune.distributed import hardware
from finetune.errors import NonFiniteError
from finetune.evaluation import store
from finetune.evaluation.predictions import Prediction, predicted
from finetune.evaluation.scores.added import ByModels
from finetune.evaluation.scoring import Scoring, versions
from finetune.evaluation.store import Results
from finetune.evaluation.targets import Target
from finetune.evaluation.tasks import harness, plan
from finetune.evaluation.tasks.table import TaskTable
from finetune.generation.prompts import PromptCounts, PromptStream, ReplyPrompt, ReplyPrompts
from finetune.generation.settings import Settings, settings_of
from finetune.generation.structured import ANY_FORM, Form
from finetune.storage.cache import key_of
from finetune.storage.seen import SeenFiles

if TYPE_CHECKING:
    from finetune.distributed.map_batches import Poll
    from finetune.generation.generate import Extras

GENERATING = ("torch", "transformers", "peft", "tokenizers")
"""Packages that decide a model's replies."""


BATCHES_PER_WINDOW = 64
"""Batches whose prompts are sorted by length together, and whose replies are kept together."""


@dataclass(frozen=True, slots=True)
class Options:
    """What an evaluation does besides asking the models for replies."""

    with_base: bool = False
    """Score the untuned model too."""
    predictions: tuple[str, ...] = ()
    """Files of replies made elsewhere."""
    scoring: Scoring = field(default_factory=Scoring)
    by_models: ByModels = field(default_factory=ByModels)
    """Scores that other models give."""
    general: tuple[str, ...] = ()
    """Files of a general set whose loss tells what was forgotten."""
    tasks: tuple[str, ...] = ()
    """Public tasks, as `finetune.evaluation.tasks.plan` spells them."""
    tasks_data: str | None = None
    """A folder with the data sets of tasks."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    seed: int = 0
    """Of sampled replies."""
    form: Form = ANY_FORM
    """What every reply must be."""
    overwrite: bool = False
    """Replace files in the output folder that this program did not write, too."""

    @property
    def decoding(self) -> str:
        """How tokens are chosen, in words."""
        sampled = f"temperature {self.temperature}, seed {self.seed}"
        words = [sampled if self.temperature else "greedy", str(self.form)]
        return ", ".join(filter(None, words))


@dataclass(frozen=True)
class EvaluationJob:
    """One model, what it is asked, and where its replies are kept."""

    target: Target
    settings: Settings
    options: Options
    template: ChatTemplate
    losses: Mapping[str, PreparedDataset]
    """Examples whose loss is taken, by the name under which `results` keeps it."""
    results: Results
    seen: SeenFiles
    """The held-out files and their images, as they were when they were read first."""

    @property
    def base(self) -> str:
        """The model that an adapter is opened on; of a whole model, itself."""
        return model_base(self.target.path, self.target.base).path

    @property
    def general_name(self) -> str:
        """The name under which the loss on the general set is kept."""
        return _general_name(self.options)

    @property
    def tasks_name(self) -> str:
        """The name under which the scores of tasks are kept."""
        names = [asdict(task) for task in plan.read_tasks(self.options.tasks)]
        asked = {"tasks": names, "most": self.settings.evaluation.max_samples, "format": 2}
        return f"tasks-{key_of(asked)[:16]}"

    @property
    def is_done(self) -> bool:
        """Nothing is missing."""
        there = all(self.results.losses(name) is not None for name in self.losses)
        asked = not self.options.tasks or self.results.note(self.tasks_name) is not None
        return there and asked and self.results.facts is not None


def prepare(target: Target, settings: Settings, options: Options) -> EvaluationJob:
    """What is to be done for one model; what is wrong with the request is found here, without torch.

    Raises:
        ConfigError, DataError, ModelError: It cannot be done.
    """
    from finetune.generation.load import open_template

    harness.check_harness(options.tasks)
    template = open_template(target.path, base=target.base)
    options.form.check(template)
    root = Path(settings.data.cache_dir) if settings.data.cache_dir else None
    sources = settings.sources
    losses = {"loss": _examples(sources, template, settings)} if sources else {}
    if options.general:
        general = sources_of(settings.data, options.general)
        losses[_general_name(options)] = _examples(general, template, settings)
    seen = SeenFiles.of(_files(settings, template))
    key: dict[str, Any] = {
        "format": store.FORMAT,
        "model": store.model_key(target.path, target.base),
        "data": [(str(file), digest) for file, (_, digest) in seen.states.items()],
        "sources": [asdict(source) for source in settings.sources],
        "reading": asdict(settings.reading),
        "asked": request(settings, options),
        "loss": [settings.loss_batch_size, settings.seed],
        "number format": [settings_of(target.like or target.path).dtype, hardware.likely_kind()],
        "versions": versions(GENERATING),
    }
    if key["model"] is None:  # a hub id: what it stands for may change
        key["process"] = time.time_ns()
    return EvaluationJob(
        target, settings, options, template, losses, Results(root, key_of(key)), seen
    )


def _files(settings: Settings, template: ChatTemplate) -> list[Path]:
    """The held-out files, and the images that they show."""
    files = [file for source in settings.sources for file in expand(source.path)]
    if template.image is None:
        return files
    dialogues = read_conversations(settings.sources, settings.reading)
    images = (m.image for one in dialogues for m in one.messages if m.image)
    return [*files, *map(Path, dict.fromkeys(images))]


def request(settings: Settings, options: Options) -> dict[str, Any]:
    """What decides the replies and losses of given weights."""
    section = settings.evaluation
    names = ("generate", "replies", "max_new_tokens", "max_samples", "batch_size")
    return {
        "data": [source.path for source in settings.sources],
        "decoding": options.decoding,
        **{name: getattr(section, name) for name in names},
        **asdict(settings.policy),
    }


def run(jobs: Sequence[EvaluationJob]) -> None:
    """Fills the results that are not there yet, on all processes together; loads every base once."""
    missing = [job for job in jobs if not job.is_done]
    for job in jobs:
        if job not in missing:
            console.say(f"{job.target.name}: evaluated before, kept in {job.results.folder}")
    if not missing:
        return
    from finetune.distributed.processes import is_rank0, joined_processes
    from finetune.generation.load import Models

    with joined_processes():
        leads = is_rank0()
        models = Models()
        for job in missing:
            opened = models.open(job.target.path, base=job.target.base, like=job.target.like)
            console.say(f"{job.target.name}: {job.target.path}")
            with job.results.locked() if leads else nullcontext():
                _ask_tasks(job, opened.model)
                _measure_losses(job, opened.model, leads)
                _generate_replies(job, opened.model, leads)


def _measure_losses(job: EvaluationJob, model: Any, leads: bool) -> None:
    from finetune.distributed.processes import broadcast_from_rank0
    from finetune.evaluation.loss import validation_loss

    collate = Collator(job.template.pad_id, image=job.template.image)
    for name, examples in job.losses.items():
        if broadcast_from_rank0(partial(job.results.losses, name)) is not None:
            continue
        found = validation_loss(model, examples, collate, batch_size=job.settings.loss_batch_size)
        if not np.isfinite(found.losses).all():
            raise NonFiniteError(
                f"{job.target.path}: the loss on {np.sum(~np.isfinite(found.losses))} of "
                f"{len(found.losses)} held-out examples is NaN or infinite; its weights (or model.dtype "
                "float16) are the likely cause; check them, or evaluate another checkpoint"
            )
        if leads:
            job.results.write_losses(name, found.losses, found.weights)


def _generate_replies(job: EvaluationJob, model: Any, leads: bool) -> None:
    from finetune.distributed.processes import broadcast_from_rank0
    from finetune.generation.generate import Extras, Sampling, context_length

    section, results, options = job.settings.evaluation, job.results, job.options
    begun = time.perf_counter()
    if broadcast_from_rank0(lambda: results.facts) is not None:
        return
    size = section.batch_size * BATCHES_PER_WINDOW
    number = begin = broadcast_from_rank0(partial(results.num_kept, size))
    if begin:
        console.say(f"{begin} replies are there already; going on behind them")

    def extras_at(first: int, window: Sequence[ReplyPrompt]) -> Extras:
        temperature, seed = options.temperature, options.seed
        sampling = Sampling(temperature, seed, begin + first) if temperature else None
        tools = [prompt.tools for prompt in window]
        constraint_at = options.form.constraint_at(job.template, tools)
        return Extras(sampling, results.log(begin + first), constraint_at)

    if section.generate and job.settings.sources:
        reading = job.settings.reading.for_checkpoint(thinks=job.template.layout.thinking)
        dialogues = read_conversations(job.settings.sources, reading)
        prompts = prompt_stream(dialogues, job.template, section, context_length(model))
        for _ in islice(prompts, begin):
            pass
        for window in predict_windows(model, job.template, prompts, section, extras_at=extras_at):
            if leads:
                results.append(window)
                results.log(number).forget()
            number += len(window)
        _say_counts(prompts.counts)
    if leads:
        seconds = time.perf_counter() - begun
        job.seen.check(_files(job.settings, job.template), "they were evaluated")
        results.finish({"seconds": seconds, "dtype": str(model.dtype), "replies": number})


def _ask_tasks(job: EvaluationJob, model: Any) -> None:
    if not job.options.tasks or job.results.note(job.tasks_name) is not None:
        return
    from finetune.evaluation.tasks import calls

    section, tasks = job.settings.evaluation, plan.read_tasks(job.options.tasks)
    asking = harness.Asking(section.batch_size, section.max_samples, job.options.tasks_data)
    scores = harness.run_tasks(model, job.template, tasks, asking)
    for task in tasks:
        if task.kind == "calls":
            scores |= calls.ask(
                model,
                job.template,
                Path(task.name),
                batch_size=section.batch_size,
                max_samples=section.max_samples,
            )
    job.results.write_note(job.tasks_name, TaskTable(scores).note)


def _examples(
    sources: Sequence[SourceSpec], template: ChatTemplate, settings: Settings
) -> PreparedDataset:
    return load_examples(
        sources,
        template,
        settings.policy,
        reading=settings.reading,
        seed=settings.seed,
        cache_root=Path(settings.data.cache_dir) if settings.data.cache_dir else None,
    )


def _general_name(options: Options) -> str:
    return f"general-{key_of({'data': store.data_key(options.general)})[:16]}"


def build_prompts(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    section: EvaluationSection,
    *,
    positions: int | None,
) -> ReplyPrompts:
    """The prompts that `section` asks for, the same in training and afterwards; says what is left out.

    Args:
        conversations: the held-out dialogues.
        template: the checkpoint's.
        section: which replies, how many, and how long they may be.
        positions: `context_length(model)`; a prompt that leaves no room for a reply loses its
            oldest turns.
    """
    stream = prompt_stream(conversations, template, section, positions)
    prompts = ReplyPrompts(list(stream), stream.counts)
    _say_counts(prompts.counts)
    return prompts


def prompt_stream(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    section: EvaluationSection,
    positions: int | None,
) -> PromptStream:
    """The prompts of `build_prompts`, one after another; what is left out is counted and not yet said."""
    return PromptStream(
        conversations,
        template,
        replies=section.replies,
        max_prompt=None if positions is None else positions - section.max_new_tokens,
        max_samples=section.max_samples,
    )


def predict_windows(
    model: Any,
    template: ChatTemplate,
    prompts: Iterator[ReplyPrompt],
    section: EvaluationSection,
    *,
    should_stop: Poll | None = None,
    extras_at: Callable[[int, Sequence[ReplyPrompt]], Extras] | None = None,
) -> Iterator[list[Prediction]]:
    """The replies to `prompts` window by window, in their order, on every process.

    Memory holds one window. What a window is depends on `section.batch_size` alone, so that the
    same prompts are generated in the same batches wherever this runs. `extras_at` is given the
    number of a window's first prompt, and the window.
    """
    from finetune.generation.generate import Extras, check_context, generate

    first = 0
    while window := list(islice(prompts, section.batch_size * BATCHES_PER_WINDOW)):
        ids = [prompt.prompt_ids for prompt in window]
        names = [f"{prompt.where} message {prompt.index + 1}" for prompt in window]
        check_context(model, [len(one) for one in ids], section.max_new_tokens, names)
        replies = generate(
            model,
            template,
            ids,
            max_new_tokens=section.max_new_tokens,
            batch_size=section.batch_size,
            should_stop=should_stop,
            extras=extras_at(first, window) if extras_at else Extras(),
        )
        first += len(window)
        yield [
            predicted(prompt, reply.ids, reply.stopped, template)
            for prompt, reply in zip(window, replies, strict=True)
        ]


def _say_counts(counts: PromptCounts) -> None:
    """What was left out, and why."""
    if counts.sampled < counts.replies:
        console.say(
            f"generating {counts.sampled} of {counts.replies} replies, always the same ones"
        )
    if counts.shortened:
        console.say(f"{counts.shortened} prompts lost their oldest turns to fit into the context")
    if counts.dropped:
        named = "".join(f"\n  {line}" for line in counts.named)
        console.warn(f"{counts.dropped} prompts do not fit into the context, left out:{named}")
