"""GLM-4 in the published layout: parameter names, arithmetic and order of operations.

Legend: B rows, T tokens, D hidden size, H heads, G key/value groups, C channels per head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, initialization
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from finetune.models import kernels
from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.spans import Spans, image_positions, positions
from finetune.models.chatglm.vision import PatchEmbedding, VisionModel
from finetune.models.loss import SupervisedHead, SupervisedLoss
from finetune.models.packed_attention import document_starts, positions_in_documents
from finetune.models.wide_residual import down_projected


class RMSNorm(nn.Module):
    """Root-mean-square norm; weight multiplied in fp32, then the cast, as published."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalised [..., D] in the input's dtype."""
        return kernels.rms_norm(hidden, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """Rotation angles of the first half of each head's channels."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.channels = config.kv_channels // 2
        self.base = 10000.0 * config.rope_ratio
        # Checkpoints hold this buffer (in bf16, without rope_ratio) and nothing reads it.
        self.register_buffer("inv_freq", self.published_frequencies())

    def published_frequencies(self) -> Tensor:
        """Return what a checkpoint holds as `inv_freq` [C / 4]."""
        return 1.0 / 10000.0 ** (torch.arange(0, self.channels, 2).float() / self.channels)

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [B, 1, T, C / 4] of positions [B, T]."""
        steps = torch.arange(0, self.channels, 2, device=position_ids.device).float()
        frequencies = 1.0 / self.base ** (steps / self.channels)
        angles = position_ids[:, None, :, None].float() * frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)


def eager_attention(
    module: SelfAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return [B, T, H, C] and the attention weights; softmax in fp32."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SelfAttention(nn.Module):
    """Grouped-query attention with one projection whose rows are [q | k | v]."""

    is_causal = True

    def __init__(self, config: ChatGLMConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer
        self.head_dim = config.kv_channels
        self.num_key_value_groups = config.num_attention_heads // config.multi_query_group_num
        self.scaling = self.head_dim**-0.5
        width = config.num_attention_heads * self.head_dim
        group = config.multi_query_group_num * self.head_dim
        self.widths = (width, group, group)
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.widths), config.add_qkv_bias)
        self.dense = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended [B, T, D] and, from eager attention, its weights."""
        shape = (*hidden.shape[:2], -1, self.head_dim)
        query, key, value = (
            part.reshape(shape).transpose(1, 2)
            for part in self.query_key_value(hidden).split(self.widths, dim=-1)
        )
        query, key = (kernels.rotate(states, *rotation) for states in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        context, weights = attend(
            self, query, key, value, attention_mask,
            scaling=self.scaling, dropout=dropout, **kwargs,
        )  # fmt: skip
        return self.dense(context.flatten(2)), weights


class MLP(nn.Module):
    """SwiGLU with one projection whose rows are [gate | up]."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [B, T, D]."""
        return down_projected(self.dense_h_to_4h(hidden), self.dense_4h_to_h)


class Block(GradientCheckpointingLayer):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ChatGLMConfig, layer: int) -> None:
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Return [B, T, D]."""
        attended, _ = self.self_attention(self.input_layernorm(hidden), **kwargs)
        hidden = hidden + F.dropout(attended, self.hidden_dropout, self.training)
        transformed = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + F.dropout(transformed, self.hidden_dropout, self.training)


class Embedding(nn.Module):
    """Holds the table under its published name."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Encoder(nn.Module):
    """The layers and the final norm, under their published names."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)


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
    _can_record_outputs = {"hidden_states": Block, "attentions": SelfAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RotaryEmbedding):
            initialization.copy_(module.inv_freq, module.published_frequencies())
        elif isinstance(module, PatchEmbedding):
            initialization.zeros_(module.cls_embedding)
        elif isinstance(module, VisionModel):
            initialization.zeros_(module.boi)
            initialization.zeros_(module.eoi)


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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the normalised hidden states [B, T, D] and the cache, if one was asked for.

        `pixel_values` [N, 3, H, W], or what the tower made of them, `image_features` [N, P + 2, D],
        belong to the image spans of `input_ids` in reading order.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        begins = past_key_values is None or past_key_values.get_seq_length() == 0
        spans = None
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embedding.word_embeddings(input_ids)
            if self.vision is not None and begins:
                spans = Spans(input_ids, self.config)
                inputs_embeds = self._with_images(
                    inputs_embeds, pixel_values, image_features, spans
                )
        starts = document_starts(position_ids, attention_mask, past_key_values)
        if use_cache and past_key_values is None and starts is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = positions(inputs_embeds, attention_mask, past_key_values, spans)
        # Positions only turn queries and keys. What a token may see follows from the mask or from
        # the documents: transformers would take an image's repeated positions for packing.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=None if starts is None else positions_in_documents(starts),
        )
        rotation = self.rotary_pos_emb(position_ids, inputs_embeds.dtype)
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

    def _with_images(
        self,
        embeds: Tensor,
        pixel_values: Tensor | None,
        image_features: Tensor | None,
        spans: Spans,
    ) -> Tensor:
        """Return [B, T, D] with the images in their spans' places."""
        vision: VisionModel = self.vision  # type: ignore[assignment]
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


class ChatGLMForConditionalGeneration(SupervisedLoss, ChatGLMPreTrainedModel, GenerationMixin):
    """The language model, under its published class name."""

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
        **kwargs: Any,
    ) -> Any:
        """Return logits, or with labels [B, T] the loss alone; see `SupervisedLoss`.

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
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return a step's inputs; the images go in with the prompt only."""
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            kwargs.pop("pixel_values", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, **kwargs
        )
        return inputs

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        if self.config.vision_config is not None and not inputs_tensor.is_floating_point():
            spans = Spans(inputs_tensor, self.config)
            if len(spans):
                mask = model_kwargs.get("attention_mask")
                return image_positions(inputs_tensor.shape[1], mask, spans)
        counted: Tensor = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return counted

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        return self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output layer."""
        self.transformer.output_layer = value  # type: ignore[assignment]
