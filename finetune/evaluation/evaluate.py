"""Models and held-out dialogues -> loss, scores, comparisons and every prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune import console
from finetune.errors import ConfigError
from finetune.evaluation import compute, folder, job
from finetune.evaluation.options import Options
from finetune.evaluation.scores import added
from finetune.evaluation.scoring import check_metrics
from finetune.evaluation.targets import Target, find_targets
from finetune.generation.backends.choice import BackendChoice
from finetune.generation.settings import Settings, settings_of
from finetune.storage.cache import default_root

__all__ = ["BackendChoice", "Options", "evaluate"]


def evaluate(
    targets: str | Sequence[str],
    data: Sequence[str] = (),
    *,
    output: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Loss and scores of models on held-out files: for checkpoints, those that their run gave them.

    Writes `evaluation.json` and the predictions of every target; for a single target `scores.json`
    and `predictions.jsonl` too. Under torchrun all processes share the work; the first writes.

    Args:
        targets: models, adapters and checkpoints, as `open_model` opens them.
        data: held-out files, globs or folders; by default those of the first target's run.
        output: the folder to write into; by default one beside the first target.
        changes: fields of EvaluationSection, and `columns`, `format` and `image_root` of rows, that
            win over the run's; None counts as not said.
        options: what else is asked for.

    Returns:
        What `evaluation.json` says, and more for a single target; empty on other processes.

    Raises:
        ConfigError, DataError, ModelError: before anything is generated.
    """
    options = options or Options()
    models = [targets] if isinstance(targets, str) else list(targets)
    found = find_targets(models, options.predictions, with_base=options.with_base)
    if not found:
        raise ConfigError("there is nothing to evaluate; name a model, or files with --predictions")
    if options.temperature < 0:
        raise ConfigError(f"temperature is {options.temperature}; it must be 0 (greedy) or more")
    check_metrics(options.scoring.own)
    # What can be wrong with the request is found before torch is imported.
    whole = [target for target in found if target.kind != "predictions"]
    if options.by.endpoint and len(whole) > 1:
        raise ConfigError(
            f"--endpoint replies for one model, and {len(whole)} are named: evaluate them one by one, then "
            "compare their predictions with --predictions"
        )
    settings = _settings(whole, data, changes or {}, options) if whole else None
    added.check(options.by_models, default_root())
    jobs = [job.prepare(target, settings, options) for target in whole] if settings else []
    place = output or _beside(found[0], settings)
    sources = [source.path for source in settings.sources] if settings else []
    folder.check_place(place, found, options, sources)
    compute.run(jobs)
    if not console.is_rank0():
        return {}
    return folder.write(place, found, jobs, options)


def _settings(
    targets: Sequence[Target], data: Sequence[str], changes: Mapping[str, Any], options: Options
) -> Settings:
    """Those of the run of the first checkpoint among the targets, for all of them.

    Tasks alone ask no held-out data, unless it is named too.
    """
    tuned = [target for target in targets if target.kind != "base"] or targets
    saved = settings_of(tuned[0].path)
    found = saved.with_changes(data, changes, needs_data=not options.tasks)
    if options.tasks and not data:
        found = replace(found, data=found.data.model_copy(update={"validation": None}))
    return found


def _beside(target: Target, settings: Settings | None) -> Path:
    """A folder next to the target, or here when it is a hub id, named after it and the data."""
    path = Path(target.path)
    if target.kind == "predictions":
        return path.absolute().parent / f"evaluation-{path.stem}"
    place = path.absolute() if path.is_dir() else Path(path.name).absolute()
    sources = settings.sources if settings else ()
    data = Path(sources[0].path).stem if sources else "tasks" if settings else "data"
    return place.parent / f"evaluation-{place.name}-{data}"
