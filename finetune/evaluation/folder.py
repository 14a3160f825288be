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
from finetune.evaluation import harness, metrics, table, uncertainty
from finetune.evaluation.external_predictions import read_foreign
from finetune.evaluation.job import Options, Work, asked
from finetune.evaluation.scoring import FORMAT as SCORING_FORMAT
from finetune.evaluation.scoring import Scoring, score_file, source_of
from finetune.evaluation.slices import SLICES
from finetune.evaluation.table import LossTable, ReplyTable, Score
from finetune.evaluation.targets import Target
from finetune.evaluation.versions import GENERATING, SCORING, versions
from finetune.storage.cache import key_of
from finetune.storage.files import file_digest, whole_file

FILE = "evaluation.json"
LOSSES = {"loss": ("loss", "perplexity"), "general_loss": ("general_loss",)}
"""Scores of each set of losses."""


class Scored:
    """One target with everything that is known about it."""

    def __init__(self, target: Target, work: Work | None, file: Path, scoring: Scoring) -> None:
        self.target, self.work, self.file = target, work, file
        self.replies = ReplyTable(scoring.names)
        self.places: list[tuple[str, int]] = []
        """What was answered, reply by reply."""
        self.slices: dict[str, list[str]] = {name: [] for name in SLICES}
        for row in rows(file):
            self.replies.add(row["where"], row["scores"], row["counts"])
            self.places.append((row["where"], row["message"]))
            for name, values in self.slices.items():
                values.append(row["slices"].get(name, ""))
        self.losses: dict[str, LossTable] = {}
        self.tasks: dict[str, Score] = {}
        if work is not None:
            self._read_measures(work)

    def _read_measures(self, work: Work) -> None:
        for name, kept in (("loss", "loss"), ("general_loss", work.general)):
            if kept in work.losses and (found := work.results.losses(kept)) is not None:
                self.losses[name] = LossTable(*found, names=LOSSES[name])
        if work.options.tasks:
            self.tasks = work.results.note(work.tasks) or {}

    @property
    def described(self) -> dict[str, Any]:
        """Its entry in `evaluation.json`."""
        scores: dict[str, Score] = {}
        for losses in self.losses.values():
            scores |= losses.described()
        scores |= self.replies.described() | self.tasks
        facts = (self.work.results.facts if self.work else None) or {}
        target = self.target
        return {
            "name": target.name,
            "path": target.path,
            "kind": target.kind,
            "step": target.step,
            "run": target.run,
            "predictions": f"predictions/{self.file.name}",
            "scores": scores,
            "seconds": float(facts.get("seconds", 0.0)),
        }


def write(
    place: Path, targets: Sequence[Target], works: Sequence[Work], options: Options
) -> dict[str, Any]:
    """Writes the folder; returns what `evaluation.json` says, and more when there is one target."""
    by_name = {work.target.name: work for work in works}
    scored: list[Scored] = []
    for target in targets:
        file = place / "predictions" / f"{target.name}.jsonl"
        work = by_name.get(target.name)
        if work is not None:
            _write_predictions(work, file, options.scoring)
        elif target.kind != "predictions":  # asked and scored by its run, while it was trained
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target.path, file)
        else:
            like = scored[0].file if scored else None
            read_foreign(Path(target.path), file, options.scoring, like=like)
        scored.append(Scored(target, work, file, options.scoring))
    evaluation = _evaluation(scored, options)
    report = evaluation | {"output": str(place)}
    if len(scored) == 1:
        report |= _single(scored[0], evaluation, options)
        shutil.copyfile(scored[0].file, place / "predictions.jsonl")
        _write_json(place / "scores.json", report)
    _write_json(place / FILE, evaluation)
    return report


def _write_predictions(work: Work, file: Path, scoring: Scoring) -> None:
    """The answers of one model with their scores, scored once for every way of scoring."""
    file.parent.mkdir(parents=True, exist_ok=True)
    key = key_of(
        {
            "format": SCORING_FORMAT,
            "scoring": _way_of_scoring(scoring),
            "own": [source_of(name) for name in scoring.own],
            "versions": versions(SCORING),
        }
    )
    kept = work.results.folder / f"scored-{key[:16]}.jsonl"
    if not kept.is_file():
        score_file(work.results.answers, kept, scoring)
    shutil.copyfile(kept, file)


def _evaluation(scored: Sequence[Scored], options: Options) -> dict[str, Any]:
    works = [one.work for one in scored if one.work is not None]
    files = [Path(one.target.path) for one in scored if one.work is None]
    settings = asked(works[0].settings, options) if works else {}
    scores = [one.described for one in scored]
    same = _on_the_same(scored)
    return {
        "format": 1,
        "data": _data(scored[0], files),
        "settings": settings | _way_of_scoring(options.scoring),
        "versions": versions((*GENERATING, *SCORING) if works else SCORING),
        "signatures": _signatures(options.scoring) | _of_tasks(scored),
        "targets": scores,
        "slices": _slices(scored) if same else {},
        "comparisons": _comparisons(scored) if same else [],
    }


def _data(first: Scored, files: Sequence[Path]) -> list[dict[str, Any]]:
    """The files that the replies answer, each with the hash of its bytes and the number of replies.

    Replies made elsewhere may not say what they answer: then it is the first file of them.
    """
    sources = dict.fromkeys(first.slices["source"])
    counts = {source: first.slices["source"].count(source) for source in sources}
    paths = {source: Path(source) if source or not files else files[0] for source in counts}
    return [
        {
            "path": str(paths[source]) if source or files else "",
            "fingerprint": file_digest(paths[source]) if paths[source].is_file() else "",
            "samples": number,
        }
        for source, number in counts.items()
    ]


def _on_the_same(scored: Sequence[Scored]) -> bool:
    """Whether all targets answered the same prompts; says which did not."""
    odd = [one.target.name for one in scored if one.places != scored[0].places]
    if odd:
        console.warn(
            f"{', '.join(odd)}: other replies than of {scored[0].target.name} (other prompts fit "
            "into the context); nothing is compared"
        )
    return not odd


def _slices(scored: Sequence[Scored]) -> dict[str, dict[str, dict[str, dict[str, Score]]]]:
    """Scores of the replies by slice and value; a slice with one value says nothing new."""
    found: dict[str, dict[str, dict[str, dict[str, Score]]]] = {}
    for name in SLICES:
        column = np.array(scored[0].slices[name])
        values = [str(value) for value in np.unique(column) if value]
        if len(values) > 1:
            found[name] = {
                value: {one.target.name: one.replies.described(column == value) for one in scored}
                for value in values
            }
    return found


def _comparisons(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Every two targets, the later one beside the earlier, score by score."""
    found = []
    kinds: list[list[tuple[str, uncertainty.Measure]]] = [
        [(one.target.name, one.replies.measure()) for one in scored if len(one.replies)]
    ]
    for name in LOSSES:
        kinds.append(
            [(one.target.name, one.losses[name].measure()) for one in scored if name in one.losses]
        )
    for kind in kinds:
        names = [name for name, _ in kind]
        measures = [measure for _, measure in kind]
        if len({len(measure.units) for measure in measures}) > 1:
            continue  # examples that one template makes too long for max_length
        for one in uncertainty.compare(measures):
            found.append(asdict(one) | {"a": names[one.a], "b": names[one.b]})
    return found


def _single(scored: Scored, evaluation: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """What is said of one target, flat."""
    work = scored.work
    losses = scored.losses.get("loss")
    dtype = ((work.results.facts if work else None) or {}).get("dtype", "")
    scores = scored.replies.scores() if len(scored.replies) else {}
    kind = "adapter" if scored.target.kind in ("adapter", "prefix") else "model"
    return {
        "target": scored.target.path,
        "kind": kind if work else "predictions",
        "base": work.base if work else None,
        "scores": ({"loss": losses.loss} if losses else {}) | scores,
        "supervised_tokens": losses.weight if losses else None,
        "replies": len(scored.replies),
        "settings": {**evaluation["settings"], "dtype": dtype.removeprefix("torch.")},
        "signature": metrics.signature(bleu_unit=options.scoring.bleu_unit),
    }


def _signatures(scoring: Scoring) -> dict[str, str]:
    return {
        "loss": "cross-entropy per supervised token of the references, natural logarithm",
        "perplexity": "exp(loss)",
        "general_loss": "loss on the general set",
        **metrics.signatures(bleu_unit=scoring.bleu_unit),
        **table.signatures(),
        **{name: f"yours, {own}" for name, own in zip(scoring.names, scoring.own, strict=True)},
    }


def _way_of_scoring(scoring: Scoring) -> dict[str, Any]:
    return {"bleu_unit": scoring.bleu_unit, "own": list(scoring.own)}


def _of_tasks(scored: Sequence[Scored]) -> dict[str, str]:
    return {name: harness.signature() for one in scored for name in one.tasks}


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of predictions."""
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    with whole_file(file) as opened:
        opened.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
