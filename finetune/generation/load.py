"""A folder that anybody trained, merged or downloaded -> a model with its chat template."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune import collector, console, launcher
from finetune.artifacts.resolve import (
    Weights,
    adapter_config,
    check_openable,
    is_adapter,
    is_folder,
    is_hub_id,
    model_base,
    tokenizer_source,
)
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.errors import ConfigError, ModelError
from finetune.generation.settings import GREEDY as GREEDY
from finetune.generation.settings import HERE as HERE
from finetune.generation.settings import Placement as Placement
from finetune.generation.settings import Sampling as Sampling
from finetune.generation.settings import settings_of
from finetune.methods import of_adapter


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that is ready to reply."""

    model: Any
    """In evaluation mode, on the GPU of this process if there is one."""
    template: ChatTemplate
    kind: Literal["adapter", "model"]
    base: str
    """The model that an adapter was opened on; of a whole model, itself."""
    plain: Any = None
    """Of one that was opened beside others: the base alone, which they share."""


class Models:
    """Opens one model after another; a base that several adapters share is loaded once.

    Each opening ends the one before: an adapter is taken off its base before the next is put on.
    """

    def __init__(self, placement: Placement = HERE) -> None:
        self._placement = placement
        self._key: tuple[Any, ...] = ()
        self._base: Any = None
        """The model of `_key` without an adapter."""
        self._adapted: Any = None
        """The same with one, or None."""
        self._method: Any = None
        """The record of its method."""

    def open(
        self, target: str | Path, *, base: str | None = None, like: str | None = None
    ) -> OpenedModel:
        """The model in `target`, as `open_model` opens it; in the number format of `like`, if given."""
        template = open_template(target, base=base)
        self._take_off()
        weights = self._load(target, base, like)
        if not is_adapter(target):
            return OpenedModel(self._base, template, "model", weights.path)
        self._method = of_adapter(adapter_config(Path(target)).get("peft_type"), Path(target))
        adapted = self._method.code.load_adapter(self._base, Path(target))
        self._adapted = self._placed(adapted)
        return OpenedModel(self._adapted, template, "adapter", weights.path)

    def beside(self, target: str | Path, *, base: str | None = None) -> OpenedModel:
        """The same without ending the others that were opened so; their base must be the same."""
        template = open_template(target, base=base)
        weights = self._load(target, base, None)
        if not is_adapter(target):
            return OpenedModel(self._base, template, "model", weights.path, self._base)
        method = of_adapter(adapter_config(Path(target)).get("peft_type"), Path(target))
        adapted = method.code.load_adapter(_sharing(self._base), Path(target))
        return OpenedModel(self._placed(adapted), template, "adapter", weights.path, self._base)

    def key(
        self, target: str | Path, *, base: str | None = None, like: str | None = None
    ) -> tuple[Any, ...]:
        """What decides the base that a target stands on."""
        saved = settings_of(like or target)
        bits = self._placement.quantization or saved.quantization
        return model_base(target, base), saved.dtype, saved.attention, bits, saved.kernels

    def _load(self, target: str | Path, base: str | None, like: str | None) -> Weights:
        """Holds the base of a target."""
        with collector.importing():
            from finetune.distributed import device
            from finetune.models.library_logging import quiet_libraries
            from finetune.models.load import load_model

        quiet_libraries()
        if said := device.unused():
            console.warn_once(said)
        _refuse_sharing(self._placement)
        key = self.key(target, base=base, like=like)
        weights: Weights
        weights, dtype, attention, quantization, kernels = key
        if key != self._key:
            self._base = None  # before the next is loaded: there may be room for one only
            loaded: Any = load_model(
                weights.path,
                revision=weights.revision,
                dtype=dtype,
                attention=attention,
                quantization=quantization,
                kernels=kernels,
                device_map=self._placement.device_map,
            )
            self._base, self._key = self._placed(loaded), key
        return weights

    def _placed(self, model: Any) -> Any:
        """On this process's device, unless it is shared out over several."""
        from finetune.distributed.device import local_device

        return model if self._placement.device_map else model.to(local_device())

    def _take_off(self) -> None:
        if self._adapted is None:
            return
        self._base = self._method.code.detach(self._adapted)
        self._adapted = None


def open_side_by_side(
    targets: Mapping[str, str | Path],
    *,
    base: str | None = None,
    placement: Placement = HERE,
    beside: SideBySide | None = None,
) -> dict[str, OpenedModel]:
    """The models in `targets`, by their names, all open at once.

    The weights of a base that several of them are made of lie in memory once; each adapter stands on
    modules of its own, so that none of them is seen by the others.

    Args:
        targets: what is opened, by name.
        base: the adapters' base where their own records are out of date.
        placement: on several accelerators, or in 4 bits.
        beside: what opens them, where more are to come.

    Raises:
        ModelError: as `open_model` does.
        ConfigError: several are to be shared out over several accelerators.
    """
    if placement.device_map and len(targets) > 1:
        raise ConfigError(
            "--device-map auto is for one model: several share one accelerator; leave it out"
        )
    beside = beside or SideBySide(base, placement)
    return {name: beside.open(target) for name, target in targets.items()}


class SideBySide:
    """Opens models that are used at once; the weights of a base lie in memory once."""

    def __init__(self, base: str | None = None, placement: Placement = HERE) -> None:
        self._base, self._placement = base, placement
        self._bases: dict[tuple[Any, ...], Models] = {}

    def open(self, target: str | Path) -> OpenedModel:
        """One more, on modules of its own; ModelError as `open_model` raises it."""
        check_openable(target)
        models = Models(self._placement)
        models = self._bases.setdefault(models.key(target, base=self._base), models)
        return models.beside(target, base=self._base)


def _sharing(model: Any) -> Any:
    """A model of modules of its own over the same tensors."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors)


def _refuse_sharing(placement: Placement) -> None:
    """Several processes each take one accelerator; a model over all of them is for one process."""
    if placement.device_map and launcher.world_size() > 1:
        raise ConfigError("--device-map auto is for one process: leave torchrun out")


def open_model(
    target: str | Path, *, base: str | None = None, placement: Placement = HERE
) -> OpenedModel:
    """The model in `target`: a base or merged checkpoint, a hub id, an adapter, or a checkpoint of a run.

    A checkpoint computes in the number format of its run, anything else in that of `model.dtype: auto`.

    Args:
        target: what is opened; of a run, one of its checkpoints.
        base: the adapter's base where its own record is out of date; its content is still checked.
        placement: on several accelerators, or in 4 bits.

    Raises:
        ModelError: `target` or the adapter's base is no model, or they do not belong together.
    """
    return Models(placement).open(target, base=base)


def open_template(target: str | Path, *, base: str | None = None) -> ChatTemplate:
    """The chat template of what `open_model` opens, within a second and without torch."""
    check_openable(target)
    weights = model_base(target, base)
    if not is_adapter(target):
        weights = tokenizer_source(weights)
    elif not is_folder(weights.path) and not is_hub_id(weights.path):
        raise ModelError(
            f"{target} is an adapter of {weights.path}, which is not there (seen from {Path.cwd()}); "
            "say where its base model is now"
        )
    return ChatTemplate(load_chat_tokenizer(weights.path, weights.revision))
