"""The config's `data` section, and what a command line says about rows -> sources and a reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from finetune.config.row_formats import RowFormat
from finetune.config.schema import Columns as ColumnNames
from finetune.config.schema import DataSection, Source, held_out_share
from finetune.data.dialogue.columns import Columns
from finetune.data.dialogue.formats import RowRules
from finetune.data.reading.images import ImagePolicy
from finetune.data.reading.parts import Part
from finetune.data.reading.sources import Reading, SourceSpec
from finetune.errors import ConfigError

ROW_OPTIONS = ("turns", "calls_in_text", "reasoning", "ignore_columns")
"""Options of the data section that commands take as `--rows name=value`."""
AS_DEFAULT = DataSection(train=[])
"""A data section that says nothing about rows."""


def reading_of(section: DataSection) -> Reading:
    """The `data` section's options for rows."""
    rules = RowRules(
        turns=section.turns,
        calls_in_text=section.calls_in_text,
        reasoning=section.reasoning,
        ignore_columns=tuple(section.ignore_columns),
    )
    columns = (section.columns.prompt, section.columns.response) if section.columns else None
    images = ImagePolicy(root=section.image_root, cache_root=section.cache_dir)
    return Reading(section.on_bad_row, section.max_bad_rows, columns, images, rules)


def with_rows(
    section: DataSection,
    *,
    columns: Columns | None = None,
    format: RowFormat | None = None,
    image_root: str | None = None,
    options: Sequence[str] = (),
) -> DataSection:
    """The section with what a command line says about rows; None leaves what it has.

    Args:
        section: A run's, or the defaults.
        columns: Names of the prompt and response columns.
        format: The layout.
        image_root: The folder that images' paths are relative to.
        options: Others of ROW_OPTIONS, each as `name=value`.

    Raises:
        ConfigError: An option is not one of these, or cannot have its value.
    """
    named = ColumnNames(prompt=columns[0], response=columns[1]) if columns else None
    said: dict[str, Any] = {"columns": named, "format": format, "image_root": image_root}
    for option in options:
        name, equals, value = option.partition("=")
        if name not in ROW_OPTIONS or not equals:
            raise ConfigError(
                f"--rows {option}: write name=value with one of {', '.join(ROW_OPTIONS)}"
            )
        said[name] = value.split(",") if name == "ignore_columns" else value
    kept = {key: value for key, value in said.items() if value is not None}
    try:
        return DataSection.model_validate({**dict(section), **kept})
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(
            f"--rows {problem['loc'][0]}={problem['input']}: {problem['msg']}"
        ) from None


def training_sources(section: DataSection) -> tuple[SourceSpec, ...]:
    """The sources of `data.train`, without what `data.validation: 5%` holds out."""
    sources = sources_of(section, section.train)
    share = held_out_share(section.validation)
    if share is None:
        return sources
    part = Part(share, held_out=False, group_by=section.group_by or "")
    return tuple(replace(source, part=part) for source in sources)


def validation_sources(section: DataSection) -> tuple[SourceSpec, ...]:
    """The sources of `data.validation`; for a share the training sources' held-out part."""
    share = held_out_share(section.validation)
    if share is None:
        return sources_of(section, section.validation)
    part = Part(share, held_out=True, group_by=section.group_by or "")
    sources = sources_of(section, section.train)
    return tuple(replace(source, part=part, weight=1.0, max_rows=None) for source in sources)


def sources_of(
    section: DataSection, given: str | Sequence[str | Source] | None
) -> tuple[SourceSpec, ...]:
    """The sources that files, globs and folders name, each with its layout."""
    listed = [given] if isinstance(given, str) else given or []
    return tuple(_source_of(section, source) for source in listed)


def _source_of(section: DataSection, source: str | Source) -> SourceSpec:
    if isinstance(source, str):
        return SourceSpec(source, format=section.format)
    chosen = section.format if source.format == "auto" else source.format
    columns = tuple(source.columns.items())
    return SourceSpec(source.path, source.weight, chosen, columns, source.max_rows)
