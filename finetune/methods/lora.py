"""LoRA through PEFT: which layers are hit, what is saved, and whose adapter it is."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path

from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune import console
from finetune.artifacts import hub
from finetune.artifacts.adapter import ALL_LINEAR, check_complete, read_lora, understood
from finetune.artifacts.base_record import BaseRecord, check_base
from finetune.artifacts.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune.config.schema import LoraMethod
from finetune.errors import ConfigError, ModelError, is_out_of_memory
from finetune.methods import experts_forward
from finetune.methods.lora_experts import (
    as_layers,
    as_peft_reads_it,
    asked_for,
    check_options,
    expert_parameters,
    parameter_of,
    targets_as_named,
)
from finetune.methods.lora_forward import use_input_format
from finetune.methods.tensor_file import save_config, save_tensors
from finetune.models.families import VISION, Family, family_of

_ADAPTED = (nn.Linear, nn.Embedding, nn.Conv2d)


def attach(
    model: PreTrainedModel,
    section: LoraMethod,
    *,
    frozen: Collection[str] = (),
    **_: object,
) -> PreTrainedModel:
    """The model with fresh adapters: B is zero, so it still computes what the base computes.

    Args:
        model: The base.
        section: The options.
        frozen: Names of weights whose modules get no adapter.

    Raises:
        ConfigError: A target pattern is no regex, matches nothing, or matches what is no layer.
    """
    family = family_of(model.config)
    targets = _without_parts(section.target_modules, family) or family.lora_targets
    experts = expert_parameters(model, family.experts)
    hit, asked = _target_modules(model, targets, experts, family.head)
    excluded = [name for name in hit if f"{name}.weight" in frozen]
    modules = [name for name in hit if name not in excluded]
    parameters = [name for name in asked if name not in frozen]
    if not modules and not parameters:
        raise ConfigError("model.freeze covers every layer of method.target_modules; nothing is left to train; freeze fewer layers")  # fmt: skip
    if experts:
        apart = any(hasattr(weight, "ds_id") for weight in model.parameters())
        check_options(section, parameters, modules, apart=apart)
        targets, excluded = modules, []
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.rank,
        # PEFT writes a whole number without the point, as other readers of the file expect it.
        lora_alpha=int(section.alpha) if float(section.alpha).is_integer() else section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        target_parameters=parameters or None,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        exclude_modules=excluded or None,
        bias="none",
    )
    with targets_as_named() if experts else nullcontext():
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    use_input_format(adapted)
    experts_forward.use_in(adapted)
    found, wanted = sum(matched_modules(adapted).values()), len(modules) + len(parameters)
    if targets != ALL_LINEAR and found != wanted:
        raise ConfigError(
            f"method.target_modules matches {wanted} layers but PEFT adapted {found}; "
            "write the full module names as a regex"
        )
    return adapted


def is_attached(model: nn.Module) -> bool:
    """Whether `model` carries LoRA adapters."""
    return isinstance(model, PeftModel) and model.peft_config["default"].peft_type == "LORA"


def matched_modules(model: nn.Module) -> dict[str, int]:
    """Adapted layers as name patterns, `transformer.encoder.layers.*.mlp.dense_4h_to_h`: 40."""
    names = (
        parameter_of(name, module) if isinstance(module, ParamWrapper) else name
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    )
    return _patterns(name.removeprefix("base_model.model.") for name in names)


def save(
    model: PeftModel,
    folder: Path,
    *,
    base: BaseRecord,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter as PEFT, vLLM and the published code read it, and its base's record."""
    weights = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    save_tensors(weights, folder / ADAPTER_WEIGHTS)
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path = hub.known_to_peft(base.path)
    config.revision = base.revision
    config.inference_mode = True
    if family_of(model.config).experts:
        as_peft_reads_it(model, config)
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    save_config(config, folder)
    base.write(folder, method="lora")


def restore(model: PeftModel, folder: Path) -> None:
    """Put saved adapter weights into a model with the same adapters attached.

    Raises:
        ModelError: The file has other weights than the model, or some that are not finite.
    """
    weights = load_file(folder / ADAPTER_WEIGHTS)
    _check_weights(model, weights, folder / ADAPTER_WEIGHTS)
    set_peft_model_state_dict(model, weights)


def load_adapter(model: PreTrainedModel, folder: Path, *, force: bool = False) -> PeftModel:
    """The base with the adapter of `folder`, ready to generate.

    Raises:
        ModelError: The folder is no adapter, or it belongs to another base and `force` is not set.
    """
    files = read_lora(folder)
    base = model.config.name_or_path
    if Path(base).is_dir():
        for note in check_base(folder, Path(base), force=force):
            console.say(note)
    named = [name for name, module in model.named_modules() if isinstance(module, _ADAPTED)]
    experts = expert_parameters(model, family_of(model.config).experts)
    named += experts
    if problems := files.misfits(named):
        raise ModelError(
            f"{folder / ADAPTER_WEIGHTS}: {'; '.join(problems[:3])} ({len(problems)} in all); "
            "copy the adapter again, or give its own base"
        )
    try:
        config = LoraConfig(**understood(files.config), inference_mode=True)
        if experts:
            as_layers(model, config)
        with targets_as_named() if experts else nullcontext():
            adapted = PeftModelForCausalLM(model, config, autocast_adapter_dtype=True)
    except Exception as error:  # whatever settings of others make PEFT raise
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{folder / ADAPTER_CONFIG} cannot be used ({type(error).__name__}: {error}); copy the "
            "adapter again"
        ) from error
    weights = load_file(folder / ADAPTER_WEIGHTS)
    _check_weights(adapted, weights, folder / ADAPTER_WEIGHTS)
    set_peft_model_state_dict(adapted, weights)
    use_input_format(adapted)
    experts_forward.use_in(adapted)
    return adapted.eval()


def detach(model: PeftModel) -> PreTrainedModel:
    """The base again, without the adapters that `load_adapter` or `attach` gave it."""
    return model.unload()


def _check_weights(model: PeftModel, weights: Mapping[str, Tensor], file: Path) -> None:
    """Refuse weights that are not those of the attached adapters, one by one, or not finite."""
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    own = model.state_dict()
    # PEFT saves an embedding and a head beside the adapters, though the adapters do not train them.
    beside = {name: own[name] for name in weights if name not in expected and name in own}
    shapes = {name: tuple(t.shape) for name, t in {**expected, **beside}.items()}
    check_complete(file, {name: tuple(t.shape) for name, t in weights.items()}, shapes)
    broken = [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ModelError(
            f"{file}: {', '.join(broken[:3])} holds numbers that are not finite "
            f"({len(broken)} of {len(weights)} tensors do); use an earlier checkpoint"
        )


def rate_scale(section: LoraMethod) -> Callable[[str], float] | None:
    """How much faster than the others a weight learns, by name: LoRA+ raises the B matrices' rate."""
    ratio = section.lora_plus_ratio
    if ratio is None:
        return None
    return lambda name: ratio if ".lora_B." in name or ".lora_embedding_B." in name else 1.0


def _without_parts(targets: str | list[str] | None, family: Family) -> str | list[str] | None:
    """`targets`, a list with the parts `text` or `vision` as the regex of their layers and of the others."""
    parts = {"text": family.lora_targets, VISION: family.vision_lora_targets}
    if not isinstance(targets, list) or not parts.keys() & set(targets):
        return targets
    if VISION in targets and family.vision_lora_targets is None:
        raise ConfigError(
            "method.target_modules: this checkpoint has no vision encoder; leave vision out"
        )
    named = (parts.get(name) or rf"(.*\.)?{re.escape(name)}" for name in targets)
    return "|".join(f"({pattern})" for pattern in named)


def _target_modules(
    model: nn.Module, targets: str | list[str], experts: list[str], head: str
) -> tuple[list[str], list[str]]:
    """Full names of the layers that `targets` hits, and of the routed experts' tensors among `experts`."""
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if targets == ALL_LINEAR:  # PEFT leaves the head out by itself
        return [name for name in linear if not (experts and name == head)], []
    named, regex = [targets] if isinstance(targets, str) else targets, isinstance(targets, str)
    for module in {name.rpartition(".")[0] for name in experts}:
        del modules[module]  # no layer; what is in it is asked for by its own name
    hits = {pattern: _hits(modules, pattern, regex=regex) for pattern in named}
    asked = {pattern: asked_for(pattern, experts, regex=regex) for pattern in named}
    problems = [
        _no_match(pattern, linear, experts)
        for pattern, found in hits.items()
        if not found and not asked[pattern]
    ]
    layers = (nn.Linear, nn.Embedding, nn.Conv2d)
    problems += [
        f"method.target_modules: {pattern!r} matches {name!r}, a {type(modules[name]).__name__}; "
        "name the linear layers inside it"
        for pattern, found in hits.items()
        for name in found[:1]
        if not isinstance(modules[name], layers)
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return sorted({n for found in hits.values() for n in found}), sorted({n for found in asked.values() for n in found})  # fmt: skip


def _hits(modules: Iterable[str], pattern: str, *, regex: bool) -> list[str]:
    if not regex:
        return [name for name in modules if name == pattern or name.endswith(f".{pattern}")]
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"method.target_modules: {pattern!r} is not a regex: {error}; correct it"
        ) from error
    return [name for name in modules if name and compiled.fullmatch(name)]


def _no_match(pattern: str, linear: list[str], experts: list[str]) -> str:
    endings = sorted({name.rpartition(".")[2] for name in linear})
    near = get_close_matches(pattern.rpartition(".")[2], endings, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    there = ", ".join(f"{name} x {count}" for name, count in _patterns([*linear, *experts]).items())
    return (
        f"method.target_modules: {pattern!r} matches no module of this model; {hint}"
        f"linear layers are {there}"
    )


def _patterns(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
