"""Kept answers -> an evaluation folder: `evaluation.json` and a file of predictions per target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.artifacts.names import ADAPTER_CONFIG, EVALUATION, MODEL_CONFIG, RUN_CONFIG
from finetune.errors import ConfigError, DataError
from finetune.evaluation import schema, scoring
from finetune.evaluation.compared import ScoredTarget, evaluation_of, rows, single
from finetune.evaluation.job import EvaluationJob
from finetune.evaluation.options import Options
from finetune.evaluation.schema import (
    read_evaluation,
    write_evaluation,
)
from finetune.evaluation.scores import added
from finetune.evaluation.scoring import Scoring, versions
from finetune.evaluation.targets import Target
from finetune.storage.cache import default_root, key_of
from finetune.storage.files import refuse_odd, write_file
from finetune.storage.folders import refuse_another_result, refuse_others, result_files
from finetune.storage.outputs import check_not_read, is_same_file

_FILES = (EVALUATION, "scores.json", "predictions.jsonl")
_FOLDERS = ("predictions", "runs", "pictures")


def belongs(name: str) -> bool:
    """Whether an evaluation's folder may hold a file of this name."""
    return name in _FILES or name.partition("/")[0] in _FOLDERS


def _check_folder(output: Path, sources: Sequence[str]) -> None:
    """ConfigError for a folder that is something else, or whose files would be read as data."""
    refuse_another_result(output, belongs)
    for name in (MODEL_CONFIG, ADAPTER_CONFIG, RUN_CONFIG):
        if (output / name).exists():
            raise ConfigError(
                f"--output: {output} is a model or a run (it holds {name}); choose a folder of its own"
            )
    check_not_read(output, sources, "--output")
    for source in sources:
        if any((output.resolve() / name).match(str(Path(source).resolve())) for name in _FILES):
            raise ConfigError(
                f"--output: what is written into {output} would be read as {source} the next time; "
                "choose another folder"
            )


def check_place(
    output: Path, targets: Sequence[Target], options: Options, sources: Sequence[str] = ()
) -> None:
    """ConfigError when `write` would replace what it reads, or files that no evaluation wrote.

    Nor may the folder be a model, a checkpoint or a run, or lie where `sources` are read as data.
    """
    _check_folder(output, sources)
    names = [*_FILES, *map(_file_of, targets)]
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {output} is not a folder; choose another")
    for name in names:
        refuse_odd(output / name, inside=output)
    for target in targets:
        for name in names:
            if Path(target.path).is_file() and is_same_file(output / name, Path(target.path)):
                raise ConfigError(
                    f"{target.path} is read, and {output / name} is written; choose another --output"
                )
    if not options.overwrite:
        refuse_others(output, names, _earlier(output))


def write(
    output: Path, targets: Sequence[Target], jobs: Sequence[EvaluationJob], options: Options
) -> dict[str, Any]:
    """Writes the folder; returns what `evaluation.json` says, and more when there is one target.

    All files take their places together, sealed by a manifest.
    """
    check_place(output, targets, options)
    with result_files(
        output, belongs=belongs, ours=_earlier(output), overwrite=options.overwrite
    ) as place:
        return _write(place, output, targets, jobs, options)


def _earlier(output: Path) -> set[str]:
    """What an evaluation of an earlier version wrote, which left no manifest."""
    try:
        targets = read_evaluation(output).targets
    except DataError:
        return set()
    return {
        EVALUATION,
        "scores.json",
        "predictions.jsonl",
        *(target.predictions for target in targets),
    }


def _file_of(target: Target) -> str:
    return f"predictions/{target.name}.jsonl"


def _write(
    place: Path,
    output: Path,
    targets: Sequence[Target],
    jobs: Sequence[EvaluationJob],
    options: Options,
) -> dict[str, Any]:
    by_name = {job.target.name: job for job in jobs}
    files = [(target.name, target.kind, place / _file_of(target)) for target in targets]
    for target, (_, _, file) in zip(targets, files, strict=True):
        job = by_name.get(target.name)
        if job is not None:
            _write_predictions(job, file, options.scoring)
        elif target.kind != "predictions":  # generated and scored by its run, while it was trained
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target.path, file)
        else:
            like = files[0][2] if target is not targets[0] else None
            scoring.score_external(Path(target.path), file, options.scoring, like=like)
        if target.run is not None:
            schema.keep_run(place, target.run)
    signed = added.add_scores(options.by_models, files, _cache(jobs))
    scored = [
        ScoredTarget(target, by_name.get(target.name), file, options)
        for target, (_, _, file) in zip(targets, files, strict=True)
    ]
    if jobs:  # their images were checked with their data; a file of replies may name any
        shown = (image for row in rows(scored[0].file) for image in row.get("images", ()))
        schema.keep_pictures(place, shown)
    evaluation = evaluation_of(scored, options, signed)
    report = evaluation.model_dump() | {"output": str(output)}
    if len(scored) == 1:
        report |= single(scored[0], evaluation)
        shutil.copyfile(scored[0].file, place / "predictions.jsonl")
        write_file(place / "scores.json", json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    write_evaluation(place, evaluation)
    return report


def _write_predictions(job: EvaluationJob, file: Path, how: Scoring) -> None:
    """The replies of one model with their scores, scored once for every way of scoring."""
    file.parent.mkdir(parents=True, exist_ok=True)
    key = key_of(
        {
            "format": scoring.FORMAT,
            "scoring": asdict(how),
            "own": [scoring.source_of(name) for name in how.own],
            "versions": versions(scoring.PACKAGES),
        }
    )
    kept = job.results.scored(
        key[:16], lambda unscored, output: scoring.score_file(unscored, output, how)
    )
    shutil.copyfile(kept, file)


def _cache(jobs: Sequence[EvaluationJob]) -> Path:
    """Where answers of a judge are kept."""
    said = jobs[0].settings.data.cache_dir if jobs else None
    return Path(said) if said else default_root()
