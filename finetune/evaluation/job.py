"""What a model is asked in one evaluation, where its answers are kept, and the doing of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from finetune import console
from finetune.data.chat.template import ChatTemplate
from finetune.data.examples.collate import Collator
from finetune.data.examples.dataset import PreparedDataset, load_examples
from finetune.data.reading.sources import SourceSpec, read_conversations
from finetune.evaluation import asking
from finetune.evaluation import store as kept
from finetune.evaluation.harness import check_harness, run_tasks
from finetune.evaluation.scoring import Scoring
from finetune.evaluation.store import Results
from finetune.evaluation.targets import Target
from finetune.evaluation.versions import GENERATING, versions
from finetune.generation.settings import Settings, settings_of
from finetune.storage.cache import key_of


@dataclass(frozen=True, slots=True)
class Options:
    """What an evaluation does besides asking the models for replies."""

    with_base: bool = False
    """Score the untuned model too."""
    predictions: tuple[str, ...] = ()
    """Files of replies made elsewhere."""
    scoring: Scoring = field(default_factory=Scoring)
    general: tuple[str, ...] = ()
    """Files of a general set whose loss tells what was forgotten."""
    tasks: tuple[str, ...] = ()
    """What lm-evaluation-harness asks."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    seed: int = 0
    """Of sampled replies."""

    @property
    def decoding(self) -> str:
        """How tokens are chosen, in words."""
        if not self.temperature:
            return "greedy"
        return f"temperature {self.temperature}, seed {self.seed}"


@dataclass(frozen=True)
class Work:
    """One model, what it is asked, and where its answers are kept."""

    target: Target
    settings: Settings
    options: Options
    template: ChatTemplate
    losses: Mapping[str, PreparedDataset]
    """Examples whose loss is taken, by the name under which `results` keeps it."""
    results: Results

    @property
    def base(self) -> str:
        """The model that an adapter is opened on; of a whole model, itself."""
        from finetune.generation.load import base_of

        return base_of(self.target.path, self.target.base)[0]

    @property
    def general(self) -> str:
        """The name under which the loss on the general set is kept."""
        return _general_name(self.options)

    @property
    def tasks(self) -> str:
        """The name under which the scores of tasks are kept."""
        return f"tasks-{key_of({'tasks': self.options.tasks})[:16]}"

    @property
    def is_done(self) -> bool:
        """Nothing is missing."""
        there = all(self.results.losses(name) is not None for name in self.losses)
        asked = not self.options.tasks or self.results.note(self.tasks) is not None
        return there and asked and self.results.facts is not None


def plan(target: Target, settings: Settings, options: Options) -> Work:
    """The work for one model; what is wrong with the request is found here, without torch.

    Raises:
        ConfigError, DataError, ModelError: It cannot be done.
    """
    from finetune.generation.load import open_template

    check_harness(options.tasks)
    template = open_template(target.path, base=target.base)
    root = Path(settings.data.cache_dir) if settings.data.cache_dir else None
    losses = {"loss": _examples(settings.sources, template, settings)}
    if options.general:
        general = tuple(SourceSpec(path) for path in options.general)
        losses[_general_name(options)] = _examples(general, template, settings)
    key: dict[str, Any] = {
        "format": kept.FORMAT,
        "model": kept.model_key(target.path, target.base),
        "data": kept.data_key([source.path for source in settings.sources]),
        "sources": [asdict(source) for source in settings.sources],
        "reading": asdict(settings.reading),
        "asked": asked(settings, options),
        "loss": [settings.loss_batch_size, settings.seed],
        "number format": [settings_of(target.like or target.path).dtype, _device_kind()],
        "versions": versions(GENERATING),
    }
    if template.image is not None:
        dialogues = read_conversations(settings.sources, settings.reading)
        key["images"] = kept.image_key(
            m.image for one in dialogues for m in one.messages if m.image
        )
    if key["model"] is None:  # a hub id: what it stands for may change
        key["process"] = time.time_ns()
    return Work(target, settings, options, template, losses, Results(root, key_of(key)))


def asked(settings: Settings, options: Options) -> dict[str, Any]:
    """What decides the replies and losses of given weights."""
    section = settings.evaluation
    names = ("generate", "replies", "max_new_tokens", "max_samples", "batch_size")
    return {
        "data": [source.path for source in settings.sources],
        "decoding": options.decoding,
        **{name: getattr(section, name) for name in names},
        **asdict(settings.policy),
    }


def do(works: Sequence[Work]) -> None:
    """Fills the results that are not there yet, on all processes together; loads every base once."""
    missing = [work for work in works if not work.is_done]
    for work in works:
        if work not in missing:
            console.say(f"{work.target.name}: evaluated before, kept in {work.results.folder}")
    if not missing:
        return
    from finetune.distributed.processes import is_rank0, joined_processes
    from finetune.generation.load import Models

    with joined_processes():
        leads = is_rank0()
        models = Models()
        for work in missing:
            opened = models.open(work.target.path, base=work.target.base, like=work.target.like)
            console.say(f"{work.target.name}: {work.target.path}")
            with work.results.locked() if leads else nullcontext():
                _run_tasks(work, opened.model)
                _measure_losses(work, opened.model, leads)
                _generate_answers(work, opened.model, leads)


def _measure_losses(work: Work, model: Any, leads: bool) -> None:
    from finetune.distributed.processes import broadcast_from_rank0
    from finetune.evaluation.loss import validation_loss

    collate = Collator(work.template.pad_id, image=work.template.image)
    for name, examples in work.losses.items():
        if broadcast_from_rank0(partial(work.results.losses, name)) is not None:
            continue
        found = validation_loss(model, examples, collate, batch_size=work.settings.loss_batch_size)
        if leads:
            work.results.write_losses(name, found.losses, found.weights)


def _generate_answers(work: Work, model: Any, leads: bool) -> None:
    from finetune.distributed.processes import broadcast_from_rank0
    from finetune.generation.generate import Extras, Sampling, context_length

    section, results, options = work.settings.evaluation, work.results, work.options
    begun = time.perf_counter()
    if broadcast_from_rank0(lambda: results.facts) is not None:
        return
    size = section.batch_size * asking.BATCHES_PER_WINDOW
    number = begin = broadcast_from_rank0(partial(results.num_kept, size))
    if begin:
        console.say(f"{begin} replies are there already; going on behind them")

    def extras_at(first: int) -> Extras:
        temperature, seed = options.temperature, options.seed
        sampling = Sampling(temperature, seed, begin + first) if temperature else None
        return Extras(sampling, results.log(begin + first))

    if section.generate:
        dialogues = read_conversations(work.settings.sources, work.settings.reading)
        prompts = asking.asked(dialogues, work.template, section, context_length(model))
        for _ in islice(prompts, begin):
            pass
        for window in asking.answers(model, work.template, prompts, section, extras_at=extras_at):
            if leads:
                results.append(window)
                results.log(number).forget()
            number += len(window)
        asking.say_counts(prompts.counts)
    if leads:
        seconds = time.perf_counter() - begun
        results.finish({"seconds": seconds, "dtype": str(model.dtype), "replies": number})


def _run_tasks(work: Work, model: Any) -> None:
    tasks = work.options.tasks
    if not tasks or work.results.note(work.tasks) is not None:
        return
    size = work.settings.evaluation.batch_size
    work.results.write_note(work.tasks, run_tasks(model, work.base, tasks, batch_size=size))


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
    return f"general-{key_of({'data': kept.data_key(options.general)})[:16]}"


def _device_kind() -> str:
    """Where models compute, told without importing torch."""
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"
