"""An adapter folder, checked whole before anything opens or merges it. No torch.

What is not understood is refused by name: a setting that PEFT would read and we would not, a tensor
that is missing, misnamed, misshapen or left over. Otherwise the adapter would be another function
than the one that was trained, or none at all, and nobody would hear of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.artifacts.experts import PARTS, fused_part
from finetune.artifacts.model_config import is_count, is_number, shown
from finetune.artifacts.names import ADAPTER_CONFIG
from finetune.artifacts.regex import match_names
from finetune.artifacts.resolve import adapter_config
from finetune.artifacts.weights import FLOATS, TensorInfo, adapter_file, read_shard
from finetune.errors import ModelError

PREFIX = "base_model.model."
"""In front of every name, as PEFT writes them."""
PREFIX_TENSOR = "prompt_embeddings"
"""The one tensor of a P-Tuning v2 adapter."""
ALL_LINEAR = "all-linear"
DORA = "lora_magnitude_vector"

# Settings of peft.LoraConfig under which W + scale * B @ A is not what the adapter computes, or that
# name modules in a way of their own.
_REFUSED = (
    "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "layer_replication",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config", "layers_pattern",
    "monteclora_config", "megatron_config", "ensure_weight_tying", "velora_config",
)  # fmt: skip
# Settings that change nothing once an adapter is trained.
_INERT = (
    "peft_type", "peft_version", "auto_mapping", "inference_mode", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "encoder_hidden_size",
    "init_weights", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
)  # fmt: skip
_OF_TRAINING = ("init_lora_weights", "megatron_core")
# Initialisations that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and others change it.
_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", None)

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)"
)
_SAVED = re.compile(r"\.modules_to_save\.(?:default\.)?")
_NEEDED = ("target_modules", "num_virtual_tokens")
_EMBEDDINGS = ("embed_tokens", "lm_head", "word_embeddings", "output_layer")
_LAYER = re.compile(r".*\.[^.]*\.(\d+)\.")
_LISTED = 5
_LISTS = (
    "target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform",
    "rank_pattern", "alpha_pattern",
)  # fmt: skip
_MANY = 1024
_STRONGEST = 1e6  # of an alpha; they are 8 to 1,024, and a float32 must hold every product with it


@dataclass(frozen=True)
class LoraFiles:
    """The tensors of a LoRA adapter and what its config says of each module."""

    folder: Path
    config: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, TensorInfo]]
    """Of each adapted module its parts: `lora_A`, `lora_B`, `lora_embedding_A`, … by that name."""
    whole: Mapping[str, TensorInfo]
    """Tensors that were trained whole (`modules_to_save`, biases), by the name of the base's tensor."""
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def scale(self, module: str) -> float:
        """What B A is multiplied by."""
        rank = self.ranks[module]
        return self.alphas[module] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def misfits(self, names: Iterable[str]) -> list[str]:
        """In words, where the file and its config disagree about a model's modules `names`."""
        names = list(names)
        expected = _targets(self.config, names, str(self.folder / ADAPTER_CONFIG))
        expected |= {name for name in names if _is_parameter(self.config, name)}
        problems = [
            f"it has nothing for {name}, which its config adapts"
            for name in sorted(expected - set(self.modules))
        ]
        if self.config["target_modules"] != ALL_LINEAR:
            problems += [
                f"it holds {name}, which its config does not adapt"
                for name in sorted(set(self.modules) & set(names) - expected)
            ]
        return problems


def read_lora(folder: Path) -> LoraFiles:
    """The adapter of `folder`, whole and understood.

    Raises:
        ModelError: It is not; every problem is named.
    """
    config = check_config(folder)
    file = adapter_file(folder)
    location = str(folder / ADAPTER_CONFIG)
    stored = read_shard(file).tensors
    _refuse(f"{folder / ADAPTER_CONFIG} is too long", _too_long(config, len(stored)))
    parts, whole, problems = _by_module(stored, config)
    modules = {_adapted_name(module, config): found for module, found in parts.items()}
    for entry in config.get("modules_to_save") or ():
        if not any(_ends_with(name.rpartition(".")[0], entry) for name in whole):
            problems.append(f"modules_to_save names {entry}, and there is no tensor of it")
    for entry in config.get("target_parameters") or ():
        if not any(_ends_with(name if fused_part(name) else f"{name}.weight", entry) for name in modules):  # fmt: skip
            problems.append(f"target_parameters names {entry}, and there is no tensor of it")
    ranks = _by_pattern(config, "rank_pattern", "r", modules, location)
    alphas = _by_pattern(config, "alpha_pattern", "lora_alpha", modules, location)
    for module, tensors in modules.items():
        problems += _part_problems(module, tensors, config, ranks[module])
    largest = max(ranks.values(), default=0)
    for rank in {config.get("r", 8), *(config.get("rank_pattern") or {}).values()}:
        if rank > max(largest, 64):
            problems.append(f"rank {rank} is in {ADAPTER_CONFIG} and in no tensor")
    if not modules and not whole:
        problems.append("it holds no tensor")
    _refuse(f"{file} is not the adapter that {ADAPTER_CONFIG} says", problems)
    return LoraFiles(
        folder, config, modules, whole, ranks, {m: float(a) for m, a in alphas.items()}
    )


def check_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of `folder`, of a LoRA or a prefix, when all of it is understood.

    Raises:
        ModelError: Settings that are not supported, or have values that cannot be.
    """
    config = adapter_config(folder)
    kind = config.get("peft_type")
    wanted = _LORA if kind == "LORA" else _PREFIX_TUNING
    if config.get("target_parameters") and not config.get("target_modules", True):
        wanted = {name: rule for name, rule in wanted.items() if name != "target_modules"}
    given = {name: rule for name, rule in wanted.items() if name in config}
    said = [f"{n}={shown(config[n])} ({why})" for n, (fits, why) in given.items() if not fits(config[n])]  # fmt: skip
    said += [f"{name} is missing" for name in _NEEDED if name in wanted and name not in config]
    numbered = config.get("layers_to_transform") is not None and not config.get("layers_pattern")
    if numbered and isinstance(config.get("target_modules"), str):
        said.append("layers_to_transform is not for target_modules that is a regex")
    refused = [f"{name}={shown(config[name])}" for name in _REFUSED if config.get(name)]
    known = {*wanted, *_REFUSED, *_INERT, *_NEEDED}
    unknown = [f"{n}={shown(v)}" for n, v in sorted(config.items()) if v and n not in known]
    file = folder / ADAPTER_CONFIG
    if said:
        raise ModelError(f"{file}: {'; '.join(said[:_LISTED])}. Copy the adapter again")
    if refused or unknown:
        raise ModelError(
            f"{file} says {', '.join([*refused, *unknown][:_LISTED])}: that is not supported here. "
            "Merge the adapter with PEFT's merge_and_unload and open the merged model"
        )
    return config


def understood(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a LoRA's checked config its reader needs; the rest is of how it was trained.

    PEFT would check that, too, and it reads null in some settings as a value.
    """
    return {
        name: value
        for name, value in config.items()
        if name in _LORA and name not in _OF_TRAINING and value is not None
    }


def check_complete(
    file: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse an adapter file whose tensors are not those that its config asks of the base.

    Args:
        file: The adapter's weights.
        found: Its tensors' shapes by name.
        expected: The shapes that the base takes.

    Raises:
        ModelError: Names tensors that are missing, of another shape, or left over.
    """
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [
        f"{name} is {found[name]} and not {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems += [f"{name} has no place in the base" for name in found if name not in expected]
    _refuse(f"{file} does not fit the base or its {ADAPTER_CONFIG}", problems)


def _too_long(config: Mapping[str, Any], num_tensors: int) -> list[str]:
    """Lists with far more entries than the file has tensors: each is compared with every module."""
    sizes = {
        name: len(config[name]) for name in _LISTS if isinstance(config.get(name), list | dict)
    }
    return [
        f"{name} has {size} entries, and the file {num_tensors} tensors"
        for name, size in sizes.items()
        if size > max(_MANY, num_tensors)
    ]


def _by_module(
    stored: Sequence[TensorInfo], config: Mapping[str, Any]
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo], list[str]]:
    """The parts of each adapted module, the tensors that were trained whole, and what is neither."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    problems = []
    # PEFT saves both embeddings whole where one of them is adapted, and only there.
    adapted = [match["module"] for t in stored if (match := _PART.fullmatch(t.name))]
    embeddings = any(module.rpartition(".")[2] in _EMBEDDINGS for module in adapted)
    for tensor in stored:
        if tensor.dtype not in FLOATS:
            problems.append(f"{tensor.name} is {tensor.dtype}, not one of {', '.join(FLOATS)}")
        name = tensor.name.removeprefix(PREFIX)
        if name == tensor.name:
            problems.append(f"{name} is not named {PREFIX}…, as PEFT names it")
        elif ".original_module." in name:
            continue  # what the base has, which PEFT saves beside an embedding that was made longer
        elif match := _PART.fullmatch(name):
            part = match["part"].removesuffix(".weight")
            modules.setdefault(match["module"], {})[part] = tensor
        elif _may_be_whole(saved := _SAVED.sub(".", name), config, embeddings=embeddings):
            whole[saved.replace(".base_layer.", ".")] = tensor
        else:
            problems.append(f"{name} is of a kind that is not known here")
    return modules, whole, problems


def _is_parameter(config: Mapping[str, Any], name: str) -> bool:
    """Whether `target_parameters` names the weight of a layer, or the fused tensor of experts."""
    weight = name if fused_part(name) else f"{name}.weight"
    return any(_ends_with(weight, entry) for entry in config.get("target_parameters") or ())


def _adapted_name(module: str, config: Mapping[str, Any]) -> str:
    """What an entry of the file adapts: of experts the fused tensor, whose adapters PEFT puts in one another.

    The one that is adapted last is outside: of gate_up_proj and down_proj the second.
    """
    inner = module.replace(".base_layer", "")
    parts = [part for part in PARTS if _is_parameter(config, f"{inner}.{part}")]
    depth = module.count(".base_layer")
    return f"{inner}.{parts[-1 - depth]}" if depth < len(parts) else module


def _refuse(what: str, problems: Collection[str]) -> None:
    if problems:
        listed = "".join(f"\n  {problem}" for problem in list(problems)[:_LISTED])
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ModelError(f"{what}:{listed}{more}\nCopy the adapter again, or give its own base")


def _part_problems(
    module: str, parts: Mapping[str, TensorInfo], config: Mapping[str, Any], rank: int
) -> list[str]:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A", "lora_B"]
    names += [DORA] if config.get("use_dora") else []
    problems = [f"{module} has no {name}" for name in names if name not in parts]
    problems += [f"{module} has a {name} that nothing uses" for name in parts if name not in names]
    if not problems:
        a, b = (parts[name].shape for name in names[:2])
        if len(a) < 2 or len(b) < 2 or a[0] != b[1]:
            problems.append(f"{module}: {names[0]} {a} and {names[1]} {b} do not fit")
        elif fused_part(module) and not a[0] % rank:
            pass  # as many times the rank as there are experts
        elif a[0] != rank:
            problems.append(f"{module} has rank {a[0]} here and {rank} in {ADAPTER_CONFIG}")
    return problems


def _may_be_whole(name: str, config: Mapping[str, Any], *, embeddings: bool) -> bool:
    """Whether PEFT saves such a tensor beside the adapters."""
    module, _, kind = name.rpartition(".")
    module = module.removesuffix(".base_layer")
    if "lora_" in name:
        return False
    if any(_ends_with(module, entry) for entry in config.get("modules_to_save") or ()):
        return True
    if kind == "bias":
        return bool(config.get("bias", "none") != "none")
    return embeddings and kind == "weight" and module.rpartition(".")[2] in _EMBEDDINGS


def _ends_with(module: str, entry: str) -> bool:
    return module == entry or module.endswith(f".{entry}")


def _by_pattern(
    config: Mapping[str, Any], key: str, otherwise: str, modules: Collection[str], location: str
) -> dict[str, Any]:
    """PEFT's rule: the first pattern that matches the end of a module's name, else the default."""
    patterns = {rf"(.*\.)?({pattern})": v for pattern, v in (config.get(key) or {}).items()}
    matched = match_names(list(patterns), list(modules), location=f"{location}: {key}")
    values = dict.fromkeys(modules, config.get(otherwise, 8))
    for pattern, value in reversed(patterns.items()):
        values |= dict.fromkeys(matched[pattern], value)
    return values


def _targets(config: Mapping[str, Any], names: list[str], location: str) -> set[str]:
    """Those of `names` that the config adapts; none where only PEFT can tell (`all-linear`)."""
    if config["target_modules"] in (ALL_LINEAR, [], None):
        return set()
    found = _chosen(config["target_modules"], names, f"{location}: target_modules")
    if exclude := config.get("exclude_modules"):
        found -= _chosen(exclude, names, f"{location}: exclude_modules")
    layers = config.get("layers_to_transform")
    if layers is None:
        return found
    wanted = {layers} if isinstance(layers, int) else set(layers)
    return {n for n in found if (m := _LAYER.match(n)) and int(m[1]) in wanted}


def _chosen(entry: str | list[str], names: list[str], location: str) -> set[str]:
    if isinstance(entry, str):
        return set(match_names([entry], names, location=location)[entry])
    return {name for name in names if any(_ends_with(name, end) for end in entry)}


# --- what a setting may be -----------------------------------------------------------------------

_Rule = tuple[Callable[[Any], bool], str]


def _is_strength(value: Any) -> bool:
    return is_number(value) and abs(value) <= _STRONGEST


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one for one in value)


def _is_layers(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return all(isinstance(one, int) and not isinstance(one, bool) for one in listed)


def _or_none(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


def _values(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return _or_none(lambda value: isinstance(value, dict) and all(map(rule, value.values())))


_FLAG: _Rule = (lambda value: value is None or isinstance(value, bool), "true or false")
_TEXT: _Rule = (_or_none(lambda value: isinstance(value, str)), "a text")
_SIZE: _Rule = (_or_none(is_count), "a whole number above 0")
_TASK: _Rule = (lambda value: value in (None, "CAUSAL_LM"), "only CAUSAL_LM is opened")
_NAMES: _Rule = (_or_none(_is_names), "a list of module names")
_SHARED: dict[str, _Rule] = {"base_model_name_or_path": _TEXT, "revision": _TEXT, "task_type": _TASK}  # fmt: skip
_LORA: dict[str, _Rule] = _SHARED | {
    "r": (is_count, "a rank is a whole number above 0"),
    "lora_alpha": (_is_strength, "a number up to 1e6"),
    "lora_dropout": (lambda value: is_number(value) and 0 <= value <= 1, "from 0 to 1"),
    "target_modules": (
        lambda value: value not in ("", []) and (isinstance(value, str) or _is_names(value)),
        "a regex or a list of module names",
    ),
    "target_parameters": (_or_none(_is_names), "a list of tensors' names"),
    "exclude_modules": (
        _or_none(lambda value: isinstance(value, str) or _is_names(value)),
        "a regex or a list of module names",
    ),
    "modules_to_save": _NAMES,
    "layers_to_transform": (_or_none(_is_layers), "numbers of layers"),
    "rank_pattern": (_values(is_count), "ranks by pattern"),
    "alpha_pattern": (_values(_is_strength), "numbers up to 1e6 by pattern"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (
        lambda value: isinstance(value, (bool, str, type(None))) and value in _KEEPS_BASE,
        "it changes the base, which is not supported: convert it to plain LoRA with PEFT",
    ),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "megatron_core": (lambda value: value in (None, "megatron.core"), "code of others is not imported"),
}  # fmt: skip
_PREFIX_TUNING: dict[str, _Rule] = _SHARED | {
    "num_virtual_tokens": (is_count, "a whole number above 0"),
    **dict.fromkeys(("token_dim", "num_layers", "num_attention_heads"), _SIZE),
    "num_transformer_submodules": (lambda value: value in (None, 1), "only 1 is opened"),
    "prefix_projection": _FLAG,
    "modules_to_save": (lambda value: not value, "a prefix has none"),
}
