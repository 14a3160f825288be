"""The config.json of a model folder, checked before anything is built by it. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.plain_files import read_json
from finetune.artifacts.weights import FLOATS, TensorInfo, tensors
from finetune.errors import ModelError

_LAYERS = ("num_layers", "num_hidden_layers", "depth")
# Each is a side of some matrix, or divides one.
_SIDES = (
    "hidden_size", "ffn_hidden_size", "intermediate_size", "kv_channels", "head_dim", "vocab_size",
    "num_attention_heads", "num_heads", "multi_query_group_num", "num_key_value_heads",
    "padded_vocab_size", "out_hidden_size", "patch_size", "in_channels", "spatial_merge_size",
    "temporal_patch_size", "num_positions",
)  # fmt: skip
_COUNTS = ("seq_length", "max_position_embeddings", "image_size")
_NUMBERS = (
    "rms_norm_eps", "layernorm_epsilon", "layer_norm_eps", "rope_ratio", "rope_theta",
    "attention_dropout", "hidden_dropout", "dropout_prob", "initializer_range", "partial_rotary_factor",
)  # fmt: skip
_FLAGS = ("use_cache", "tie_word_embeddings", "add_qkv_bias", "attention_bias", "rmsnorm")
_LABELS = ("num_labels", "_num_labels")
_MOST_LABELS = (
    10_000  # transformers makes two dicts of so many entries, which a chat model never reads
)
_IDS = (
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "boi_token_id",
    "eoi_token_id",
    "image_token_id",
)
_INNER = ("text_config", "vision_config", "rope_parameters", "rope_scaling")
_LISTED = 5


def read_model_config(folder: Path) -> dict[str, Any]:
    """The config of a model, every value of a kind that it can have and no size beyond the weights'.

    So a config that asks for a billion layers, or for heads of a million numbers, is refused before
    anything is built or allocated by it.

    Raises:
        ModelError: Names the keys that cannot be, or the weights are no floating-point numbers.
    """
    config = read_json(folder / MODEL_CONFIG)
    stored = tensors(folder)
    check_floats(folder, stored)
    layers, side = len(stored), max((n for t in stored.values() for n in t.shape), default=0)
    problems = [
        problem for _, values in _sections(config) for problem in _problems(values, layers, side)
    ]
    problems += [f"{key} is no object" for key in _INNER if not _is_section(config.get(key))]
    if problems:
        raise ModelError(
            f"{folder / MODEL_CONFIG}: {'; '.join(problems[:_LISTED])}. "
            "Use the config.json that belongs to these weights"
        )
    return config


def check_floats(folder: Path, stored: Mapping[str, TensorInfo]) -> None:
    """Refuse weights that are integers or 8-bit floats: without their scales they mean nothing.

    Raises:
        ModelError: Names the first of them.
    """
    odd = [tensor for tensor in stored.values() if tensor.dtype not in FLOATS]
    if odd:
        raise ModelError(
            f"{folder} holds {len(odd)} tensors that are not {', '.join(FLOATS)}, such as "
            f"{odd[0].name} ({odd[0].dtype}): quantised weights without their scales; "
            "give the unquantised checkpoint"
        )


def _sections(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    inner = [(key, config[key]) for key in _INNER if isinstance(config.get(key), dict)]
    return [("", config), *inner]


def _problems(values: Mapping[str, Any], layers: int, side: int) -> list[str]:
    rules: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
        (
            _LAYERS,
            lambda v: is_count(v, layers),
            f"from 1 to {layers} (there are as many tensors)",
        ),
        (_SIDES, lambda v: is_count(v, side), f"from 1 to {side} (the longest side of a tensor)"),
        (_COUNTS, is_count, "a whole number above 0"),
        (_LABELS, lambda v: is_count(v, _MOST_LABELS), f"from 1 to {_MOST_LABELS}"),
        (_NUMBERS, is_number, "a finite number"),
        (_FLAGS, lambda v: isinstance(v, bool), "true or false"),
        (_IDS, _is_ids, "a token id"),
    ]
    problems = [
        f"{key} is {shown(values[key])}, must be {text}"
        for keys, fits, text in rules
        for key in keys
        if values.get(key) is not None and not fits(values[key])
    ]
    image, patch = values.get("image_size"), values.get("patch_size")
    if not problems and image and patch and (image // patch) ** 2 > side:
        problems.append(f"image_size {image} makes {(image // patch) ** 2:,} patches of {patch}")
    return problems


def _is_section(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def is_count(value: Any, largest: int = 1 << 31) -> bool:
    """Whether it is a whole number from 1 to `largest`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest


def is_number(value: Any) -> bool:
    """Whether it is a finite number, none of a thousand digits."""
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and abs(value) <= sys.float_info.max


def _is_ids(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return all(isinstance(v, int) and not isinstance(v, bool) and -1 <= v < 1 << 31 for v in listed)


def shown(value: Any) -> str:
    """A value of somebody's JSON in a message, however long it is."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
