"""Kept answers -> an evaluation folder: `evaluation.json` and a file of predictions per target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from finetune import console
from finetune.artifacts.names import EVALUATION
from finetune.errors import ConfigError, DataError
from finetune.evaluation import metrics, schema, scoring
from finetune.evaluation.job import GENERATING, EvaluationJob, Options, request
from finetune.evaluation.metrics import Source
from finetune.evaluation.predictions import SLICES
from finetune.evaluation.schema import (
    Comparison,
    DataFile,
    Evaluation,
    Published,
    Score,
    Slices,
    TargetScores,
    read_evaluation,
    write_evaluation,
)
from finetune.evaluation.scores import added
from finetune.evaluation.scores.labels import LabelReader
from finetune.evaluation.scoring import Scoring, versions
from finetune.evaluation.statistics import LossTable, Measure, ReplyTable, compare
from finetune.evaluation.targets import Target
from finetune.evaluation.tasks import plan
from finetune.evaluation.tasks.table import TaskTable
from finetune.storage.cache import default_root, key_of
from finetune.storage.files import file_digest, refuse_odd, write_file
from finetune.storage.folders import refuse_others, result_files
from finetune.storage.outputs import is_same_file

LOSSES: tuple[Source, ...] = ("loss", "general_loss")
"""Sets of examples whose loss is taken."""


class ScoredTarget:
    """One target with everything that is known about it."""

    def __init__(
        self, target: Target, job: EvaluationJob | None, file: Path, options: Options
    ) -> None:
        self.target, self.job, self.file = target, job, file
        self.replies = ReplyTable((*options.scoring.names, *options.by_models.names))
        self.places: list[tuple[str, int]] = []
        """What was answered, reply by reply."""
        self.slices: dict[str, list[str]] = {name: [] for name in SLICES}
        labels = LabelReader()
        for row in rows(file):
            self.replies.add(row["where"], row["scores"], row["counts"])
            labels.add(row["reference"], row["prediction"], row["where"])
            self.places.append((row["where"], row["message"]))
            for name, values in self.slices.items():
                values.append(row["slices"].get(name, ""))
        self.labels = labels.table()
        self.losses: dict[Source, LossTable] = {}
        self.tasks = TaskTable()
        if job is not None:
            self._read_measures(job)

    def _read_measures(self, job: EvaluationJob) -> None:
        kept: tuple[tuple[Source, str], ...] = (
            ("loss", "loss"),
            ("general_loss", job.general_name),
        )
        for source, name in kept:
            if name in job.losses and (found := job.results.losses(name)) is not None:
                self.losses[source] = LossTable(*found, source=source)
        if job.options.tasks:
            self.tasks = TaskTable.of(job.results.note(job.tasks_name))

    @property
    def described(self) -> TargetScores:
        """Its entry in `evaluation.json`."""
        scores: dict[str, Any] = {}
        for losses in self.losses.values():
            scores |= losses.described()
        scores |= self.replies.described()
        scores |= self.labels.described() if self.labels else {}
        scores |= self.tasks.described()
        facts = (self.job.results.facts if self.job else None) or {}
        target = self.target
        return TargetScores(
            name=target.name,
            path=target.path,
            kind=target.kind,
            step=target.step,
            run=target.run,
            predictions=f"predictions/{self.file.name}",
            scores={name: Score(**score) for name, score in scores.items()},
            seconds=float(facts.get("seconds", 0.0)),
        )


def check_place(output: Path, targets: Sequence[Target], options: Options) -> None:
    """ConfigError when `write` would replace what it reads, or files that no evaluation wrote."""
    names = [EVALUATION, "scores.json", "predictions.jsonl", *map(_file_of, targets)]
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {output} is not a folder")
    for name in names:
        refuse_odd(output / name)
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
    with result_files(output, ours=_earlier(output), overwrite=options.overwrite) as place:
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
    evaluation = _evaluation(scored, options, signed)
    report = evaluation.model_dump() | {"output": str(output)}
    if len(scored) == 1:
        report |= _single(scored[0], evaluation, options)
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


def _evaluation(
    scored: Sequence[ScoredTarget], options: Options, signed: Mapping[str, str]
) -> Evaluation:
    jobs = [one.job for one in scored if one.job is not None]
    files = [Path(one.target.path) for one in scored if one.job is None]
    settings = request(jobs[0].settings, options) if jobs else {}
    same = _on_the_same(scored)
    return Evaluation(
        format=1,
        data=_data(scored[0], files),
        settings=settings | options.scoring.told,
        versions=versions((*GENERATING, *scoring.PACKAGES) if jobs else scoring.PACKAGES),
        signatures={**_signatures(options.scoring), **signed, **_of_tasks(scored)},
        targets=[one.described for one in scored],
        slices=_slices(scored) if same else {},
        comparisons=_comparisons(scored) if same else [],
        published=[Published(**asdict(one)) for one in plan.published(options.tasks)],
        labels={one.target.name: one.labels.report() for one in scored if one.labels},
    )


def _data(first: ScoredTarget, files: Sequence[Path]) -> list[DataFile]:
    """The files that the replies answer, each with the hash of its bytes and the number of replies.

    Replies made elsewhere may not say what they answer: then it is the first file of them.
    """
    sources = dict.fromkeys(first.slices["source"])
    counts = {source: first.slices["source"].count(source) for source in sources}
    paths = {source: Path(source) if source or not files else files[0] for source in counts}
    return [
        DataFile(
            path=str(paths[source]) if source or files else "",
            fingerprint=file_digest(paths[source]) if paths[source].is_file() else "",
            samples=number,
        )
        for source, number in counts.items()
    ]


def _on_the_same(scored: Sequence[ScoredTarget]) -> bool:
    """Whether all targets answered the same prompts; says which did not."""
    odd = [one.target.name for one in scored if one.places != scored[0].places]
    if odd:
        console.warn(
            f"{', '.join(odd)}: other replies than of {scored[0].target.name} (other prompts fit "
            "into the context); nothing is compared"
        )
    return not odd


def _slices(scored: Sequence[ScoredTarget]) -> Slices:
    """Scores of the replies by slice and value; a slice with one value says nothing new."""
    found: Slices = {}
    for name in SLICES:
        column = np.array(scored[0].slices[name])
        values = [str(value) for value in np.unique(column) if value]
        if len(values) > 1:
            found[name] = {
                value: {
                    one.target.name: {
                        metric: Score(**score)  # type: ignore[arg-type]
                        for metric, score in one.replies.described(column == value).items()
                    }
                    for one in scored
                }
                for value in values
            }
    return found


def _comparisons(scored: Sequence[ScoredTarget]) -> list[Comparison]:
    """Every two targets, the later one beside the earlier, score by score."""
    kinds: list[list[tuple[str, Measure]]] = [
        [(one.target.name, one.replies.measure()) for one in scored if len(one.replies)]
    ]
    kinds.append([(one.target.name, one.labels.measure()) for one in scored if one.labels])
    kinds += _compared_tasks(scored)
    for source in LOSSES:
        losses = [(one.target.name, one.losses.get(source)) for one in scored]
        kinds.append([(name, table.measure()) for name, table in losses if table])
    found = []
    for kind in kinds:
        names = [name for name, _ in kind]
        measures = [measure for _, measure in kind]
        if len({len(measure.units) for measure in measures}) > 1:
            continue  # examples that one template makes too long for max_length
        for one in compare(measures):
            found.append(Comparison(**asdict(one) | {"a": names[one.a], "b": names[one.b]}))
    return found


def _single(scored: ScoredTarget, evaluation: Evaluation, options: Options) -> dict[str, Any]:
    """What is said of one target, flat."""
    job = scored.job
    losses = scored.losses.get("loss")
    dtype = ((job.results.facts if job else None) or {}).get("dtype", "")
    scores = scored.replies.scores() if len(scored.replies) else {}
    kind = "adapter" if scored.target.kind in ("adapter", "prefix") else "model"
    return {
        "target": scored.target.path,
        "kind": kind if job else "predictions",
        "base": job.base if job else None,
        "scores": ({"loss": losses.loss} if losses else {}) | scores,
        "supervised_tokens": losses.weight if losses else None,
        "replies": len(scored.replies),
        "settings": {**evaluation.settings, "dtype": dtype.removeprefix("torch.")},
    }


def _signatures(how: Scoring) -> dict[str, str]:
    own = {name: f"yours, {function}" for name, function in zip(how.names, how.own, strict=True)}
    return metrics.signatures(how.definition) | own


def _of_tasks(scored: Sequence[ScoredTarget]) -> dict[str, str]:
    return {name: said for one in scored for name, said in one.tasks.signatures.items()}


def _compared_tasks(scored: Sequence[ScoredTarget]) -> Iterator[list[tuple[str, Measure]]]:
    """For every score of a task the measures of the targets that were asked the same questions."""
    asked: dict[tuple[str, tuple[str, ...]], list[tuple[str, Measure]]] = {}
    for one in scored:
        for name, questions, measure in one.tasks.measures():
            asked.setdefault((name, questions), []).append((one.target.name, measure))
    yield from asked.values()


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of predictions."""
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
