"""Files of scored predictions -> what `evaluation.json` says of their targets, alone and side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from finetune import console
from finetune.evaluation import scoring
from finetune.evaluation.job import EvaluationJob
from finetune.evaluation.options import GENERATING, Options, request
from finetune.evaluation.predictions import SLICES
from finetune.evaluation.schema import (
    Comparison,
    DataFile,
    Evaluation,
    Published,
    Score,
    Slices,
    TargetScores,
)
from finetune.evaluation.scores import metrics
from finetune.evaluation.scores.labels import LabelReader
from finetune.evaluation.scores.metrics import Source
from finetune.evaluation.scores.statistics import LossTable, Measure, ReplyTable, compare
from finetune.evaluation.scoring import Scoring, versions
from finetune.evaluation.targets import Target
from finetune.evaluation.tasks import plan
from finetune.evaluation.tasks.table import TaskTable
from finetune.storage.files import file_digest

LOSSES: tuple[Source, ...] = ("loss", "general_loss")
"""Sets of examples whose loss is taken."""
MOST_VALUES = 100
"""Parts of the data by one slice; more are names of single dialogues, and no page could show them."""


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
            batch_size=facts.get("batch_size"),
            prompts_per_rank=facts.get("prompts_per_rank", []),
        )


def evaluation_of(
    scored: Sequence[ScoredTarget], options: Options, signed: Mapping[str, str]
) -> Evaluation:
    """What is written of the targets; `signed` are the signatures of scores that other models gave."""
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
        needles={one.target.name: found for one in scored if (found := one.tasks.needles)},
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
    """Scores of the replies by slice and value; a slice with one value, or very many, says nothing."""
    found: Slices = {}
    for name in SLICES:
        column = np.array(scored[0].slices[name])
        values = [str(value) for value in np.unique(column) if value]
        if 1 < len(values) <= MOST_VALUES:
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


def single(scored: ScoredTarget, evaluation: Evaluation) -> dict[str, Any]:
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
