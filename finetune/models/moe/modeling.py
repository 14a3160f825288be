"""transformers' mixtures of experts with the loss over supervised tokens, and with their routing counted.

Experts of a layer are held as one tensor each for gate and up, and for down, and multiplied group by group
(`grouped_mm`, transformers' default), not one expert after the other; on a GPU without waiting for it.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import Glm4MoeLiteTopkRouter
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeTextTopkRouter
from transformers.utils import output_capturing

from finetune.models.loss import SupervisedHead, SupervisedLoss
from finetune.models.moe.routing import ExpertUse, Router


class OfTransformers:
    """Goes before a model of transformers that stays what it is: weights are converted on the way in and out."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """Not: experts that lie apart on disk are put together as for transformers' own class."""
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Yes, as transformers finds by reading the source of its own class."""
        return True


class CountsExperts(OfTransformers):
    """Goes before a text model of transformers whose layers are mixtures."""

    expert_use: ExpertUse
    config: Any
    training: bool

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Return the last hidden state [B, T, D] and the cache."""
        model: Any = super()
        given = {"input_ids": input_ids, "attention_mask": attention_mask} | kwargs
        real = _real_tokens(input_ids, attention_mask, self.config.pad_token_id)
        with self.expert_use.counting(real) if self.training else nullcontext():
            return model.forward(**given)


def _real_tokens(ids: Tensor | None, mask: Tensor | None, pad: int | None) -> Tensor | None:
    """Bool [B, T] without padding on the right, which has no mask here; None where all are real."""
    if mask is not None and mask.dim() == 2:
        return mask.bool()
    if ids is None or pad is None:
        return None
    return (ids != pad).flip(1).cumsum(1).flip(1) > 0


class _Router(Router, Glm4MoeTopkRouter):
    pass


class _LiteRouter(Router, Glm4MoeLiteTopkRouter):
    pass


class _VisionRouter(Router, Glm4vMoeTextTopkRouter):
    pass


_ROUTERS: dict[type, type] = {
    Glm4MoeTopkRouter: _Router,
    Glm4MoeLiteTopkRouter: _LiteRouter,
    Glm4vMoeTextTopkRouter: _VisionRouter,
}


def count_experts(text: nn.Module, layers: nn.ModuleList) -> None:
    """Give the routers of a text model's layers one place to count in, and the model that place."""
    found = {n: getattr(layer.mlp, "gate", None) for n, layer in enumerate(layers)}
    routers: dict[int, Any] = {n: router for n, router in found.items() if router is not None}
    experts = max((router.num_experts for router in routers.values()), default=0)
    use = ExpertUse(list(routers), experts)
    for place, router in enumerate(routers.values()):
        router.__class__ = _ROUTERS[type(router)]
        router.use, router.place = use, place
    text.expert_use = use  # type: ignore[assignment]
    # By its class's name transformers knows what a model can return besides (hidden states, attentions);
    # a class that is built is known, one that is put in its place is not.
    known = output_capturing._CAN_RECORD_REGISTRY
    dict.__setitem__(known, str(type(text)), text._can_record_outputs)


def layers_for_prediction(config: Any) -> list[int]:
    """Numbers of the layers behind the last one that predict tokens further ahead (MTP)."""
    further = getattr(config, "num_nextn_predict_layers", 0) or 0
    return [config.num_hidden_layers + n for n in range(further)]


def first_dense(text: Any) -> int:
    """How many layers in front of the mixtures have an MLP; 0 where there are no mixtures."""
    if not getattr(text, "n_routed_experts", 0):
        return 0
    if kinds := getattr(text, "mlp_layer_types", None):
        return next((n for n, kind in enumerate(kinds) if kind == "sparse"), len(kinds))
    return int(text.first_k_dense_replace)


class _Model(CountsExperts, transformers.Glm4MoeModel):
    pass


class _LiteModel(CountsExperts, transformers.Glm4MoeLiteModel):
    pass


class RoutedLoss(OfTransformers, SupervisedLoss):
    """Goes before a causal model whose layers are mixtures: outputs have `router_logits` when they are asked for."""

    output_type = MoeCausalLMOutputWithPast

    @wraps(SupervisedLoss.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return logits, or with labels [B, T] the loss; see `SupervisedLoss`."""
        return super().forward(*args, **kwargs)

    # Programs of others read here what is returned.
    forward.__annotations__ = SupervisedLoss.forward.__annotations__ | {"return": output_type}


class Glm4MoeForCausalLM(RoutedLoss, transformers.Glm4MoeForCausalLM):
    """transformers' model with the loss over supervised tokens; keeps the name that it saves."""

    looks_at_positions = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _finish(self, _Model)


class Glm4MoeLiteForCausalLM(RoutedLoss, transformers.Glm4MoeLiteForCausalLM):
    """transformers' model with the loss over supervised tokens; keeps the name that it saves."""

    looks_at_positions = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _finish(self, _LiteModel)


def _finish(model: Any, text_class: type) -> None:
    model.lm_head.__class__ = SupervisedHead
    model.model.__class__ = text_class
    count_experts(model.model, model.model.layers)
    # transformers knows the published depths only.
    own = {rf"model\.layers\.{n}\." for n in layers_for_prediction(model.config)}
    model._keys_to_ignore_on_load_unexpected = own | set(model._keys_to_ignore_on_load_unexpected)
