"""`finetune export`: a GLM-4 text checkpoint in its other layout, with all that opens beside it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.artifacts.names import (
    GENERATION_CONFIG,
    MODEL_CARD,
    MODEL_CONFIG,
    SENTENCEPIECE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS_INDEX,
)
from finetune.artifacts.plain_files import read_json_if_there
from finetune.artifacts.resolve import find_source, is_adapter, is_folder, local_folder
from finetune.artifacts.weights import ITEM_SIZE, Shard, TensorInfo, read_shard, weight_files
from finetune.data.chat.tokenizer import load_chat_tokenizer, tokenizer_file
from finetune.errors import ConfigError, ModelError
from finetune.export import card
from finetune.export.folder import FolderPlan, carried, check_output, written
from finetune.export.layout import (
    EMBEDDING,
    FUSED,
    HEAD,
    LAYOUT_TYPES,
    ROTARY_BUFFER,
    SPLIT,
    Layout,
    TextModel,
    hf_config,
    other_names,
    published_config,
    read_text_model,
)
from finetune.export.merge import DTYPES, Check
from finetune.export.numbers import Floats, rounded
from finetune.export.shards import Output, ShardPlan, make_header


@dataclass(frozen=True)
class ExportReport:
    """What an export did."""

    output: Path
    source: Path
    layout: Layout
    num_tensors: int
    num_bytes: int
    seconds: float
    largest_difference: float | None = None
    """Between the logits in both layouts; None unless `check` was `full`."""
    notes: tuple[str, ...] = ()


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
    from finetune.export.convert_adapter import export_adapter  # imports this module

    folder, notes = find_source(Path(source) if is_folder(source) else local_folder(source))
    if is_adapter(folder):
        location = Path(base) if base else None
        report = export_adapter(folder, out, layout=layout, base=location, new_base=new_base)
    elif base or new_base:
        raise ConfigError(
            f"--base and --new-base do not apply: {folder} is a whole model; leave them out"
        )
    else:
        report = export_model(folder, out, layout=layout, check=check)
    return replace(report, notes=(*notes, *report.notes))


def export_model(
    folder: Path, out: Path, *, layout: Layout, check: Check = "tensors"
) -> ExportReport:
    """Write the model of ``folder`` in ``layout`` to ``out``.

    Args:
        folder: A whole model: a base, a merged or a fully tuned one.
        out: The new folder; must not exist.
        layout: What it is not yet.
        check: `tensors` reads every tensor's ends back from the disk; `full` also compares the logits
            of both, for which both are loaded whole.
    """
    started = time.perf_counter()
    notes: list[str] = []
    model = read_text_model(folder)
    if model.layout == layout:
        raise ConfigError(f"{folder} is in the {layout} layout already; nothing is to be done")
    check_output(out, {folder})
    plan = _plan(model, layout, notes)
    done = f"Its weights are in the {layout} layout (model_type {LAYOUT_TYPES[layout]})."
    text = card.exported_card(folder, out.name, done, str(folder))
    plan = replace(plan, texts={**plan.texts, MODEL_CARD: text})
    difference = None
    with written(plan, out, "exported", check=check != "none") as stage:
        if check == "full":
            from finetune.export.parity import check_parity  # imports torch

            difference = check_parity(folder, (), stage)
    return ExportReport(
        output=out,
        source=folder,
        layout=layout,
        num_tensors=sum(len(shard.outputs) for shard in plan.shards),
        num_bytes=plan.size,
        seconds=time.perf_counter() - started,
        largest_difference=difference,
        notes=tuple(notes),
    )


def _plan(model: TextModel, layout: Layout, notes: list[str]) -> FolderPlan:
    shards = [read_shard(file) for file in weight_files(model.folder)]
    present = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    kept = next((s.metadata[ROTARY_BUFFER] for s in shards if ROTARY_BUFFER in s.metadata), "")
    plans = []
    for shard in shards:
        outputs = _outputs(shard, model, present, layout)
        if layout == "published" and any(EMBEDDING[layout] in output.name for output in outputs):
            outputs.append(_rotary_buffer(kept, model, outputs[0].dtype))
        header = make_header(outputs, {"format": "pt", **_stash_rotary(shard)})
        plans.append(ShardPlan(shard.file.name, header, tuple(outputs)))
    texts = _texts(model, layout, _dtype(present, model), notes)
    if (model.folder / WEIGHTS_INDEX).is_file():
        total = sum(output.size for plan in plans for output in plan.outputs)
        names = {output.name: plan.name for plan in plans for output in plan.outputs}
        texts[WEIGHTS_INDEX] = _json({"metadata": {"total_size": total}, "weight_map": names})
    copies = {
        name: file
        for name, file in carried(model.folder).items()
        if name not in texts and not name.endswith(".py")
    }
    if TOKENIZER_CONFIG in texts:
        copies[TOKENIZER] = tokenizer_file(model.folder)
    return FolderPlan(tuple(plans), texts, copies)


def other_outputs(model: TextModel, layout: Layout) -> list[Output]:
    """Every tensor of ``model`` as it is in ``layout``."""
    shards = [read_shard(file) for file in weight_files(model.folder)]
    present = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    return [output for shard in shards for output in _outputs(shard, model, present, layout)]


def _outputs(
    shard: Shard, model: TextModel, present: Mapping[str, TensorInfo], layout: Layout
) -> list[Output]:
    """The tensors of one file."""
    outputs: list[Output] = []
    for tensor in shard.tensors:
        if tensor.name == ROTARY_BUFFER or (model.tied and tensor.name == f"{HEAD['hf']}.weight"):
            continue
        outputs += _renamed(tensor, model, present, layout)
        if model.tied and tensor.name == f"{EMBEDDING['hf']}.weight":
            outputs.append(_output(f"{HEAD[layout]}.weight", tensor))
    return outputs


def _renamed(
    tensor: TensorInfo, model: TextModel, present: Mapping[str, TensorInfo], layout: Layout
) -> list[Output]:
    module, _, kind = tensor.name.rpartition(".")
    names = other_names(module, layout)
    if module.endswith(FUSED):
        _check_rows(tensor, sum(model.rows))
        found, first = [], 0
        for name, rows in zip(names, model.rows, strict=True):
            part = tensor.rows(first, first + rows)
            found.append(_output(f"{name}.{kind}", part))
            first += rows
        return found
    if not module.endswith(SPLIT):
        return [_output(f"{names[0]}.{kind}", tensor)]
    at = module.removesuffix(next(name for name in SPLIT if module.endswith(name)))
    siblings = [f"{at}{name}.{kind}" for name in SPLIT]
    if missing := [name for name in siblings if name not in present]:
        raise ModelError(f"{model.folder} has {tensor.name} but no {missing[0]}; copy it again")
    if tensor.name != siblings[0]:
        return []  # k and v go where q goes
    parts = [present[name] for name in siblings]
    for part, rows in zip(parts, model.rows, strict=True):
        _check_rows(part, rows)
    if len({part.dtype for part in parts}) > 1:
        raise ModelError(
            f"{model.folder}: q, k and v of {at} have different dtypes; save them in one dtype"
        )
    return [_output(f"{names[0]}.{kind}", *parts)]


def _output(name: str, *sources: TensorInfo) -> Output:
    shape = (sum(source.shape[0] for source in sources), *sources[0].shape[1:])
    return Output(name, sources[0].dtype, shape, sources)


def _check_rows(tensor: TensorInfo, rows: int) -> None:
    if tensor.shape[0] != rows:
        raise ModelError(
            f"{tensor.name} has {tensor.shape[0]} rows and the config says {rows}; "
            "use the config.json that belongs to these weights"
        )


def _stash_rotary(shard: Shard) -> dict[str, str]:
    """The rotary buffer, if the model has one, as metadata, from which the way back restores it."""
    for tensor in shard.tensors:
        if tensor.name == ROTARY_BUFFER:
            with tensor.file.open("rb") as file:
                file.seek(tensor.start)
                return {ROTARY_BUFFER: f"{tensor.dtype} {file.read(tensor.size).hex()}"}
    return {}


def _rotary_buffer(kept: str, model: TextModel, dtype: str) -> Output:
    """The unused buffer as it was before, or else as the published code makes it."""
    if match := re.fullmatch(r"(BF16|F16|F32) ([0-9a-f]+)", kept):
        content = bytes.fromhex(match[2])
        shape = (len(content) // ITEM_SIZE[match[1]],)
        return Output(ROTARY_BUFFER, match[1], shape, constant=content)
    channels = model.config.head_dim // 2
    exponents = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    values: Floats = (1 / np.power(np.float32(10000), exponents)).astype(np.float32)
    stored = rounded(values, dtype)
    return Output(ROTARY_BUFFER, dtype, stored.shape, constant=stored.tobytes())


def _dtype(present: Mapping[str, TensorInfo], model: TextModel) -> str:
    """That of the weights, as a config.json names it."""
    embedding = f"{EMBEDDING[model.layout]}.weight"
    if embedding not in present:
        raise ModelError(f"{model.folder} has no {embedding}; copy it again")
    return next(name for name, stored in DTYPES.items() if stored == present[embedding].dtype)


def _texts(model: TextModel, layout: Layout, dtype: str, notes: list[str]) -> dict[str, str]:
    """config.json, generation_config.json and tokenizer_config.json."""
    folder, texts = model.folder, {}
    generation = read_json_if_there(folder / GENERATION_CONFIG)
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    if any((folder / name).is_file() for name in (TOKENIZER, SENTENCEPIECE)):
        tokenizer = load_chat_tokenizer(folder)
        eos, pad = list(tokenizer.stop_ids), tokenizer.pad_id
        settings = read_json_if_there(folder / TOKENIZER_CONFIG)
        settings.pop("auto_map", None)  # names code of the other layout
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings["chat_template"] = tokenizer.chat_template
        texts[TOKENIZER_CONFIG] = _json(settings)
    else:
        notes.append(f"{folder} has no tokenizer, so none was written")
    make = hf_config if layout == "hf" else published_config
    texts[MODEL_CONFIG] = _json(make(model, dtype, eos, pad))
    texts[GENERATION_CONFIG] = _json(generation | {"eos_token_id": eos, "pad_token_id": pad})
    return texts


def _json(value: Mapping[str, Any] | Sequence[Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
