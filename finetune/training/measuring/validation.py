"""How good the model is at this moment: validation loss and scored replies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune import console
from finetune.config.schema import EvaluationSection
from finetune.data.examples.collate import Collator
from finetune.distributed import device
from finetune.distributed.map_batches import EvaluationStoppedError
from finetune.distributed.signals import StopFlag
from finetune.errors import NonFiniteError
from finetune.evaluation.loss import Examples, validation_loss
from finetune.evaluation.model_scores import evaluate_model
from finetune.evaluation.predictions import write_predictions
from finetune.evaluation.scores.statistics import LossTable, ReplyTable
from finetune.generation.prompts import ReplyPrompt
from finetune.storage.disk import BestEffort
from finetune.training.measuring.choosing import CHOSEN, Chooser
from finetune.training.measuring.keeping import KeptData


@dataclass(frozen=True)
class Validation:
    """The held-out data, and how the model is asked about it."""

    section: EvaluationSection
    examples: Examples
    prompts: Sequence[ReplyPrompt]
    """Empty when only the loss is wanted."""
    collate: Collator
    batch_size: int
    """Examples per forward pass for the loss."""
    run_dir: Path
    stop: StopFlag
    kept: KeptData | None = None
    """What must not be lost."""
    chooser: Chooser | None = None
    """Chooses the best checkpoint, unless `best_metric` does it alone."""
    writing: BestEffort = field(
        default_factory=lambda: BestEffort("predictions", "their scores are kept")
    )

    def scores(self, model: Any, step: int) -> dict[str, float] | None:
        """Validation loss and the scores of generated replies, by name; the same in every process.

        None when the run was asked to stop meanwhile. Writes `predictions-<step>.jsonl`.
        """
        try:
            with device.preserve_rng():
                return self._measured(model, step)
        except EvaluationStoppedError:
            console.say(f"step {step}  evaluation aborted: stop requested")
            return None

    def _measured(self, model: Any, step: int) -> dict[str, float]:
        """The domain's scores, those of what must not be lost, and whether the step is chosen."""
        losses = self._losses(model)
        scores, replies = self._generated(model, step)
        scores = {name: losses.scores[name] for name in ("loss", self.section.best_metric) if name in losses.scores} | scores  # fmt: skip
        if self.kept is None:
            return scores
        kept = self.kept.measures(model, self._should_stop)
        scores |= {name: float(one.scores(one.units.sum(axis=0, keepdims=True))[0][0]) for name, one in kept.items()}  # fmt: skip
        if self.chooser is not None:
            domain = self.section.best_metric
            measure = losses.measure() if domain in losses.names else replies.measure()
            scores[CHOSEN] = float(self.chooser.chosen(step, {domain: measure, **kept}))
        return scores

    def _should_stop(self) -> bool:
        return self.stop.local_signal is not None

    def _losses(self, model: Any) -> LossTable:
        found = validation_loss(
            model,
            self.examples,
            self.collate,
            batch_size=self.batch_size,
            should_stop=self._should_stop,
        )
        if not math.isfinite(found.loss):
            raise NonFiniteError(
                f"the validation loss is {found.loss}: the weights are not finite; lower "
                "training.learning_rate and resume from the last checkpoint"
            )
        return found

    def _generated(self, model: Any, step: int) -> tuple[dict[str, float], ReplyTable]:
        table = ReplyTable()
        if not self.prompts:
            return {}, table
        result = evaluate_model(
            model,
            self.prompts,
            max_new_tokens=self.section.max_new_tokens,
            batch_size=int(self.section.batch_size),
            should_stop=self._should_stop,
        )
        if console.is_rank0():
            with self.writing():
                write_predictions(self.run_dir / f"predictions-{step}.jsonl", result.predictions)
        for one in result.predictions:
            table.add(one.location, one.scores, one.counts)
        return {name: value for name, value in result.scores.items() if value is not None}, table
