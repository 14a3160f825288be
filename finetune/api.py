"""The program from Python: `from finetune import train, evaluate, load, render`.

What these four take and return is kept from version to version (tests/test_api.py holds it). Mistakes raise
`finetune.errors.FinetuneError`, whose text says what to do; libraries are imported when a function needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import DataError

if TYPE_CHECKING:
    from finetune.config.load import Loaded
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.dialogue.conversation import Conversation
    from finetune.data.preview.show import ShowResult

Row = Mapping[str, Any]
"""A dialogue as a row of a data file: `{"messages": […]}`, or any other layout that files may have."""
Metric = Callable[[str, str], float | None]
"""The texts of a reply and of its reference -> a number; None where it does not apply."""


def train(
    config: str | Path | Mapping[str, Any], *overrides: str, callbacks: Sequence[Any] = ()
) -> dict[str, Any]:
    """Train as `finetune train` does; an interrupted run goes on where it stopped.

    Args:
        config: A YAML file, or the same sections as a mapping.
        overrides: Options that win over the config's, each as `section.key=value`.
        callbacks: `transformers.TrainerCallback`s of your own.

    Returns:
        `output_dir`, `steps`, `train_loss`, `scores_before`, `scores`, `checkpoint`,
        `best_checkpoint`, `resumed_from`, `seconds`.
    """
    from finetune.cli.inputs import check_inputs
    from finetune.training import run

    loaded = _loaded(config, overrides)
    check_inputs(loaded)
    return run.train(loaded.config, callbacks=callbacks)


def evaluate(
    *models: str | Path,
    data: str | Sequence[str] = (),
    output: str | Path | None = None,
    include_base: bool = False,
    metrics: Sequence[str | Metric] = (),
    **changes: Any,
) -> dict[str, Any]:
    """Score models on held-out dialogues as `finetune evaluate` does, and write the report.

    Args:
        models: Runs (all their checkpoints), checkpoints, adapters, merged or base models.
        data: Held-out files, globs or folders; by default those of the first model's run.
        output: The folder to write; by default one beside the first model.
        include_base: Score the untuned model too.
        metrics: Your own, as functions of a module or as `module:function`.
        changes: Options of the section `evaluation`, such as `max_new_tokens=256`.

    Returns:
        What `evaluation.json` says: `targets` with their scores and intervals, `comparisons`, `output`.
    """
    from finetune.artifacts.resolve import models_in
    from finetune.evaluation.evaluate import Options
    from finetune.evaluation.evaluate import evaluate as run
    from finetune.evaluation.scoring import Scoring
    from finetune.report.page import write_page

    found = run(
        models_in([str(model) for model in models]),
        [data] if isinstance(data, str) else list(data),
        output=None if output is None else Path(output),
        changes=changes,
        options=Options(
            with_base=include_base, scoring=Scoring(own=tuple(map(_metric_name, metrics)))
        ),
    )
    if found:  # the first process writes
        write_page(Path(found["output"]))
    return found


def load(model: str | Path, *, base: str | None = None) -> Chat:
    """A model that answers: a base or merged model, a hub id, an adapter, a checkpoint or a run.

    Args:
        model: What is opened; of a run, its best checkpoint, else the newest.
        base: The adapter's base model, when it is not where the adapter says.
    """
    from finetune.artifacts.resolve import model_in
    from finetune.generation.load import open_model

    opened = open_model(model_in(str(model)), base=base)
    return Chat(opened.model, opened.template)


def render(row: Row | Sequence[Row], model: str | Path) -> ShowResult:
    """A dialogue as training sees it: its tokens, and which of them carry loss.

    `print(render(row, model).plain())` shows the text with « » around what is learned.

    Args:
        row: A row as a data file holds it, or its messages alone.
        model: A folder with a tokenizer, or a hub id; no weights are needed.
    """
    from finetune.data.preview.show import shown, template_of

    return shown(_conversation(row, "train"), template_of(str(model)), "python")


@dataclass(frozen=True, slots=True)
class Chat:
    """A model with its chat template."""

    model: Any
    """The torch module, in evaluation mode, on the GPU if there is one."""
    template: ChatTemplate

    def reply(self, row: Row | Sequence[Row], **how: Any) -> dict[str, Any]:
        """The reply to one dialogue, as `{"role", "content"}`; a tool call has its name in `metadata`."""
        return self.replies([row], **how)[0]

    def replies(
        self,
        rows: Sequence[Row | Sequence[Row]],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> list[dict[str, Any]]:
        """The reply to each dialogue that ends with a user message or a tool result.

        Args:
            rows: Dialogues as rows, or their messages alone.
            max_new_tokens: Longest reply in tokens.
            temperature: 0 always takes the likeliest token; above it tokens are drawn with `seed`.
            seed: Of drawn tokens.
            batch_size: Dialogues answered at once.
        """
        from finetune.generation.generate import Extras, SeededSampling, generate
        from finetune.generation.messages import message_json, reply_messages, without_thought

        asked = [_conversation(row, "predict") for row in rows]
        written = generate(
            self.model,
            self.template,
            self.template.prompts([(each, len(each.messages)) for each in asked]),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            extras=Extras(SeededSampling.at(temperature, seed) if temperature else None),
        )
        return [
            message_json(without_thought(reply_messages(reply.ids, self.template, each.tools)[0]))
            for reply, each in zip(written, asked, strict=True)
        ]


def _loaded(config: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Loaded:
    from finetune.config.load import load, load_mapping

    if isinstance(config, Mapping):
        return load_mapping(config, overrides)
    return load(Path(config), overrides)


def _conversation(row: Row | Sequence[Row], purpose: Any) -> Conversation:
    """The dialogue of a row; DataError where there is none."""
    from finetune.data.dialogue.conversation import RowError
    from finetune.data.dialogue.formats import to_conversation

    whole = dict(row) if isinstance(row, Mapping) else {"messages": list(row)}
    try:
        return to_conversation(whole, location="row", purpose=purpose)
    except RowError as error:
        raise DataError(
            f"the row is no dialogue: {error}; correct it (data/README.md has the forms)"
        ) from error


def _metric_name(metric: str | Metric) -> str:
    """`module:function`, by which a metric is found in every process and its scores are kept."""
    return metric if isinstance(metric, str) else f"{metric.__module__}:{metric.__qualname__}"
