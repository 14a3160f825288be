"""A model and held-out dialogues -> loss, scores and every prediction.

`evaluate_model` and `ask` serve training and the command alike; `evaluate` is the command.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.config import EvaluationSection
from finetune.data.collate import Collator
from finetune.data.conversation import Conversation
from finetune.data.dataset import load_examples, options_of
from finetune.data.prompts import ReplyPrompt, ReplyPrompts, reply_prompts
from finetune.data.sources import read_conversations
from finetune.data.template import ChatTemplate
from finetune.evaluation import metrics
from finetune.evaluation.predictions import Prediction, whole_file, write_predictions
from finetune.evaluation.settings import Settings, settings_of

if TYPE_CHECKING:
    from finetune.evaluation.turns import Poll

PACKAGES = ("torch", "transformers", "peft", "tokenizers")
"""Whose versions are written beside the scores."""


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What a model scores on a list of prompts."""

    scores: metrics.Scores
    predictions: list[Prediction]
    """In the order of the prompts."""


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
    prompts = reply_prompts(
        conversations,
        template,
        replies=section.replies,
        max_prompt=None if positions is None else positions - section.max_new_tokens,
        max_samples=section.max_samples,
    )
    counts = prompts.counts
    if counts.sampled < counts.replies:
        console.say(
            f"generating {counts.sampled} of {counts.replies} replies, always the same ones"
        )
    if counts.shortened:
        console.say(f"{counts.shortened} prompts lost their oldest turns to fit into the context")
    if counts.dropped:
        named = "".join(f"\n  {line}" for line in counts.named)
        console.warn(f"{counts.dropped} prompts do not fit into the context, left out:{named}")
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

    The one way in which replies are scored, during training and by `finetune evaluate` (law 10).

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens`; names it.
        EvaluationStoppedError: `should_stop` returned True.
    """
    from finetune.evaluation.generate import check_context, generate

    ids = [prompt.prompt_ids for prompt in prompts]
    names = [f"{prompt.where} message {prompt.index + 1}" for prompt in prompts]
    check_context(model, [len(prompt) for prompt in ids], max_new_tokens, names)
    replies = generate(
        model,
        template,
        ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        should_stop=should_stop,
    )
    predictions = []
    for prompt, reply in zip(prompts, replies, strict=True):
        message = template.parse(reply.ids)
        pair = metrics.Pair(message, prompt.reference, reply.stopped, tuple(prompt.tools))
        predictions.append(
            Prediction(
                where=prompt.where,
                message=prompt.index,
                prompt=prompt.text,
                reference=metrics.text(prompt.reference),
                prediction=metrics.text(message),
                stopped=reply.stopped,
                scores=metrics.score_pair(pair),
            )
        )
    return EvaluationResult(metrics.mean([one.scores for one in predictions]), predictions)


def evaluate(
    target: str,
    data: Sequence[str] = (),
    *,
    output: Path | None = None,
    base: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Loss and scores of a model on held-out files: for a checkpoint, those that its run gave it.

    Writes `scores.json` and `predictions.jsonl`. Under torchrun all processes share the work.

    Args:
        target: what `open_model` opens.
        data: held-out files, globs or folders; by default those of the run.
        output: the folder to write into; by default one beside `target`.
        base: the adapter's base where its own record is out of date.
        changes: fields of EvaluationSection that win over the run's; None counts as not said.

    Raises:
        ConfigError, DataError, ModelError: before anything is generated.
    """
    from finetune.evaluation.open import open_model, open_template

    # What can be wrong with the request is found before torch is imported.
    settings = settings_of(target).asking(data, changes or {})
    template = open_template(target, base=base)
    examples = load_examples(
        settings.sources,
        template,
        settings.policy,
        reading=settings.reading,
        seed=settings.seed,
        cache_root=Path(settings.data.cache_dir) if settings.data.cache_dir else None,
    )
    folder = output or _beside(target, settings.sources[0].path)
    folder.mkdir(parents=True, exist_ok=True)
    from finetune.evaluation.loss import validation_loss
    from finetune.evaluation.turns import joined_processes

    with joined_processes():
        opened = open_model(target, base=base)
        loss = validation_loss(
            opened.model,
            examples,
            Collator(template.pad_id, image=template.image),
            batch_size=settings.loss_batch_size,
        )
        result = _generated(opened.model, template, settings)
    report = {
        "target": str(target),
        "kind": opened.kind,
        "base": opened.base,
        "scores": {"loss": loss.loss, **result.scores},
        "supervised_tokens": loss.weight,
        "replies": len(result.predictions),
        "settings": _described(settings, opened.model),
        "signature": metrics.signature(),
        "versions": {name: version(name) for name in PACKAGES},
        "output": str(folder),
    }
    if console.is_main():
        write_predictions(folder / "predictions.jsonl", result.predictions)
        with whole_file(folder / "scores.json") as file:
            file.write(json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    _say(report)
    return report


def _generated(model: Any, template: ChatTemplate, settings: Settings) -> EvaluationResult:
    section = settings.evaluation
    if not section.generate:
        return EvaluationResult({}, [])
    from finetune.evaluation.generate import context_length

    dialogues = read_conversations(settings.sources, **options_of(settings.reading))
    prompts = ask(dialogues, template, section, positions=context_length(model))
    return evaluate_model(
        model,
        template,
        prompts,
        max_new_tokens=section.max_new_tokens,
        batch_size=section.batch_size,
    )


def _described(settings: Settings, model: Any) -> dict[str, Any]:
    """What else decides the numbers."""
    section = settings.evaluation
    return {
        "data": [source.path for source in settings.sources],
        "decoding": "greedy",
        **{name: getattr(section, name) for name in ("replies", "max_new_tokens", "max_samples")},
        "batch_size": section.batch_size,
        **asdict(settings.policy),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _beside(target: str, data: str) -> Path:
    """A folder next to `target`, or here when it is a hub id, named after it and the data."""
    place = Path(target).absolute() if Path(target).is_dir() else Path(Path(target).name).absolute()
    return place.parent / f"evaluation-{place.name}-{Path(data).stem}"


def _say(report: Mapping[str, Any]) -> None:
    scores = report["scores"]
    rows = [
        (name, "-" if value is None else f"{value:.4f}" if name == "loss" else f"{value:.2f}")
        for name, value in scores.items()
    ]
    console.say(f"{report['target']}: {report['replies']} replies")
    console.table(["metric", "score"], rows)
    console.say(report["signature"])
    console.say(f"every prediction is in {report['output']}")
