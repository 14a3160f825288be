"""Evaluation folders without a model: invented replies, scores that are means of theirs, runs beside them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.evaluation import schema

METRICS = ("bleu-4", "rouge-l", "exact_match", "stop_rate")
WORDS = ["the", "order", "was", "sent", "on", "friday", "and", "arrives", "in", "two", "days", "我们", "已经", "寄出", "您的", "订单", "请", "稍候", "error", "means", "pump", "valve", "turn", "lever", "left"]  # fmt: skip
EVIL = '</script><img src=x onerror="window.broken=1"><script>window.broken=1</script> <!-- {{ 7*7 }} &lt; \u2028 ]]>'


def write_evaluation(
    folder: Path,
    *,
    samples: int = 40,
    runs: Sequence[str] = ("lora",),
    steps: Sequence[int] = (20, 40, 60),
    evil: bool = False,
    images: Sequence[Path] = (),
    words: int = 18,
) -> Path:
    """A folder as `finetune evaluate --output` leaves it: the base and every step of every run."""
    draw = random.Random(0)
    (folder / "predictions").mkdir(parents=True)
    rows = [_row(number, draw, images, words) for number in range(samples)]
    if evil and rows:
        rows[0] |= {"prompt": f"[gMASK]<sop><|user|>\n{EVIL}<|assistant|>", "reference": EVIL, "where": EVIL}  # fmt: skip
        rows[0]["slices"] = {"kind": EVIL}
    targets = [_target(folder, "base", "base", None, None, rows, 0.15, draw, evil)]
    for place, run in enumerate(runs):
        write_run(folder.parent / run, rank=8 * (place + 1), steps=steps)
        for step in steps:
            skill = 0.2 + 0.7 * step / max(steps) - 0.1 * place
            name = f"{run} {step}" + (EVIL if evil and step == steps[-1] else "")
            targets.append(_target(folder, name, "adapter", step, str(folder.parent / run), rows, skill, draw, evil))  # fmt: skip
    evaluation = {
        "format": 1,
        "data": [
            {"path": "data/heldout.jsonl", "fingerprint": "5f3a" * 16, "samples": len(rows)}
        ],
        "settings": {"decoding": "greedy", "max_new_tokens": 64, "replies": "every_reply"},
        "versions": {"finetune": "0.1.0", "torch": "2.13.0"},
        "signatures": {"rouge-l": "f1, jieba words, mean over pairs", "chrf": EVIL if evil else "chrF2"},
        "targets": targets,
        "slices": _slices(folder, rows, targets),
        "comparisons": _comparisons(targets),
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(evaluation, ensure_ascii=False))
    for target in targets:
        if target["run"]:
            schema.keep_run(folder, target["run"])
    schema.keep_pictures(folder, map(str, images))
    return folder


def write_run(folder: Path, *, rank: int = 8, steps: Sequence[int] = (20, 40, 60)) -> Path:
    """A run directory as training leaves it, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        "model:\n  path: THUDM/glm-4-9b-chat\ndata:\n  train: data/train.jsonl\nmethod:\n  kind: lora\n"
        f"  rank: {rank}\ntraining:\n  output_dir: {folder}\n  learning_rate: 0.0005\n"
    )
    records: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.9, "eval_rouge-l": 4.0}]
    for step in range(2, max(steps) + 1, 2):
        records.append({"step": step, "loss": 0.8 + 3 / (1 + step / 8 * rank / 8)})
        if step in steps:
            records.append({"step": step, "eval_loss": 1 + 2.5 / (1 + step / 10), "eval_rouge-l": 4 + 46 * step / max(steps)})  # fmt: skip
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 62, "lo')  # a run that was killed
    counts = {"examples": 300, "rows": 310, "bad": 2, "dropped": {"too long": 8}, "tokens": 40210, "supervised_tokens": 9120, "longest": 480}  # fmt: skip
    lengths = {"edges": [0, 120, 240, 360, 480], "numbers": [100, 140, 40, 20]}
    data = {"train": counts | {"fingerprint": "ab" * 32, "lengths": lengths}}
    (folder / "data.json").write_text(json.dumps(data))
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
    best = {"checkpoint": f"checkpoint-{max(steps)}", "metric": "loss", "value": 1.1}
    (folder / "best.json").write_text(json.dumps(best))
    return folder


def _row(number: int, draw: random.Random, images: Sequence[Path], words: int) -> dict[str, Any]:
    question = " ".join(draw.choices(WORDS, k=draw.randint(3, words)))
    reference = " ".join(draw.choices(WORDS, k=draw.randint(4, words)))
    row: dict[str, Any] = {
        "where": f"data/heldout.jsonl:{number + 1}",
        "message": 1,
        "prompt": f"[gMASK]<sop><|user|>\n{question}<|assistant|>",
        "reference": reference,
        "slices": {"kind": draw.choice(["plain", "tool"]), "language": draw.choice(["chinese", "other"])},
    }  # fmt: skip
    if images:
        row["images"] = [str(images[number % len(images)])]
    return row


def _target(
    folder: Path,
    name: str,
    kind: str,
    step: int | None,
    run: str | None,
    rows: list[dict[str, Any]],
    skill: float,
    draw: random.Random,
    evil: bool,
) -> dict[str, Any]:
    """Replies in which a word is right with the probability `skill`; the score is the share of them."""
    file = Path("predictions") / f"{(run and Path(run).name) or kind}-{step}.jsonl"
    scores = []
    with (folder / file).open("w", encoding="utf-8") as opened:
        for number, row in enumerate(rows):
            right = row["reference"].split(" ")
            words = [word if draw.random() < skill else draw.choice(WORDS) for word in right]
            share = 100 * sum(a == b for a, b in zip(words, right, strict=True)) / len(right)
            scores.append(share)
            found = {"bleu-4": share * 0.8, "rouge-l": share, "exact_match": 100.0 * (share == 100), "stop_rate": 100.0}  # fmt: skip
            reply = EVIL if evil and number == 0 else " ".join(words)
            opened.write(json.dumps(row | {"prediction": reply, "stopped": True, "scores": found}, ensure_ascii=False) + "\n")  # fmt: skip
    return {
        "name": name, "path": f"{run}/checkpoint-{step}" if run else "THUDM/glm-4-9b-chat", "kind": kind,
        "step": step, "run": run, "predictions": str(file), "seconds": 12.5,
        "scores": {metric: _score(scores, factor) for metric, factor in zip(METRICS, (0.8, 1, 0.4, 1), strict=True)},
    }  # fmt: skip


def _score(values: Sequence[float], factor: float = 1.0) -> dict[str, Any]:
    mean = factor * sum(values) / len(values)
    half = 60 / len(values) ** 0.5
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def _slices(
    folder: Path, rows: list[dict[str, Any]], targets: list[dict[str, Any]]
) -> dict[str, Any]:
    slices: dict[str, Any] = {}
    for target in targets:
        lines = (folder / target["predictions"]).read_text(encoding="utf-8").split("\n")[:-1]
        for name in {name for row in rows for name in row["slices"]}:
            values: dict[str, list[float]] = {}
            for line in map(json.loads, lines):
                if name in line["slices"]:
                    values.setdefault(line["slices"][name], []).append(line["scores"]["rouge-l"])
            for value, found in values.items():
                of_value = slices.setdefault(name, {}).setdefault(value, {})
                of_value[target["name"]] = {"rouge-l": _score(found), "bleu-4": _score(found, 0.8)}
    return slices


def _comparisons(targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for later, a in enumerate(targets):
        for b in targets[:later]:
            for metric in METRICS:
                difference = a["scores"][metric]["value"] - b["scores"][metric]["value"]
                verdict = "no real difference" if abs(difference) < 12 else "better" if difference > 0 else "worse"  # fmt: skip
                p = 0.4 if abs(difference) < 12 else 0.0004
                found.append({"a": a["name"], "b": b["name"], "metric": metric, "difference": difference, "low": difference - 9, "high": difference + 9, "p": p / 2, "p_holm": p, "verdict": verdict})  # fmt: skip
    return found
