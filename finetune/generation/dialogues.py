"""Files of dialogues that wait for a reply: as prompts, and as they were when they were read first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.config.row_formats import RowFormat
from finetune.config.schema import DataSection
from finetune.data.dialogue.columns import Columns
from finetune.data.reading.files import expand
from finetune.data.reading.section import ROW_OPTIONS, reading_of, sources_of, with_rows
from finetune.data.reading.sources import read_conversations
from finetune.generation.prompts import PromptStream, ReplyPrompt
from finetune.generation.settings import settings_of
from finetune.storage.seen import SeenFiles

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate


@dataclass(frozen=True, slots=True)
class RowOptions:
    """What rows are like, where the command says so."""

    columns: Columns | None = None
    """Names of the prompt and response columns; by default those of the run."""
    format: RowFormat = "auto"
    image_root: str | None = None
    """The folder that images' paths are relative to; by default the data file's own."""
    rows: tuple[str, ...] = ()
    """Other options of the data section about rows, as `name=value`."""

    def section(self, target: str) -> DataSection:
        """For a run's checkpoint as its training data's, but for the layout of the rows."""
        trained = settings_of(target).data
        kept: dict[str, Any] = {name: getattr(trained, name) for name in ("columns", *ROW_OPTIONS)}
        return with_rows(
            DataSection(train=[], **kept),
            columns=self.columns,
            format=self.format,
            image_root=self.image_root,
            options=self.rows,
        )


class Measured(NamedTuple):
    """Dialogues as they were when they were read first."""

    lengths: list[int]
    """Tokens of every prompt."""
    seen: SeenFiles
    """The data, and the images that it shows."""


@dataclass(frozen=True)
class Dialogues:
    """Files, globs or folders of dialogues, and how their rows are read."""

    paths: Sequence[str]
    rows: DataSection

    @property
    def files(self) -> list[Path]:
        """The files that there are now."""
        return [file for path in self.paths for file in expand(path)]

    def prompts(
        self, template: ChatTemplate, *, check_images: bool = False
    ) -> Iterator[ReplyPrompt]:
        """The dialogues up to where a reply is wanted: their end, before a reply that is there."""
        reading = reading_of(self.rows)
        reading = replace(reading, images=replace(reading.images, check=check_images))
        sources = sources_of(self.rows, self.paths)
        dialogues = read_conversations(sources, reading, purpose="predict")
        return PromptStream(dialogues, template, replies="next_reply")

    def measured(self, template: ChatTemplate) -> Measured:
        """Reads every row once, so that bad ones show now."""
        lengths: list[int] = []
        images: dict[str, None] = {}
        for prompt in self.prompts(template, check_images=True):
            lengths.append(len(prompt.prompt_ids))
            images |= dict.fromkeys(prompt.conversation.images)
        return Measured(lengths, SeenFiles.of([*self.files, *map(Path, images)]))
