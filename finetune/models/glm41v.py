"""GLM-4.1V: transformers' own model, which like GLM-4V here takes batches with and without images."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from finetune.models.loss import SupervisedHead, SupervisedLoss


class Glm4vModel(transformers.Glm4vModel):
    """transformers' model; sees by itself where images are, and waits for processes that have some."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return the last hidden state [B, T, D] and the cache.

        `pixel_values` [patches of all images, C] and `image_grid_thw` [N, 3] are what the image
        processor makes.
        """
        kwargs.pop("mm_token_type_ids", None)
        if pixel_values is not None and input_ids is None:
            raise ValueError("images go in with input_ids, not with inputs_embeds")
        begins = past_key_values is None or past_key_values.get_seq_length() == 0
        # The tower comes first, with images or without: under ZeRO-3 processes must gather the same
        # weights in the same order, and transformers by itself embeds the text before it looks.
        if pixel_values is not None and input_ids is not None:
            seen = self.get_image_features(pixel_values, image_grid_thw, return_dict=True)
            kwargs |= {"image_grid_thw": image_grid_thw, "mm_encoder_outputs": {"image": seen}}
            kwargs["mm_token_type_ids"] = self.kinds(input_ids)
        elif begins:
            self.rope_deltas = None  # of whatever images were shown before
            if input_ids is not None and bool(self.kinds(input_ids).any()):
                raise ValueError("there are image tokens in input_ids but no pixel_values")
            if self._others_may_look():
                kwargs["mm_encoder_outputs"] = {"image": self._nothing()}
        return super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)

    def kinds(self, input_ids: Tensor) -> Tensor:
        """1 where a token is part of an image."""
        kinds: Tensor = (input_ids == self.config.image_token_id).int()
        return kinds

    def _others_may_look(self) -> bool:
        """Whether another process that has images would wait for this one, which has none."""
        weights = list(self.visual.parameters())
        trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        return trained or any(hasattr(weight, "ds_id") for weight in weights)

    def _nothing(self) -> Any:
        """No rows, which all weights of the tower have had a part in."""
        config, weight = self.visual.config, next(self.visual.parameters())
        side = config.spatial_merge_size
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        blank = torch.zeros(side * side, width, dtype=weight.dtype, device=weight.device)
        grid = torch.tensor([[1, side, side]], device=weight.device)
        seen = self.visual(blank, grid_thw=grid)
        seen.pooler_output = (seen.pooler_output[:0],)
        return seen


class Glm4vForConditionalGeneration(SupervisedLoss, transformers.Glm4vForConditionalGeneration):
    """transformers' model with the loss over supervised tokens; keeps the name that it saves."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.__class__ = Glm4vModel
        self.lm_head.__class__ = SupervisedHead

    def forward(  # noqa: PLR0913 - transformers looks for these names in the signature
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_weights: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits, or with labels [B, T] the loss; see `SupervisedLoss`."""
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            labels,
            use_cache,
            logits_to_keep,
            loss_weights,
            num_items_in_batch,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            **kwargs,
        )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        if model_kwargs.get("image_grid_thw") is not None:
            ids = model_kwargs.get("input_ids")
            kinds = self.model.kinds(inputs_tensor if ids is None else ids)
            model_kwargs = model_kwargs | {"mm_token_type_ids": kinds}
        positions: Tensor = super()._prepare_position_ids_for_generation(
            inputs_tensor, model_kwargs
        )
        return positions
