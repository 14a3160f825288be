"""Families whose images keep their shape: transformers' own models, in batches with and without images.

An image is a grid of patches, and each side x side of them (`spatial_merge_size`) are one token of
the text. Positions have three coordinates: time, height and width; a row may show any number of
images, in any turn.

Legend: B rows, T tokens, N images, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from finetune.errors import ModelError
from finetune.models.loss import SupervisedHead, SupervisedLoss
from finetune.models.packed_attention import document_starts, positions_in_documents


class GridModel:
    """Token ids and images to hidden states; waits for processes that have images.

    Mixed into transformers' model of a vision encoder, `visual`, and a `language_model`.
    """

    def forward(  # noqa: PLR0913 - transformers looks for these names in the signature
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        past_key_values: Any = None,
        image_features: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the last hidden state [B, T, D] and the cache.

        `pixel_values` [patches of all images, C] and `image_grid_thw` [N, 3] are what the image
        processor makes; `image_features` [tokens of all images, D] are what a frozen encoder made of
        the pixels. They go where `input_ids` have the token of an image, or `inputs_embeds` the
        row of it. `position_ids` [B, T] or [3, B, T] need not be given.
        """
        model: Any = self
        if pixel_values is not None and image_features is not None:
            raise ValueError("pass either pixel_values or image_features")
        shown = pixel_values is not None or image_features is not None
        begins = past_key_values is None or past_key_values.get_seq_length() == 0
        # The encoder comes first, with images or without: under ZeRO-3 processes must gather the same
        # weights in the same order, and transformers by itself embeds the text before it looks.
        if pixel_values is not None:
            seen = model.get_image_features(pixel_values, image_grid_thw, return_dict=True)
            kwargs["mm_encoder_outputs"] = {"image": seen}
        elif shown or begins:
            if not shown and input_ids is not None and bool(self.kinds(input_ids).any()):
                raise ValueError("there are image tokens in input_ids but no pixel_values")
            rows = [] if image_features is None else [image_features]
            rows += [self._nothing()] if self._others_may_look() else []
            if rows:
                seen = BaseModelOutputWithPooling(pooler_output=tuple(rows))
                kwargs["mm_encoder_outputs"] = {"image": seen}
        if shown and input_ids is not None:
            kwargs |= {
                "image_grid_thw": image_grid_thw,
                "mm_token_type_ids": self.kinds(input_ids),
            }
        elif begins:
            model.rope_deltas = None  # of whatever images were shown before
        if shown and inputs_embeds is not None and position_ids is None and begins:
            # Transformers finds the places of images in ids only.
            kinds = self.kinds_of_rows(inputs_embeds)
            position_ids, model.rope_deltas = model.get_rope_index(
                kinds, kinds, image_grid_thw=image_grid_thw, attention_mask=attention_mask
            )
        starts = document_starts(position_ids, attention_mask, past_key_values)
        if starts is not None and position_ids is not None:
            # Transformers keeps documents apart by a first row of positions that only count.
            places = position_ids if position_ids.dim() == 3 else position_ids.expand(3, -1, -1)
            position_ids = torch.cat([positions_in_documents(starts)[None], places[-3:]])
        kwargs |= {} if output_attentions is None else {"output_attentions": output_attentions}
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def kinds(self, input_ids: Tensor) -> Tensor:
        """1 where a token is part of an image."""
        model: Any = self
        kinds: Tensor = (input_ids == model.config.image_token_id).int()
        return kinds

    def kinds_of_rows(self, embeds: Tensor) -> Tensor:
        """`kinds` of the tokens [B, T] whose rows of the token table are [B, T, D]."""
        model: Any = self
        token = torch.tensor(model.config.image_token_id, device=embeds.device)
        row: Tensor = model.get_input_embeddings()(token).detach()
        return embeds.detach().eq(row.to(embeds.dtype)).all(-1).long()

    def _others_may_look(self) -> bool:
        """Whether another process that has images would wait for this one, which has none."""
        model: Any = self
        weights = list(model.visual.parameters())
        trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        return trained or any(hasattr(weight, "ds_id") for weight in weights)

    def _nothing(self) -> Tensor:
        """No rows [0, D], which all weights of the encoder have had a part in."""
        model: Any = self
        config, weight = model.visual.config, next(model.visual.parameters())
        side = config.spatial_merge_size
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        blank = torch.zeros(side * side, width, dtype=weight.dtype, device=weight.device)
        grid = torch.tensor([[1, side, side]], device=weight.device)
        rows: Tensor = model.visual(blank, grid_thw=grid).pooler_output[:0]
        return rows


class Glm4vModel(GridModel, transformers.Glm4vModel):
    """See `GridModel`."""


class Glm46VModel(GridModel, transformers.Glm46VModel):
    """See `GridModel`."""


class GlmOcrModel(GridModel, transformers.GlmOcrModel):
    """See `GridModel`."""


class GridLoss(SupervisedLoss):
    """The loss over supervised tokens, for a model that images go into."""

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
        output_attentions: bool | None = None,
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
            output_attentions=output_attentions,
            **kwargs,
        )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        model: Any = self
        if model_kwargs.get("image_grid_thw") is not None:
            ids = model_kwargs.get("input_ids")
            if inputs_tensor.is_floating_point() and (ids is None or not ids.shape[1]):
                inputs_tensor = kinds = model.model.kinds_of_rows(inputs_tensor)
            else:
                kinds = model.model.kinds(inputs_tensor if ids is None else ids)
            model_kwargs = model_kwargs | {"mm_token_type_ids": kinds}
        positions: Tensor = super()._prepare_position_ids_for_generation(  # type: ignore[misc]
            inputs_tensor, model_kwargs
        )
        return positions


class Glm4vForConditionalGeneration(GridLoss, transformers.Glm4vForConditionalGeneration):
    """transformers' model with the loss over supervised tokens; keeps the name that it saves."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.__class__ = Glm4vModel
        self.lm_head.__class__ = SupervisedHead


class Glm46VForConditionalGeneration(GridLoss, transformers.Glm46VForConditionalGeneration):
    """transformers' model with the loss over supervised tokens; keeps the name that it saves."""

    def __init__(self, config: Any) -> None:
        if config.text_config.model_type != "glm4v_text":
            raise ModelError(
                f"model_type 'glm46v' around a text of model_type {config.text_config.model_type!r} is not "
                "supported; use a checkpoint of model_type 'glm4v_moe' or 'glm4v'"
            )
        super().__init__(config)
        self.model.__class__ = Glm46VModel
        self.lm_head.__class__ = SupervisedHead


class GlmOcrForConditionalGeneration(GridLoss, transformers.GlmOcrForConditionalGeneration):
    """transformers' model with the loss over supervised tokens; keeps the name that it saves."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.__class__ = GlmOcrModel
        self.lm_head.__class__ = SupervisedHead
        # The layer behind the last predicts a token further ahead (MTP); transformers knows its number in
        # the published depth only.
        behind = config.text_config.num_hidden_layers
        self._keys_to_ignore_on_load_unexpected = {rf"model\.language_model\.layers\.{behind}\."}
