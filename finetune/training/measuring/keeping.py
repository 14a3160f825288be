"""What the untuned model did well: measured at every evaluation, and which checkpoint kept it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.config.forgetting import KeepSection
from finetune.config.schema import EvaluationSection
from finetune.data.chat.template import ChatTemplate
from finetune.data.examples.collate import Collator
from finetune.data.examples.dataset import PreparedDataset
from finetune.distributed.map_batches import Poll
from finetune.evaluation.loss import validation_loss
from finetune.evaluation.model_scores import evaluate_model
from finetune.evaluation.scores import forgetting
from finetune.evaluation.scores.statistics import Measure
from finetune.evaluation.tasks.ask import ask
from finetune.evaluation.tasks.harness import Asking
from finetune.generation.prompts import ReplyPrompt

LOSS, CALLS = "general_loss", "general_tool_call_accuracy"


@dataclass(frozen=True)
class KeptData:
    """General dialogues and tasks, and how the model is asked about them."""

    section: KeepSection
    template: ChatTemplate
    examples: PreparedDataset | None
    prompts: Sequence[ReplyPrompt]
    """Of the dialogues with tools."""
    batch_size: int
    """Examples per forward pass for the loss."""
    evaluation: EvaluationSection

    def margin(self, name: str) -> float:
        """By how much a score may be worse."""
        return self.section.loss_margin if name == LOSS else self.section.score_margin

    def measures(self, model: Any, should_stop: Poll | None) -> dict[str, Measure]:
        """Every score's numbers by its name; the same in every process."""
        found: dict[str, Measure] = {}
        if self.examples is not None and len(self.examples):
            collate = Collator(self.template.pad_id, image=self.template.image)
            table = validation_loss(model, self.examples, collate, batch_size=self.batch_size, should_stop=should_stop)  # fmt: skip
            sums = np.stack([table.losses, table.weights], axis=1)
            found[LOSS] = Measure((LOSS,), sums, lambda sums: sums[:, :1] / sums[:, 1:])
        if self.prompts:
            replies = evaluate_model(
                model,
                self.prompts,
                max_new_tokens=self.evaluation.max_new_tokens,
                batch_size=int(self.evaluation.batch_size),
                should_stop=should_stop,
            ).predictions
            right = [one.scores["tool_call_accuracy"] for one in replies]
            calls_made = forgetting.as_mean(CALLS, right, [one.location for one in replies])
            if calls_made is not None:
                found[CALLS] = calls_made
        return found | self._tasks(model)

    def _tasks(self, model: Any) -> dict[str, Measure]:
        scores = ask(
            model, self.template, self.section.tasks, Asking(int(self.evaluation.batch_size))
        )
        return {name: score.measure(name) for name, score in scores.items() if score.ids}
