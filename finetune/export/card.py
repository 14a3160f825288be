"""README.md of what merge and export write: where it comes from, and what it scored.

Only what others may read goes in: of files and folders their last name, of the options those that shape
what is learnt. No file is listed by its path here, and nothing of `training.extra`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

from finetune import __version__
from finetune.artifacts.names import (
    ADAPTER_CONFIG,
    BASE_RECORD,
    EVALUATION,
    MANIFEST,
    MODEL_CARD,
    RUN_DATA,
    RUN_RECORD,
    TRAINER_STATE,
)
from finetune.artifacts.resolve import is_adapter, is_hub_id

_SHOWN = (
    "method.",
    "training.",
    "data.",
    "deepspeed.",
    "model.adapter",
    "model.freeze",
    "model.quantization",
)
_HIDDEN = (
    "method.kind", "data.train", "data.validation", "data.format", "data.columns", "data.on_bad_row",
    "data.ignore_columns", "data.max_overlap", "data.group_by",
    "data.max_bad_rows", "data.image_root", "data.loader_workers", "data.cache_dir",
    "data.cache_image_features", "training.output_dir", "training.log_every_steps",
    "training.save_every_steps", "training.keep_checkpoints", "training.on_full_disk",
    "training.on_end", "training.resume", "training.report_to", "training.process_timeout_minutes", "training.extra",
    "deepspeed.config",
)  # fmt: skip


def model_card(
    title: str,
    done: str,
    base: str,
    sources: Sequence[tuple[Path, float]] = (),
    *,
    library: str = "transformers",
    named: str | None = None,
) -> str:
    """The card's text.

    Args:
        title: The output's name.
        done: What was done, one sentence.
        base: The base's path or hub id.
        sources: The tuned folders that went in, each with its weight.
        library: What opens the output.
        named: The base's hub id, where that is known better than by the sources' records.
    """
    records = [_json(folder / BASE_RECORD) for folder, _ in sources]
    found = [str((record.get("base") or {}).get("path") or base) for record in records]
    base = named or (found[0] if found else base)
    parts = [_front(base, library), f"# {title}\n\n{done}\n"]
    for (folder, weight), record in zip(sources, records, strict=True):
        heading = f"Adapter {folder.name}, weight {weight:g}" if len(sources) > 1 else "Training"
        parts.append(f"## {heading}\n\n{_about(folder, record, base)}")
    parts.append(
        f"Written by glm4-finetune {__version__} (transformers {version('transformers')}).\n"
    )
    return "\n".join(parts)


def exported_card(folder: Path, title: str, done: str, base: str) -> str:
    """The card of a tuned or merged ``folder`` in another layout: its own where it has one of ours."""
    own = folder / MODEL_CARD
    if own.is_file() and (folder / MANIFEST).is_file():
        return own.read_text(encoding="utf-8") + f"\n{done}\n"
    tuned = [(folder, 1.0)] if (folder / BASE_RECORD).is_file() else []
    library = "peft" if is_adapter(folder) else "transformers"
    return model_card(title, done, base, tuned, library=library)


def public_name(path: str) -> str:
    """A hub id as it is, of anything else the last name."""
    return path if is_hub_id(path) else PurePath(path).name


def _front(base: str, library: str) -> str:
    named = [f"base_model: {base}"] if is_hub_id(base) else []
    lines = [*named, f"library_name: {library}", "pipeline_tag: text-generation", "tags: [glm-4]"]
    return "\n".join(["---", *lines, "---", ""])


def _about(folder: Path, record: Mapping[str, Any], base: str) -> str:
    run = _json(folder / RUN_RECORD)
    config, facts = run.get("config") or {}, run.get("facts") or {}
    state = _json(folder / TRAINER_STATE)
    data = _json(folder.parent / RUN_DATA)
    rows = [("base", f"{public_name(base)}{_mark((record.get('base') or {}).get('fingerprint'))}")]
    rows.append(("method", str(config.get("method.kind") or record.get("method") or _kind(folder))))
    if "global_step" in state:
        rows.append(("steps", f"{state['global_step']}, {_sharded(facts)}"))
    for key, name in (("train", "trained on"), ("validation", "held out")):
        if config.get(f"data.{key}"):
            rows.append((name, _data(config[f"data.{key}"], data.get(key) or {})))
    text = _table(("", ""), rows)
    told = [(key, _value(value)) for key, value in config.items() if _is_shown(key, value)]
    if told:
        text += f"\n### Options\n\n{_table(('key', 'value'), told)}"
    text += _scores(folder, state)
    if run.get("versions"):
        text += "\n### Versions\n\n"
        text += ", ".join(f"{name} {number}" for name, number in run["versions"].items()) + "\n"
    return text


def _kind(folder: Path) -> str:
    config = _json(folder / ADAPTER_CONFIG)
    if not config:
        return "full"
    return f"{str(config.get('peft_type')).lower()}, rank {config.get('r')}, alpha {config.get('lora_alpha')}"


def _sharded(facts: Mapping[str, Any]) -> str:
    sharding = str(facts.get("deepspeed", "none")).split(",")[0]
    batch = f"{facts.get('global_batch')} examples each" if facts.get("global_batch") else ""
    return ", ".join(part for part in (batch, "" if sharding == "none" else sharding) if part)


def _data(listed: Any, counts: Mapping[str, Any]) -> str:
    """File names, counts and fingerprint of training or held-out data."""
    sources = listed if isinstance(listed, list) else [listed]
    paths = [source["path"] if isinstance(source, dict) else source for source in sources]
    text = ", ".join(PurePath(str(path)).name for path in paths)
    if "examples" in counts:
        text += f": {counts['examples']:,} examples"
        text += f" of {counts['rows']:,} rows" if "rows" in counts else ""
        if "supervised_tokens" in counts:
            text += f", {counts['supervised_tokens']:,} of {counts['tokens']:,} tokens carry loss"
    return text + _mark(counts.get("fingerprint"))


def _mark(fingerprint: Any) -> str:
    return f" (fingerprint `{str(fingerprint)[:16]}`)" if fingerprint else ""


def _is_shown(key: str, value: Any) -> bool:
    is_said = value is not False and value not in (None, [], {})  # a seed of 0 is
    return key.startswith(_SHOWN) and key not in _HIDDEN and is_said


def _value(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", "\\|")


def _scores(folder: Path, state: Mapping[str, Any]) -> str:
    """Of `finetune evaluate` on this checkpoint if there are any, else of its training."""
    for file in sorted(folder.parent.glob(f"evaluation*/{EVALUATION}")):
        report = _json(file)
        for target in report.get("targets") or ():
            if Path(str(target.get("path"))).resolve() == folder.resolve():
                names = ", ".join(
                    f"{PurePath(str(data['path'])).name}{_mark(data.get('fingerprint'))}"
                    for data in report.get("data") or ()
                )
                rows = [(name, *_interval(score)) for name, score in target["scores"].items()]
                text = f"\n### Scores on {names}\n\n"
                text += _table(("metric", "value", "95 % interval", "n"), rows)
                return text + _signatures(report.get("signatures") or {}, target["scores"])
    logged = [entry for entry in state.get("log_history") or () if "eval_loss" in entry]
    if not logged or logged[-1].get("step") != state.get("global_step"):
        return ""
    from finetune.evaluation.scores.metrics import signatures

    scores = {k.removeprefix("eval_"): v for k, v in logged[-1].items() if k.startswith("eval_")}
    text = "\n### Scores on the held-out data in training\n\n"
    text += _table(("metric", "value"), [(k, _number(v)) for k, v in sorted(scores.items())])
    return text + _signatures(signatures(), scores)


def _signatures(said: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    lines = [f"* {name}: {text}" for name, text in said.items() if name in scores]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _interval(score: Mapping[str, Any]) -> tuple[str, str, str]:
    low, high = score.get("low"), score.get("high")
    between = "" if low is None or high is None else f"{_number(low)} to {_number(high)}"
    return _number(score.get("value")), between, str(score.get("n", ""))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _json(file: Path) -> dict[str, Any]:
    """What a file says; a card does without what is not there."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
