"""A model or an adapter, or the run that tuned it, in the other layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from finetune.artifacts.resolve import find_source, is_adapter, is_folder, local_folder
from finetune.errors import ConfigError
from finetune.export.convert import ExportReport, export_model
from finetune.export.convert_adapter import export_adapter
from finetune.export.layout import Layout
from finetune.export.merge import Check


def export(
    source: str,
    out: Path,
    *,
    layout: Layout,
    base: str | None = None,
    new_base: str | None = None,
    check: Check = "tensors",
) -> ExportReport:
    """Write what ``source`` means in ``layout`` to ``out``, whole or not at all.

    Args:
        source: A model, its hub id, an adapter, a checkpoint, or a run (its best or newest good one).
        out: The new folder; must not exist.
        layout: published (`chatglm`) or hf (transformers' `glm`).
        base: Of an adapter: its base, if it is no longer where the adapter says.
        new_base: Of an adapter: the same base in ``layout``, for the adapter to name.
        check: Of a model, see `export_model`.
    """
    folder, notes = find_source(Path(source) if is_folder(source) else local_folder(source))
    if is_adapter(folder):
        where = Path(base) if base else None
        report = export_adapter(folder, out, layout=layout, base=where, new_base=new_base)
    elif base or new_base:
        raise ConfigError(f"--base and --new-base do not apply: {folder} is a whole model")
    else:
        report = export_model(folder, out, layout=layout, check=check)
    return replace(report, notes=(*notes, *report.notes))
