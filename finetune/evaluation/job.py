"""What is to be done for one model: which losses and replies are wanted, and where they are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from finetune.artifacts.resolve import model_base
from finetune.data.chat.template import ChatTemplate
from finetune.data.examples.dataset import PreparedDataset, load_examples
from finetune.data.reading.files import expand
from finetune.data.reading.section import sources_of
from finetune.data.reading.sources import SourceSpec, read_conversations
from finetune.evaluation.keys import data_key, evaluation_key, tasks_key
from finetune.evaluation.options import Options
from finetune.evaluation.store import Results
from finetune.evaluation.targets import Target
from finetune.generation.prompts import PromptStream
from finetune.generation.settings import Settings
from finetune.storage.cache import key_of
from finetune.storage.seen import SeenFiles


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
        return general_name(self.options)

    @cached_property
    def tasks_name(self) -> str:
        """The name under which the scores of tasks are kept; their files are read for it."""
        options = self.options
        return tasks_key(options.tasks, self.settings.evaluation.max_samples, options.tasks_data)

    @property
    def is_done(self) -> bool:
        """Nothing is missing."""
        there = all(self.results.losses(name) is not None for name in self.losses)
        asked = not self.options.tasks or self.results.note(self.tasks_name) is not None
        return there and asked and self.results.facts is not None

    def prompts(self, positions: int | None) -> PromptStream:
        """A prompt for every reply that is asked for; `positions` is the model's room."""
        reading = self.settings.reading.for_checkpoint(self.template)
        dialogues = read_conversations(self.settings.sources, reading)
        return PromptStream.of(dialogues, self.template, self.settings.evaluation, positions)


def prepare(target: Target, settings: Settings, options: Options) -> EvaluationJob:
    """What is to be done for one model; what is wrong with the request is found here, without torch.

    Raises:
        ConfigError, DataError, ModelError: It cannot be done.
    """
    from finetune.generation.load import open_template

    options.check()
    template = open_template(target.path, base=target.base)
    options.form.check(template)
    root = Path(settings.data.cache_dir) if settings.data.cache_dir else None
    sources = settings.sources
    here = sources and not options.by.endpoint  # an endpoint tells no losses
    losses = {"loss": _examples(sources, template, settings)} if here else {}
    if options.general:
        general = sources_of(settings.data, options.general)
        losses[general_name(options)] = _examples(general, template, settings)
    seen = SeenFiles.of(held_out_files(settings, template))
    key = evaluation_key(target, settings, options, seen)
    return EvaluationJob(target, settings, options, template, losses, Results(root, key), seen)


def held_out_files(settings: Settings, template: ChatTemplate) -> list[Path]:
    """The held-out files, and the images that they show."""
    files = [file for source in settings.sources for file in expand(source.path)]
    if template.image is None:
        return files
    dialogues = read_conversations(settings.sources, settings.reading)
    images = (image for one in dialogues for image in one.images)
    return [*files, *map(Path, dict.fromkeys(images))]


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


def general_name(options: Options) -> str:
    """The name under which the loss on the general set is kept."""
    return f"general-{key_of({'data': data_key(options.general)})[:16]}"
