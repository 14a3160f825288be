"""Models and held-out dialogues -> loss, scores, comparisons and every prediction.

`evaluate_model` and `ask` serve training and the command alike; `evaluate` is the command.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.config import EvaluationSection
from finetune.data.cache import key_of
from finetune.data.collate import Collator
from finetune.data.conversation import Conversation
from finetune.data.dataset import PreparedDataset, load_examples, options_of
from finetune.data.prompts import PromptCounts, PromptStream, ReplyPrompt, ReplyPrompts
from finetune.data.sources import SourceSpec, read_conversations
from finetune.data.template import ChatTemplate
from finetune.errors import ConfigError
from finetune.evaluation import folder as evaluation_folder
from finetune.evaluation import results as kept
from finetune.evaluation.answers import Answer, answered
from finetune.evaluation.metrics import Scores
from finetune.evaluation.predictions import Prediction
from finetune.evaluation.results import Results
from finetune.evaluation.scoring import Scoring, score
from finetune.evaluation.settings import Settings, settings_of
from finetune.evaluation.table import ReplyTable
from finetune.evaluation.targets import Target, find_targets

if TYPE_CHECKING:
    from finetune.evaluation.turns import Poll

BATCHES_PER_WINDOW = 64
"""Batches whose prompts are sorted by length together, and whose answers are kept together."""


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What a model scores on a list of prompts."""

    scores: Scores
    predictions: list[Prediction]
    """In the order of the prompts."""


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
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    seed: int = 0
    """Of sampled replies."""


def ask(
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
    stream = _asked(conversations, template, section, positions)
    prompts = ReplyPrompts(list(stream), stream.counts)
    _say_counts(prompts.counts)
    return prompts


def evaluate_model(
    model: Any,
    template: ChatTemplate,
    prompts: Sequence[ReplyPrompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    should_stop: Poll | None = None,
) -> EvaluationResult:
    """Scores of the greedy replies to `prompts`; the same on every process, and for any number of them.

    Replies are asked for and scored as `evaluate` does it (law 10).

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens`; names it.
        EvaluationStoppedError: `should_stop` returned True.
    """
    table, predictions = ReplyTable(), []
    section = EvaluationSection(max_new_tokens=max_new_tokens, batch_size=batch_size)
    for window in answers(model, template, iter(prompts), section, should_stop=should_stop):
        for answer in window:
            one = score(answer, Scoring())
            table.add(one.where, one.scores, one.counts)
            predictions.append(one)
    return EvaluationResult(table.scores(), predictions)


def answers(
    model: Any,
    template: ChatTemplate,
    prompts: Iterator[ReplyPrompt],
    section: EvaluationSection,
    *,
    should_stop: Poll | None = None,
) -> Iterator[list[Answer]]:
    """The replies to `prompts` window by window, in their order, on every process.

    Memory holds one window. What a window is depends on `section.batch_size` alone, so that the
    same prompts are generated in the same batches wherever this runs.
    """
    from finetune.evaluation.generate import check_context, generate

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
        )
        yield [
            answered(prompt, reply.ids, reply.stopped, template)
            for prompt, reply in zip(window, replies, strict=True)
        ]


def evaluate(
    targets: str | Sequence[str],
    data: Sequence[str] = (),
    *,
    output: Path | None = None,
    base: str | None = None,
    changes: Mapping[str, Any] | None = None,
    options: Options = Options(),
) -> dict[str, Any]:
    """Loss and scores of models on held-out files: for checkpoints, those that their run gave them.

    Writes `evaluation.json` and the predictions of every target; for a single model `scores.json`
    and `predictions.jsonl` too. Under torchrun all processes share the work.

    Args:
        targets: models, adapters and checkpoints, as `open_model` opens them.
        data: held-out files, globs or folders; by default those of the first target's run.
        output: the folder to write into; by default one beside the first target.
        base: the adapters' base where their own records are out of date.
        changes: fields of EvaluationSection that win over the run's; None counts as not said.
        options: what else is asked for.

    Raises:
        ConfigError, DataError, ModelError: before anything is generated.
    """
    models = [targets] if isinstance(targets, str) else list(targets)
    found = find_targets(models, options.predictions, base=base, with_base=options.with_base)
    if not found:
        raise ConfigError("there is nothing to evaluate; name a model, or files with --predictions")
    # What can be wrong with the request is found before torch is imported.
    works = []
    whole = [target for target in found if target.kind != "predictions"]
    settings = _settings(whole, data, changes or {}) if whole else None
    if settings is not None:
        works = [_work(target, settings, options) for target in whole]
        _generate(works)
    place = output or _beside(found[0], settings)
    report = None
    if console.is_main():
        report = evaluation_folder.write(place, found, works, options)
    return report or {}


@dataclass(frozen=True)
class Work:
    """What one model is asked, and where its answers are kept."""

    target: Target
    settings: Settings
    options: Options
    template: ChatTemplate
    examples: PreparedDataset
    general: PreparedDataset | None
    results: Results

    @property
    def base(self) -> str:
        """The model that an adapter is opened on; of a whole model, itself."""
        from finetune.evaluation.open import base_of

        return base_of(self.target.path, self.target.base)[0]


def _settings(targets: Sequence[Target], data: Sequence[str], changes: Mapping[str, Any]) -> Settings:  # fmt: skip
    """Those of the run of the first checkpoint among the targets, for all of them."""
    tuned = [target for target in targets if target.kind != "base"] or targets
    return settings_of(tuned[0].path).asking(data, changes)


def _work(target: Target, settings: Settings, options: Options) -> Work:
    from finetune.evaluation.open import open_template

    template = open_template(target.path, base=target.base)
    root = Path(settings.data.cache_dir) if settings.data.cache_dir else None
    general = tuple(SourceSpec(path) for path in options.general)
    examples = _examples(settings.sources, template, settings)
    key: dict[str, Any] = {
        "format": kept.FORMAT,
        "model": kept.model_key(target.path, target.base),
        "data": kept.data_key([source.path for source in settings.sources]),
        "general": kept.data_key(options.general),
        "asked": evaluation_folder.asked(settings, options),
        "number format": [settings_of(target.like or target.path).dtype, _device_kind()],
        "versions": evaluation_folder.versions(),
    }
    if template.image is not None:
        dialogues = read_conversations(settings.sources, **options_of(settings.reading))
        shown = [m.image for one in dialogues for m in one.messages if m.image]
        key["images"] = kept.image_key(shown)
    if key["model"] is None:  # a hub id: what it stands for may change
        key["process"] = time.time_ns()
    return Work(
        target,
        settings,
        options,
        template,
        examples,
        _examples(general, template, settings) if general else None,
        Results(root, key_of(key)),
    )


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


def _generate(works: Sequence[Work]) -> None:
    """Fills the results that are not there yet; every base is loaded once."""
    missing = [work for work in works if work.results.facts is None]
    for work in works:
        if work not in missing:
            console.say(f"{work.target.name}: taken from {work.results.folder}")
    if not missing:
        return
    from finetune.evaluation.open import Models
    from finetune.evaluation.turns import joined_processes

    with joined_processes():
        models = Models()
        for work in missing:
            opened = models.open(work.target.path, base=work.target.base, like=work.target.like)
            _fill(work, opened.model)


def _fill(work: Work, model: Any) -> None:
    from contextlib import nullcontext

    from finetune.evaluation.turns import place

    leads = place()[0] == 0
    begun = time.perf_counter()
    with work.results.locked() if leads else nullcontext():
        console.say(f"{work.target.name}: {work.target.path}")
        _measure_losses(work, model, leads)
        counts = _generate_answers(work, model, leads)
        if leads:
            facts = {"seconds": time.perf_counter() - begun, "dtype": str(model.dtype), **counts}
            work.results.finish(facts)


def _measure_losses(work: Work, model: Any, leads: bool) -> None:
    from finetune.evaluation.loss import validation_loss
    from finetune.evaluation.turns import from_the_first

    collate = Collator(work.template.pad_id, image=work.template.image)
    for name, examples in (("loss", work.examples), ("general_loss", work.general)):
        there = from_the_first(partial(work.results.losses, name) if leads else None)
        if examples is None or there is not None:
            continue
        found = validation_loss(model, examples, collate, batch_size=work.settings.loss_batch_size)
        if leads:
            work.results.write_losses(name, found.losses, found.weights)


def _generate_answers(work: Work, model: Any, leads: bool) -> dict[str, Any]:
    from finetune.evaluation.generate import context_length
    from finetune.evaluation.turns import from_the_first

    section = work.settings.evaluation
    if not section.generate:
        return {}
    size = section.batch_size * BATCHES_PER_WINDOW
    there = from_the_first((lambda: work.results.num_kept(size)) if leads else None)
    dialogues = read_conversations(work.settings.sources, **options_of(work.settings.reading))
    prompts = _asked(dialogues, work.template, section, context_length(model))
    for _ in islice(prompts, there):
        pass
    if there:
        console.say(f"{there} replies are there already; going on behind them")
    for window in answers(model, work.template, prompts, section):
        if leads:
            work.results.append(window)
    _say_counts(prompts.counts)
    return {"replies": prompts.counts.sampled - prompts.counts.dropped}


def _asked(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    section: EvaluationSection,
    positions: int | None,
) -> PromptStream:
    return PromptStream(
        conversations,
        template,
        replies=section.replies,
        max_prompt=None if positions is None else positions - section.max_new_tokens,
        max_samples=section.max_samples,
    )


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


def _device_kind() -> str:
    """Where models compute, told without importing torch."""
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def _beside(target: Target, settings: Settings | None) -> Path:
    """A folder next to the target, or here when it is a hub id, named after it and the data."""
    path = Path(target.path)
    if target.kind == "predictions":
        return path.absolute().parent / f"evaluation-{path.stem}"
    place = path.absolute() if path.is_dir() else Path(path.name).absolute()
    data = Path(settings.sources[0].path).stem if settings else "data"
    return place.parent / f"evaluation-{place.name}-{data}"
