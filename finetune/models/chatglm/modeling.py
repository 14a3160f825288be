"""GLM-4 and GLM-4V in the published layout: token ids, and images, to logits or a loss.

Legend: B rows, T tokens, D hidden size, N images, P patches of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, initialization
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.layers import (
    Block,
    Embedding,
    Encoder,
    RotaryEmbedding,
    SelfAttention,
)
from finetune.models.chatglm.spans import Spans, positions, remember
from finetune.models.chatglm.vision import PatchEmbedding, VisionModel
from finetune.models.loss import SupervisedHead, SupervisedLoss
from finetune.models.packed_attention import document_starts, positions_in_documents


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers wants to know about this architecture."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_missing = (r"rotary_pos_emb\.inv_freq",)
    _keys_to_ignore_on_load_unexpected = (r"rotary_pos_emb\.inv_freq",)  # where they are scaled
    _can_record_outputs = {"hidden_states": Block, "attentions": SelfAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RotaryEmbedding):
            frequencies, _ = module.frequencies()
            initialization.copy_(module.inv_freq, frequencies)
            if self.config.scales_positions:
                initialization.copy_(module.original_inv_freq, frequencies)
        elif isinstance(module, PatchEmbedding):
            initialization.zeros_(module.cls_embedding)
        elif isinstance(module, VisionModel):
            initialization.zeros_(module.boi)
            initialization.zeros_(module.eoi)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return what sees images, or this model: `encoder` is the published name of a decoder."""
        tower = getattr(self.base_model, "vision", None) if modality == "image" else None
        return self if tower is None else tower


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Token ids to the last hidden state; also the home of the output layer, as published."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryEmbedding(config)
        self.encoder = Encoder(config)
        self.output_layer = SupervisedHead(config.hidden_size, config.padded_vocab_size, bias=False)
        self.vision = VisionModel(config) if config.vision_config is not None else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token table."""
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        self.embedding.word_embeddings = value  # type: ignore[assignment]

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(  # noqa: PLR0913 - transformers looks for these names in the signature
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the normalised hidden states [B, T, D] and the cache, if one was asked for.

        `pixel_values` [N, 3, H, W], or what the tower made of them, `image_features` [N, P + 2, D],
        belong to the image spans of `input_ids` in reading order. The decorators read
        `output_attentions`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        spans = None
        if self._may_show(input_ids, past_key_values, (pixel_values, image_features)):
            spans = self.image_spans(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.embedding.word_embeddings(input_ids)
        if spans is not None:
            inputs_embeds = self._with_images(inputs_embeds, pixel_values, image_features, spans)
        starts = document_starts(position_ids, attention_mask, past_key_values)
        if use_cache and past_key_values is None and starts is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = positions(inputs_embeds, attention_mask, past_key_values, spans)
        if past_key_values is not None and spans is not None and len(spans):
            remember(past_key_values, spans)
        # Positions only turn queries and keys. What a token may see follows from the mask or from
        # the documents: transformers would take an image's repeated positions for packing.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=None if starts is None else positions_in_documents(starts),
        )
        angles = self.rotary_pos_emb(inputs_embeds, position_ids)
        rotation = tuple(part[:, None] for part in angles)  # the same for every head
        hidden = inputs_embeds
        for block in self.encoder.layers:
            hidden = block(
                hidden,
                attention_mask=mask,
                rotation=rotation,
                past_key_values=past_key_values,
                **kwargs,
            )
        hidden = self.encoder.final_layernorm(hidden)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def image_spans(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Spans:
        """Return where images lie in token ids [B, T], or in what the token table made of them."""
        if input_ids is not None:
            return Spans.of_ids(input_ids, self.config)
        assert inputs_embeds is not None
        return Spans.of_embeds(inputs_embeds, self.embedding.word_embeddings, self.config)

    def _may_show(
        self, input_ids: Tensor | None, past_key_values: Any, images: tuple[Tensor | None, ...]
    ) -> bool:
        """Whether images are looked for: whenever some are given, and in all ids but a reply's next.

        Who makes embeddings without images may have put his own rows there.
        """
        if self.vision is None:
            return False
        if any(given is not None for given in images):
            return True
        if input_ids is None:
            return False
        return (
            input_ids.shape[1] > 1
            or past_key_values is None
            or past_key_values.get_seq_length() == 0
        )

    def _with_images(
        self,
        embeds: Tensor,
        pixel_values: Tensor | None,
        image_features: Tensor | None,
        spans: Spans,
    ) -> Tensor:
        """Return [B, T, D] with the images in their spans' places."""
        vision: VisionModel = self.vision  # type: ignore[assignment]
        if pixel_values is not None and image_features is not None:
            raise ValueError("pass either pixel_values or image_features")
        if pixel_values is not None and pixel_values.shape[0]:
            return spans.splice(embeds, vision.features(pixel_values))
        if image_features is not None:
            embeds = spans.splice(embeds, image_features)
        elif len(spans):
            raise ValueError(f"{len(spans)} image spans in input_ids but no pixel_values")
        # Another process may have images, and then every process must do what that one does.
        if vision.is_shared_out or (vision.is_trained and torch.is_grad_enabled()):
            return embeds + vision.nothing().to(embeds.dtype)
        return embeds


@dataclass
class HiddenOutput(CausalLMOutputWithPast):
    """What a language model says, and what it says it from."""

    last_hidden_state: Tensor | None = None


class ChatGLMForConditionalGeneration(SupervisedLoss, ChatGLMPreTrainedModel, GenerationMixin):
    """The language model, under its published class name."""

    _tp_plan: ClassVar[dict[str, str]] = {"transformer.output_layer": "colwise_gather_output"}
    # AutoModel gives this class, as published, where others give a base model.
    output_type = HiddenOutput

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

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
        image_features: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits, or with labels [B, T] the loss; see `SupervisedLoss`.

        `pixel_values` [N, 3, H, W] are the images of the spans (boi, patches, eoi) in `input_ids`;
        `image_features` [N, P + 2, D] are what a frozen tower made of them.
        """
        shown = {"pixel_values": pixel_values, "image_features": image_features}
        shown = {name: tensor for name, tensor in shown.items() if tensor is not None}
        if shown and self.config.vision_config is None:
            raise ValueError(f"this model has no vision part; leave {' and '.join(shown)} out")
        kwargs |= shown
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
            output_attentions=output_attentions,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return a step's inputs; images go in with the part of the prompt that shows them."""
        shown = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_features")}
        shown = {name: tensor for name, tensor in shown.items() if tensor is not None}
        if next_sequence_length is not None and inputs_embeds is None:
            shown = self._unseen(shown, input_ids, input_ids.shape[1] - next_sequence_length)
        if not is_first_iteration and kwargs.get("use_cache", True):
            shown = {}
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return inputs | shown

    def _unseen(self, shown: dict[str, Tensor], ids: Tensor, cached: int) -> dict[str, Tensor]:
        """Return the images of a whole dialogue that its cached beginning does not show."""
        if not shown or self.config.vision_config is None:
            return shown
        unseen = Spans.of_ids(ids, self.config).unseen(cached)
        if any(len(tensor) != len(unseen) for tensor in shown.values()):
            return shown  # of the new part alone, or wrong: the model counts
        return {name: tensor[unseen.to(tensor.device)] for name, tensor in shown.items()}

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Return the mask of who gave none: the placeholders of images are no padding."""
        mask: Tensor = super()._prepare_attention_mask_for_generation(
            inputs_tensor, generation_config, model_kwargs
        )
        if self.config.vision_config is None or inputs_tensor.is_floating_point():
            return mask
        spans = Spans.of_ids(inputs_tensor, self.config)
        return mask.masked_fill(spans.covered(), 1) if len(spans) else mask

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        counted: Tensor = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        if self.config.vision_config is None:
            return counted
        ids, embeds = model_kwargs.get("input_ids"), None
        if ids is None or not ids.shape[1]:
            is_ids = not inputs_tensor.is_floating_point()
            ids, embeds = (inputs_tensor, None) if is_ids else (None, inputs_tensor)
        spans = self.transformer.image_spans(ids, embeds)
        mask, past = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        tokens = inputs_tensor if ids is None else ids
        if mask is not None and mask.shape[1] == tokens.shape[1]:
            past = None  # these are all tokens, those of the cache too
        if not len(spans) and getattr(past, "standing_patches", None) is None:
            return counted
        return positions(tokens, mask, past, spans)

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        return self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output layer."""
        self.transformer.output_layer = value  # type: ignore[assignment]
