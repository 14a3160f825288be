"""GLM-4.5V and GLM-4.6V: images that keep their shape, in front of a text whose layers are mixtures of experts.

The experts are transformers' own (`@use_experts_implementation`: in groups, in batches or one by one).
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import transformers
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from finetune.models.loss import SupervisedHead
from finetune.models.moe.modeling import (
    CountsExperts,
    OfTransformers,
    count_experts,
    layers_for_prediction,
)
from finetune.models.vision.grids import GridLoss, GridModel


class _Text(CountsExperts, transformers.Glm4vMoeTextModel):
    pass


class Glm4vMoeModel(OfTransformers, GridModel, transformers.Glm4vMoeModel):
    """See `GridModel`."""


class Glm4vMoeForConditionalGeneration(
    OfTransformers, GridLoss, transformers.Glm4vMoeForConditionalGeneration
):
    """transformers' model with the loss over supervised tokens; keeps the name that it saves."""

    output_type = MoeCausalLMOutputWithPast

    @wraps(GridLoss.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return logits, or with labels [B, T] the loss; see `SupervisedLoss`."""
        return super().forward(*args, **kwargs)

    # Programs of others read here what is returned.
    forward.__annotations__ = GridLoss.forward.__annotations__ | {"return": output_type}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.__class__ = Glm4vMoeModel
        self.lm_head.__class__ = SupervisedHead
        text = self.model.language_model
        text.__class__ = _Text
        count_experts(text, text.layers)
        unread = layers_for_prediction(config.text_config)
        self._keys_to_ignore_on_load_unexpected = {
            rf"model\.language_model\.layers\.{n}\." for n in unread
        }
