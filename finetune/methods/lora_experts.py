"""LoRA on mixtures of experts: what PEFT is told, and what its adapter_config.json says.

Experts of a layer are one tensor, no layers, and PEFT adapts such as `target_parameters`: every expert gets
an A and a B of its own. In PEFT 0.21 names of a layer that end in gate_proj, up_proj or down_proj are taken for
the experts of a checkpoint of transformers 4, also where they name a shared expert or a dense MLP (issue 3711
of huggingface/peft). So they are kept from that here, and in the file they stand under `target_parameters`,
by which PEFT finds the same layers, with the same tensors, in its own way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from finetune.artifacts.experts import PARTS
from finetune.config.schema import LoraMethod
from finetune.errors import ConfigError

_TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj")
_ASKED = re.compile(r"(?<!shared_)experts")


def expert_parameters(model: nn.Module, experts: str | None) -> list[str]:
    """Names of the fused tensors of all routed experts; `experts` is their modules' pattern."""
    if experts is None:
        return []
    pattern = re.compile(experts)
    found = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    return [f"{name}.{part}" for name in found for part in PARTS]


def asked_for(pattern: str, names: Sequence[str], *, regex: bool) -> list[str]:
    """Those of the experts' tensors that a pattern of `method.target_modules` names, or all of a module.

    Only one that says `experts` does: `down_proj` alone are layers.
    """
    if not _ASKED.search(pattern):
        return []

    def hits(name: str) -> bool:
        if regex:
            return re.fullmatch(pattern, name) is not None
        return name == pattern or name.endswith(f".{pattern}")

    return [name for name in names if hits(name) or hits(name.rpartition(".")[0])]


def check_options(
    section: LoraMethod, parameters: Sequence[str], modules: Iterable[str], *, apart: bool
) -> None:
    """Refuse options that PEFT has no form for; `apart` where ZeRO-3 has dealt the weights out.

    Raises:
        ConfigError: Names them.
    """
    if parameters and apart:
        raise ConfigError(
            "method.target_modules names routed experts, whose adapters PEFT reads outside of any layer's forward "
            "pass, where ZeRO-3 has not gathered them; set deepspeed.zero_stage: 2 or less, or leave the experts out"
        )
    if parameters and section.dropout:
        raise ConfigError(
            f"method.dropout is {section.dropout:g}, but the adapters of routed experts are added to the weights "
            "themselves, where no input could be dropped; set method.dropout: 0, or leave the experts out of "
            "method.target_modules"
        )
    taken = [name for name in modules if name.rpartition(".")[2] in _TAKEN_FOR_EXPERTS]
    if section.use_dora and (taken or parameters):
        raise ConfigError(
            "method.use_dora: PEFT opens no DoRA on gate_proj, up_proj, down_proj or experts of a mixture; "
            "set method.target_modules to layers of the attention, or leave method.use_dora out"
        )


@contextmanager
def targets_as_named() -> Iterator[None]:
    """PEFT adapts inside what a config names, not what it takes that for."""
    from peft.utils import transformers_weight_conversion as conversion

    theirs = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = theirs


def as_peft_reads_it(model: nn.Module, config: LoraConfig) -> None:
    """Let a config name what is adapted so that PEFT, opening it, adapts the same."""
    modules: list[str] = []
    parameters: list[str] = []
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.model.")
        if isinstance(module, ParamWrapper):
            parameters.append(parameter_of(name, module))
        elif isinstance(module, LoraLayer):
            taken = name.rpartition(".")[2] in _TAKEN_FOR_EXPERTS
            (parameters if taken else modules).append(f"{name}.weight" if taken else name)
    config.target_modules, config.exclude_modules = sorted(modules), None
    config.target_parameters = sorted(parameters) or None
    if parameters:
        config.lora_dropout = 0.0  # of no use to who opens it, and PEFT would refuse


def as_layers(model: nn.Module, config: LoraConfig) -> None:
    """The way back: of `target_parameters` those that are a layer's weight are its adapter again."""
    modules = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    named = set(config.target_parameters or ())
    layers = {name for name in modules if f"{name}.weight" in named}
    if not layers:
        return
    config.target_modules = sorted({*layers, *_listed(config.target_modules, modules)})
    config.target_parameters = sorted(named - {f"{name}.weight" for name in layers}) or None


def _listed(targets: str | Iterable[str] | None, modules: Iterable[str]) -> list[str]:
    if isinstance(targets, str):
        return [name for name in modules if re.fullmatch(targets, name)]
    return list(targets or ())


def parameter_of(name: str, wrapper: ParamWrapper) -> str:
    """The full name of the tensor that a wrapper adapts; they lie in one another."""
    return f"{name.replace('.base_layer', '')}.{wrapper.parameter_name}"
