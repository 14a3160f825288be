"""Adapter + base -> a plain checkpoint that opens wherever the base opens, tensor by tensor.

Same shards, same index, same other files as the base; only the tensors that the adapter changes
differ. Computed in float32 and rounded once to the base's dtype: what PEFT's merge gives for
float32 adapters, without its memory.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from finetune.artifacts.base_record import check_base
from finetune.artifacts.experts import fused_names
from finetune.artifacts.model_config import check_floats
from finetune.artifacts.names import MODEL_CARD, MODEL_CONFIG, WEIGHTS_INDEX
from finetune.artifacts.plain_files import check_folder, read_json
from finetune.artifacts.resolve import find_source, is_adapter, local_folder, model_base
from finetune.artifacts.weights import TensorInfo, read_shard, weight_files
from finetune.errors import ConfigError, ModelError
from finetune.export import adapter as adapters
from finetune.export import card
from finetune.export.adapter import Adapter
from finetune.export.folder import FolderPlan, carried, check_output, written
from finetune.export.shards import Output, ShardPlan, make_header
from finetune.export.vocabulary import (
    EMBEDDING_AND_HEAD,
    added_rows,
    check_can_open,
    tokenizer_of,
    with_more_tokens,
)

Check = Literal["none", "tensors", "full"]
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    output: Path
    source: tuple[tuple[Path, float], ...]
    """The adapters that were merged, each with its weight; or the one checkpoint."""
    base: Path
    num_updated: int
    """Tensors that a LoRA update was added to."""
    num_replaced: int
    """Tensors that were taken from the adapter whole."""
    untied: bool
    """Whether input and output embedding were one matrix before and are two now."""
    num_bytes: int
    seconds: float
    largest_difference: float | None
    """Between the logits of base + adapter and of the output; None unless `check` was `full`."""
    notes: tuple[str, ...] = ()


def merge(
    adapter: Path | Sequence[tuple[Path, float]],
    out: Path,
    *,
    base: Path | None = None,
    dtype: str | None = None,
    force: bool = False,
    check: Check = "tensors",
    device_map: str | None = None,
) -> MergeReport:
    """Write the checkpoint that ``adapter`` and its base make together to ``out``.

    Args:
        adapter: A run directory (its best or newest good checkpoint), a checkpoint, or an adapter;
            of a fully tuned checkpoint the weights are taken as they are. Or several LoRA
            adapters of one base, each with the factor for what it adds.
        out: The new folder; must not exist.
        base: The base, if it is no longer where the adapter says.
        dtype: bfloat16, float16 or float32, if not the base's own.
        force: Merge into a base whose fingerprint is not that of the adapter's.
        check: `tensors` checks every row of every changed matrix while it is written, and reads all
            tensors' ends back; `full` also compares the logits of base + adapter with those of the
            output, for which both are loaded whole.
        device_map: `auto` for what `full` loads: over all accelerators, else on the CPU.
    """
    started = time.perf_counter()
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is none of {', '.join(DTYPES)}; choose one of these")
    sources, notes = _find_sources([(adapter, 1.0)] if isinstance(adapter, Path) else adapter)
    weighted = [(adapters.read_adapter(source), w) for source, w in sources if is_adapter(source)]
    tuned = adapters.combined(weighted) if weighted else None
    base = find_base(sources[0][0], base)
    check_output(out, {base, *(source for source, _ in sources)})
    for one, _ in weighted:
        notes += check_base(one.folder, base, force=force)
    plan, untied, more_tokens = _plan(base, tuned, dtype, checked=check != "none")
    check_can_open(more_tokens, check)
    files, said = tokenizer_of(sources[0][0], more_tokens)
    notes += said
    card_text = _card(out, base, sources, weighted)
    plan = replace(
        plan, texts={**plan.texts, MODEL_CARD: card_text}, copies={**plan.copies, **files}
    )
    difference = None
    with written(plan, out, "merged", check=check != "none") as stage:
        if check == "full" and tuned is not None:
            from finetune.export.parity import check_parity

            difference = check_parity(base, sources, stage, device_map=device_map)
    return MergeReport(
        output=out,
        source=tuple(sources),
        base=base,
        num_updated=len(tuned.updates) if tuned else 0,
        num_replaced=len(tuned.replacements) if tuned else 0,
        untied=untied,
        num_bytes=plan.size,
        seconds=time.perf_counter() - started,
        largest_difference=difference,
        notes=tuple(notes),
    )


def _card(
    out: Path,
    base: Path,
    sources: Sequence[tuple[Path, float]],
    weighted: Sequence[tuple[Adapter, float]],
) -> str:
    done = "A fully tuned GLM-4 as one plain checkpoint."
    if weighted:
        named = model_base(weighted[0][0].folder, str(base)).path
        what = "A LoRA adapter" if len(weighted) == 1 else f"{len(weighted)} LoRA adapters"
        done = (
            f"{what} merged into {card.public_name(named)}: plain weights, opened as the base is."
        )
    return card.model_card(out.name, done, str(base), sources)


def _find_sources(
    given: Sequence[tuple[Path, float]],
) -> tuple[list[tuple[Path, float]], list[str]]:
    found, notes = [], []
    for path, weight in given:
        source, said = find_source(path)
        if not is_adapter(source) and (len(given) > 1 or weight != 1):
            raise ConfigError(
                f"{source} is a whole model; only adapters are added up or weighted, so leave it out"
            )
        if not math.isfinite(weight):
            raise ConfigError(f"{path}: the weight must be a finite number, got {weight}")
        found.append((source, weight))
        notes += said
    if len({source.resolve() for source, _ in found}) < len(found):
        raise ConfigError(
            f"one adapter is given twice: {', '.join(str(path) for path, _ in given)}; add up its weights"
        )
    return found, notes


def find_base(source: Path, given: Path | None) -> Path:
    """The folder of the base of an adapter; of a whole model its own."""
    if not is_adapter(source):
        if given is not None:
            raise ConfigError(
                f"--base does not apply: {source} is a whole model, not an adapter; leave it out"
            )
        return source
    weights = model_base(source, str(given) if given else None)
    try:
        return local_folder(weights.path, weights.revision)
    except ModelError as error:
        if given is not None:
            raise
        raise ModelError(
            f"the base of {source} is not where it was: {error}. Give its new place with --base"
        ) from error


def _plan(
    base: Path, tuned: Adapter | None, dtype: str | None, *, checked: bool
) -> tuple[FolderPlan, bool, int]:
    """What is written; whether the embeddings become two; how many tokens more there are."""
    check_folder(base)
    shards = [read_shard(file) for file in weight_files(base)]
    config = read_json(base / MODEL_CONFIG)
    present = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    check_floats(base, present)
    extra = _untied_head(config, present, tuned)
    more_tokens = added_rows(tuned, {**present, **extra})
    _check_fit(tuned, {**present, **extra}, base, longer=more_tokens > 0)
    plans = []
    for shard in shards:
        sources = [extra.get(tensor.name, tensor) for tensor in shard.tensors]
        names = [tensor.name for tensor in shard.tensors]
        for head, embedding in extra.items():
            if embedding.file == shard.file and head not in present:
                names, sources = [*names, head], [*sources, embedding]
        outputs = tuple(
            _output(name, tensor, tuned, dtype, checked)
            for name, tensor in zip(names, sources, strict=True)
        )
        same = len(outputs) == len(shard.tensors) and all(
            (new.dtype, new.shape) == (old.dtype, old.shape)
            for new, old in zip(outputs, shard.tensors, strict=True)
        )
        header = shard.header if same else make_header(outputs, shard.metadata)
        plans.append(ShardPlan(shard.file.name, header, outputs))
    texts = _new_texts(base, config, plans, dtype=dtype, untied=bool(extra), more=more_tokens)
    copies = {name: file for name, file in carried(base).items() if name not in texts}
    return FolderPlan(tuple(plans), texts, copies), bool(extra), more_tokens


def _untied_head(
    config: Mapping[str, Any], present: Mapping[str, TensorInfo], tuned: Adapter | None
) -> dict[str, TensorInfo]:
    """The output matrix of its own that a tied model needs once the adapter touches one of the two.

    An adapter on the input embedding leaves the output embedding as it was, and the other way
    round; one stored matrix could not hold both.
    """
    touched = {*tuned.updates, *tuned.replacements} if tuned else set()
    for embedding, head in EMBEDDING_AND_HEAD:
        if (
            config.get("tie_word_embeddings")
            and embedding in present
            and touched & {embedding, head}
        ):
            return {head: present[embedding]}
    return {}


def _check_fit(
    tuned: Adapter | None, present: Mapping[str, TensorInfo], base: Path, *, longer: bool
) -> None:
    embeddings = [name for pair in EMBEDDING_AND_HEAD for name in pair] if longer else []
    modules = [name.removesuffix(".weight") for name, t in present.items() if len(t.shape) == 2]
    modules += fused_names(present)
    problems = tuned.files.misfits(modules) if tuned else []
    for name, update in (tuned.updates if tuned else {}).items():
        wanted = (update.b.shape[0], update.a.shape[1])
        if name not in present:
            problems.append(f"{name} is not there")
        elif present[name].shape != wanted:
            problems.append(f"{name} is {present[name].shape}, the adapter's is {wanted}")
    for name, tensor in (tuned.replacements if tuned else {}).items():
        if name not in present:
            problems.append(f"{name} is not there")
        elif present[name].shape != tensor.shape and name not in embeddings:
            problems.append(f"{name} is {present[name].shape}, the adapter's is {tensor.shape}")
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"the adapter does not fit {base}:\n{shown}{more}\nGive its own base")


def _output(
    name: str, tensor: TensorInfo, tuned: Adapter | None, dtype: str | None, checked: bool
) -> Output:
    wanted = DTYPES[dtype] if dtype else tensor.dtype
    update = tuned.updates.get(name) if tuned else None
    replacement = tuned.replacements.get(name) if tuned else None
    source = replacement or tensor
    return Output(name, wanted, source.shape, (source,), update, checked)


def _new_texts(
    base: Path,
    config: Mapping[str, Any],
    plans: Sequence[ShardPlan],
    *,
    dtype: str | None,
    untied: bool,
    more: int,
) -> dict[str, str]:
    """config.json and the index where they cannot stay as they are."""
    texts = {}
    changed = with_more_tokens(config, more)
    if untied:
        changed["tie_word_embeddings"] = False
    if dtype:
        changed["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if changed != config:
        texts[MODEL_CONFIG] = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
    if (base / WEIGHTS_INDEX).is_file():
        index = read_json(base / WEIGHTS_INDEX)
        if untied or dtype or more:
            index["weight_map"] = {o.name: plan.name for plan in plans for o in plan.outputs}
            total = sum(o.size for plan in plans for o in plan.outputs)
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
            texts[WEIGHTS_INDEX] = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    return texts
