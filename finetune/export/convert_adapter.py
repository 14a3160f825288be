"""A LoRA adapter for the other layout of its base: the same function, not a bit of it rounded.

To hf, query_key_value becomes q, k and v: each keeps A and takes its rows of B, so rank and alpha stay.
To published, q, k and v become one module. With the same A (as after the way to hf) their B are stacked
and rank and alpha stay. With three A, as trained on that layout, the fused ones are

    A = [A_q; A_k; A_v]      B = diag(B_q, B_k, B_v)      rank = the sum of theirs

and alpha grows with the rank (rsLoRA: with its square root), so that the scale stays.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.artifacts.adapter import PREFIX, LoraFiles
from finetune.artifacts.base_record import check_base
from finetune.artifacts.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD, MODEL_CARD
from finetune.artifacts.weights import TensorInfo, model_fingerprint, tensors
from finetune.errors import ConfigError, ModelError
from finetune.export import card
from finetune.export.adapter import read_adapter
from finetune.export.convert import ExportReport, other_outputs
from finetune.export.folder import FolderPlan, check_output, written
from finetune.export.layout import (
    FUSED,
    LAYOUT_TYPES,
    SPLIT,
    Layout,
    TextModel,
    other_names,
    read_text_model,
)
from finetune.export.merge import find_base
from finetune.export.numbers import STORAGE, rounded, to_float32
from finetune.export.shards import Output, ShardPlan, make_header

_SAMPLE = 64


@dataclass(frozen=True)
class _Part:
    """A stored array as it is: elements of STORAGE[dtype]."""

    dtype: str
    values: NDArray[Any]


@dataclass(frozen=True)
class _Module:
    """What an adapter holds of one module."""

    parts: Mapping[str, _Part]
    """By the end of their names, such as `lora_A.weight`; of a module that was trained whole, `weight`."""
    rank: int = 0
    """0 for a module that was trained whole."""
    alpha: float = 0.0

    def of(self, start: str) -> _Part:
        """The part whose name begins so."""
        return next(part for name, part in self.parts.items() if name.startswith(start))


def export_adapter(
    folder: Path,
    out: Path,
    *,
    layout: Layout,
    base: Path | None = None,
    new_base: str | None = None,
) -> ExportReport:
    """Write the adapter of ``folder`` for the base in ``layout``.

    Args:
        folder: An adapter.
        out: The new folder; must not exist.
        layout: That of the base to come.
        base: The adapter's base, if it is no longer where the adapter says.
        new_base: The same model in ``layout``, a folder or a hub id, for the adapter to name.
    """
    started = time.perf_counter()
    files = read_adapter(folder).files
    base = find_base(folder, base)
    model = read_text_model(base)
    if model.layout == layout:
        raise ConfigError(f"{folder} is for the {layout} layout already; nothing is to be done")
    check_output(out, {base, folder})
    notes = check_base(folder, base)
    config = files.config
    modules = _read_modules(files)
    made = _split(modules, model) if layout == "hf" else _fused(modules, model, config, notes)
    texts = {ADAPTER_CONFIG: _json(_new_config(config, made, model, new_base))}
    if new_base is None:
        notes.append("the adapter names no base; give --new-base to name the model in this layout")
    elif Path(new_base).is_dir():
        _check_same_weights(model, layout, Path(new_base))
        record = {"path": new_base, "revision": None, "fingerprint": model_fingerprint(new_base)}
        texts[BASE_RECORD] = _json({"format": 1, "method": "lora", "base": record})
    done = (
        f"The adapter is for the {layout} layout of its base (model_type {LAYOUT_TYPES[layout]})."
    )
    texts[MODEL_CARD] = card.exported_card(folder, out.name, done, new_base or str(base))
    outputs = [
        Output(f"{PREFIX}{name}.{end}", part.dtype, part.values.shape, constant=part.values.tobytes())
        for name, module in sorted(made.items())
        for end, part in sorted(module.parts.items())
    ]  # fmt: skip
    shard = ShardPlan(ADAPTER_WEIGHTS, make_header(outputs, {"format": "pt"}), tuple(outputs))
    with written(FolderPlan((shard,), texts, {}), out, "exported"):
        pass
    return ExportReport(
        output=out,
        source=folder,
        layout=layout,
        num_tensors=len(outputs),
        num_bytes=shard.size,
        seconds=time.perf_counter() - started,
        notes=(*notes, *_about_rank(config, made)),
    )


def _read_modules(files: LoraFiles) -> dict[str, _Module]:
    """Each module's parts by the end of their names, as the file has them."""
    parts: dict[str, dict[str, _Part]] = {}
    for module, found in files.modules.items():
        start = f"{PREFIX}{module}."
        parts[module] = {t.name.removeprefix(start): _read(t) for t in found.values()}
    for name, tensor in files.whole.items():
        module, _, end = name.rpartition(".")
        if module in files.modules:  # a bias that was trained beside A and B: `base_layer.bias`
            end = tensor.name.removeprefix(f"{PREFIX}{module}.")
        parts.setdefault(module, {})[end] = _read(tensor)
    return {
        module: _Module(found, files.ranks[module], files.alphas[module])
        if module in files.modules
        else _Module(found)
        for module, found in parts.items()
    }


def _read(tensor: TensorInfo) -> _Part:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        stored = file.read(tensor.size)
    return _Part(tensor.dtype, np.frombuffer(stored, STORAGE[tensor.dtype]).reshape(tensor.shape))


def _split(modules: Mapping[str, _Module], model: TextModel) -> dict[str, _Module]:
    made = {}
    for name, module in modules.items():
        names = other_names(name, "hf")
        if len(names) == 1:
            made[names[0]] = module
            continue
        first = 0
        for new, rows in zip(names, model.rows, strict=True):
            part = {
                end: one if end.startswith("lora_A") else _Part(one.dtype, one.values[first : first + rows])
                for end, one in module.parts.items()
            }  # fmt: skip
            made[new] = _Module(part, module.rank, module.alpha)
            first += rows
    return made


def _fused(
    modules: Mapping[str, _Module], model: TextModel, config: Mapping[str, Any], notes: list[str]
) -> dict[str, _Module]:
    made = {}
    for name, module in modules.items():
        (new,) = other_names(name, "published")
        if not new.endswith(FUSED):
            made[new] = module
        elif new not in made:
            at = name.removesuffix(next(end for end in SPLIT if name.endswith(end)))
            found = [modules.get(at + end) for end in SPLIT]
            made[new] = _fuse(found, new, model, config, notes)
    return made


def _fuse(
    three: Sequence[_Module | None],
    name: str,
    model: TextModel,
    config: Mapping[str, Any],
    notes: list[str],
) -> _Module:
    """q, k and v as one module; what is not adapted adds nothing."""
    there = [module for module in three if module is not None]
    # One number for each row: DoRA's lengths, a bias that was trained.
    of_rows = {e for m in there for e in m.parts if not e.startswith(("lora_A", "lora_B"))}
    alike = all(module is not None and of_rows <= module.parts.keys() for module in three)
    if any(module.rank == 0 for module in there) or (of_rows and not alike):
        raise ModelError(
            f"{name}: q, k and v are not adapted alike (some whole, or DoRA or biases of some of them "
            "only), which one module cannot say; merge the adapter and export the merged model"
        )
    a = [module.of("lora_A") for module in there]
    dtype = a[0].dtype
    if any(part.dtype != dtype for module in there for part in module.parts.values()):
        raise ModelError(
            f"{name}: the parts of q, k and v are stored in different dtypes; save them in one dtype"
        )
    b = [np.zeros((rows, 0), STORAGE[dtype]) if module is None else module.of("lora_B").values
         for module, rows in zip(three, model.rows, strict=True)]  # fmt: skip
    same = len(there) == 3 and all(
        np.array_equal(a[0].values, part.values) and module.alpha == there[0].alpha
        for part, module in zip(a, there, strict=True)
    )
    if same:
        rank, alpha = there[0].rank, there[0].alpha
        fused = {"lora_A.weight": a[0].values, "lora_B.weight": np.concatenate(b)}
    else:
        rank = sum(module.rank for module in there)
        root = math.sqrt if config.get("use_rslora") else float
        scale = there[0].alpha / root(there[0].rank)
        alpha = scale * root(rank)
        factors = [1.0 if m is None else m.alpha / root(m.rank) / scale for m in three]
        if any(factor != 1.0 for factor in factors):
            notes.append(f"{name}: q, k and v had different scales, which are in B now (rounded)")
        scaled = [_times(part, dtype, factor) for part, factor in zip(b, factors, strict=True)]
        fused = {
            "lora_A.weight": np.concatenate([part.values for part in a]),
            "lora_B.weight": _diagonal(scaled),
        }
    parts = {end: _Part(dtype, values) for end, values in fused.items()}
    for end in of_rows:
        rows = [module.parts[end].values.reshape(-1) for module in there]
        parts[end] = _Part(dtype, np.concatenate(rows))
    return _Module(parts, rank, alpha)


def _times(part: NDArray[Any], dtype: str, factor: float) -> NDArray[Any]:
    if factor == 1.0 or part.size == 0:
        return part
    return rounded(to_float32(part.tobytes(), dtype, part.shape) * np.float32(factor), dtype)


def _diagonal(blocks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    shape = (sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks))
    out = np.zeros(shape, blocks[0].dtype)
    row = column = 0
    for block in blocks:
        out[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return out


def _new_config(
    config: Mapping[str, Any], made: Mapping[str, _Module], model: TextModel, new_base: str | None
) -> dict[str, Any]:
    adapted = {name: module for name, module in made.items() if module.rank}
    whole = sorted({name.rpartition(".")[2] for name, module in made.items() if not module.rank})
    # The largest rank is the one that readers with a limit must hear of.
    rank, alpha = max(((m.rank, m.alpha) for m in adapted.values()), default=(8, 8.0))
    return {
        **config,
        "base_model_name_or_path": new_base,
        "revision": None,
        "target_modules": sorted(_short(adapted, model)),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": whole or None,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": _pattern({n: m.rank for n, m in adapted.items()}, rank, model),
        "alpha_pattern": _pattern({n: _number(m.alpha) for n, m in adapted.items()}, _number(alpha), model),
    }  # fmt: skip


def _pattern(values: Mapping[str, Any], default: Any, model: TextModel) -> dict[str, Any]:
    """The values that are not the default, by the shortest names that say no more."""
    found: dict[str, Any] = {}
    for value in sorted({value for value in values.values() if value != default}):
        names = [name for name, one in values.items() if one == value]
        found |= dict.fromkeys(sorted(_short(names, model)), value)
    return found


def _short(names: Mapping[str, Any] | Sequence[str], model: TextModel) -> set[str]:
    """The last words of ``names`` where they mean the same modules, else the whole names."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    layers = model.config.num_hidden_layers
    short = set()
    for name in names:
        end = name.rpartition(".")[2]
        short.add(end if counts[end] == (layers if ".layers." in name else 1) else name)
    return short


def _number(alpha: float) -> float | int:
    return int(alpha) if alpha.is_integer() else alpha


def _about_rank(config: Mapping[str, Any], made: Mapping[str, _Module]) -> list[str]:
    fused = {(m.rank, m.alpha) for name, m in made.items() if name.endswith(FUSED)}
    return [
        f"query_key_value has rank {rank} and alpha {alpha:g}, so that the scale is as before "
        f"(q, k and v had an A each); vLLM wants --max-lora-rank of at least {rank}"
        for rank, alpha in sorted(fused)
        if rank > config.get("r", 8)
    ]


def _check_same_weights(model: TextModel, layout: Layout, folder: Path) -> None:
    """Refuse a new base whose tensors do not begin with the bytes of the old one's."""
    if read_text_model(folder).layout != layout:
        raise ConfigError(
            f"--new-base {folder} is not in the {layout} layout; make it with `finetune export`"
        )
    found = tensors(folder)
    for output in other_outputs(model, layout):
        if not output.sources:
            continue
        here, there = output.sources[0], found.get(output.name)
        if there is None or there.shape != output.shape or _start(here) != _start(there):
            raise ModelError(
                f"--new-base {folder} is not {model.folder} in the {layout} layout: {output.name} "
                "is another; make it with `finetune export`"
            )


def _start(tensor: TensorInfo) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return file.read(min(_SAMPLE, tensor.size))


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
