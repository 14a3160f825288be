"""`model.adapter`: training goes on from the weights of an adapter."""

from __future__ import annotations

from pathlib import Path

from finetune import console, methods
from finetune.artifacts.base_record import check_base
from finetune.artifacts.resolve import adapter_config, find_source, local_folder
from finetune.config.schema import LoraMethod
from finetune.errors import ConfigError
from finetune.training.prepare_model import PreparedModel, is_apart


def start_from_adapter(prepared: PreparedModel, *, resumed: bool) -> None:
    """Put the weights of `model.adapter`, if it is given, into those that the method has attached.

    Args:
        prepared: Its method, options and base must be the adapter's.
        resumed: Whether a checkpoint of this run takes their place.

    Raises:
        ConfigError: There is no adapter, or it is another method's, or one of other options.
        ModelError: It was trained on another base, or has other weights.
    """
    model, method, section = prepared.model, prepared.method, prepared.section
    if section.adapter is None or resumed:
        return
    if is_apart(model):
        raise ConfigError(
            "model.adapter: start from an adapter without ZeRO-3 (zero_stage 2 or less)"
        )
    # An adapter, a checkpoint of one, or a run: its best checkpoint, else the newest.
    folder, remarks = find_source(Path(section.adapter))
    saved = adapter_config(folder)
    kind = methods.of_adapter(saved.get("peft_type"), folder).kind
    if kind != method.kind:
        raise ConfigError(
            f"model.adapter: {folder} is of method.kind {kind}, not {method.kind}; set method likewise"
        )
    if isinstance(method, LoraMethod):
        now = {
            "r": method.rank, "lora_alpha": method.alpha,
            "use_rslora": method.use_rslora, "use_dora": method.use_dora,
        }  # fmt: skip
        other = [
            f"{key} {saved.get(key)} (now {value})"
            for key, value in now.items()
            if saved.get(key) != value
        ]
        if other:
            raise ConfigError(
                f"model.adapter: {folder} was trained with {', '.join(other)}; set method likewise"
            )
    remarks += check_base(folder, local_folder(section.path, section.revision))
    methods.restore(model, folder)
    for remark in remarks:
        console.say(remark)
    console.say(f"starting from the adapter in {folder}")
