"""The ways to tune a model: attach one, save what it trained, put it back.

METHODS describes each in one record; what it does lies in the module of its name. A new method is a
section in `config.schema`, a record here and such a module with `attach`, `is_attached`,
`matched_modules`, `save`, `restore`, `load_adapter` and `detach`. The table imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.artifacts.base_record import BaseRecord
from finetune.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.config.schema import MethodSection
    from finetune.methods.full import Gather

__all__ = ["METHODS", "BaseRecord", "Method", "attach", "of_adapter", "rate_scale", "restore", "save", "saved_names", "trained_modules"]  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One way to tune, and what others may do with its results."""

    kind: str
    """`method.kind`, and the name of its module."""
    result: Literal["adapter", "prefix", "full"]
    """What its checkpoints are called in evaluations and reports."""
    peft_type: str | None = None
    """In adapter_config.json; None where the checkpoint is a whole model."""
    merging: str | None = None
    """Why it cannot become part of the base's weights, as a sentence after `FOLDER is`; None: it can."""
    served_by_vllm: bool = False
    """Whether vLLM opens its adapters."""
    less_memory: str = ""
    """What would need less memory than this method does."""
    less_memory_if_quantized: bool = True
    """Whether that still helps when `model.quantization` is set."""

    has_rates: bool = False
    """Whether its module has a `rate_scale`: some of its weights learn at another rate."""

    @property
    def trains_the_model(self) -> bool:
        """Whether it trains the model's own weights, which then need float32 originals."""
        return self.peft_type is None

    @property
    def code(self) -> Any:
        """Its module."""
        return import_module(f"finetune.methods.{self.kind}")


METHODS: dict[str, Method] = {
    method.kind: method
    for method in (
        Method(
            "lora",
            "adapter",
            peft_type="LORA",
            has_rates=True,
            served_by_vllm=True,
            less_memory="model.quantization=nf4: the frozen weights take a quarter of bfloat16's",
            less_memory_if_quantized=False,
        ),
        Method(
            "ptuning_v2",
            "prefix",
            peft_type="PREFIX_TUNING",
            merging="a P-Tuning v2 prefix: keys and values that every layer attends to beside its "
            "own. There is no weight that could produce them, so it cannot be merged (only LoRA can). "
            "It works as it is: `finetune chat`, `predict` and `evaluate` open it, and so does "
            "peft.PeftModel.from_pretrained(base, folder); servers that load LoRA adapters, such as "
            "vLLM, do not serve prefixes. For one plain checkpoint train method.kind lora or full",
        ),
        Method(
            "full",
            "full",
            less_memory="method.kind=lora: a few weights learn, and only they have optimizer states",
        ),
    )
}


def of_adapter(peft_type: object, folder: Path) -> Method:
    """The method that adapters of this kind come from.

    Raises:
        ModelError: It is none of ours.
    """
    known = {method.peft_type: method for method in METHODS.values() if method.peft_type}
    if str(peft_type) not in known:
        raise ModelError(
            f"{folder} is a {peft_type} adapter; only {', '.join(map(str, known))} can be opened, so give one of those"
        )
    return known[str(peft_type)]


def attach(
    model: PreTrainedModel,
    section: MethodSection,
    *,
    freeze: Sequence[str] = (),
    start_ids: Sequence[int] = (),
) -> PreTrainedModel:
    """The model with the weights of `section.kind` trainable and the rest frozen.

    Adapters are float32; weights of the model itself keep the format they were loaded in.

    Args:
        model: The base.
        section: The method and its options.
        freeze: `model.freeze`.
        start_ids: The text that a prefix starts from, see `ptuning_v2.attach`.
    """
    from finetune.methods.freezing import frozen_names, routers
    from finetune.models.families import family_of

    family = family_of(model.config)
    names = [name for name, _ in model.named_parameters()]
    frozen = frozen_names(names, freeze, vision=family.vision) | routers(names, family.router)
    if section.kind == "ptuning_v2" and family.no_prefix:
        raise ConfigError(
            f"method.kind: ptuning_v2 does not run on {family.model_type}: {family.no_prefix}; use lora or full"
        )
    code = METHODS[section.kind].code
    attached: PreTrainedModel = code.attach(model, section, frozen=frozen, start_ids=start_ids)
    return attached


def rate_scale(section: MethodSection) -> Callable[[str], float] | None:
    """How much faster than the others a weight learns, by its name; None where all learn alike."""
    method = METHODS[section.kind]
    scale: Callable[[str], float] | None = None
    if method.has_rates:
        scale = method.code.rate_scale(section)
    return scale


def trained_modules(model: PreTrainedModel) -> dict[str, int]:
    """Name patterns of what is trained (layer numbers as `*`), and how many modules each stands for."""
    found: dict[str, int] = _attached(model).code.matched_modules(model)
    return found


def save(
    model: PreTrainedModel,
    folder: Path,
    *,
    base: BaseRecord,
    gather: Gather | None = None,
) -> None:
    """Write what was trained to `folder`.

    Args:
        model: With a method attached.
        folder: Must exist.
        base: What was tuned.
        gather: Gives weights by name, for a model that is sharded: then every process calls this,
            and those for which it gives nothing write nothing. By default the model's own.
    """
    from finetune.methods.carried import carry_tokenizer
    from finetune.methods.full import own_weights

    gather = gather or own_weights(model)
    method = _attached(model)
    if method.trains_the_model:
        method.code.save(model, folder, base=base, gather=gather)
        return
    if state := gather(saved_names(model)):
        method.code.save(model, folder, base=base, state_dict=state)
        carry_tokenizer(base, folder)


def saved_names(model: PreTrainedModel) -> list[str]:
    """Names of the weights that `save` asks its `gather` for."""
    method = _attached(model)
    if method.trains_the_model:
        names: list[str] = method.code.saved_names(model)
        return names
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def restore(model: PreTrainedModel, folder: Path) -> None:
    """Put the weights that `save` wrote back into a model with the same method attached."""
    _attached(model).code.restore(model, folder)


def _attached(model: PreTrainedModel) -> Method:
    """The method that the model carries; one without adapters is trained whole."""
    adapters = (method for method in METHODS.values() if not method.trains_the_model)
    return next((one for one in adapters if one.code.is_attached(model)), METHODS["full"])
