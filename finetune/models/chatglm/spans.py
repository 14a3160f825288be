"""Where images lie in a batch of token ids, and which positions their tokens get.

Legend: N images, P patches per image (1600), B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from finetune.models.chatglm.configuration import ChatGLMConfig


class Spans:
    """Where the images lie in a batch: an eoi stands P + 1 places behind each boi.

    Never found by the placeholder between them, which is also the padding.
    """

    def __init__(self, input_ids: Tensor, config: ChatGLMConfig) -> None:
        self.shape = input_ids.shape
        self.patches = config.image_patches
        last = self.patches + 1
        begins = input_ids.eq(config.boi_token_id or 0)
        begins[:, max(0, begins.shape[1] - last) :] = False
        ends = input_ids.eq(config.eoi_token_id or 0).roll(-last, dims=1)
        self.rows, self.columns = (begins & ends).nonzero(as_tuple=True)

    def __len__(self) -> int:
        return len(self.rows)

    def splice(self, embeds: Tensor, features: Tensor) -> Tensor:
        """Return [B, T, D] with each image's rows [N, P + 2, D] in its span's place."""
        if len(self) != features.shape[0]:
            raise ValueError(
                f"{features.shape[0]} images for {len(self)} image spans; a span is boi, "
                f"{self.patches} placeholders and eoi (expand the three published tokens)"
            )
        columns = self.columns[:, None] + torch.arange(self.patches + 2, device=embeds.device)
        places = (self.rows[:, None].expand_as(columns), columns)
        return embeds.index_put(places, features.to(embeds.dtype))

    def standing(self) -> Tensor:
        """Return bool [B, T]: true at a patch that keeps the position of the patch before it."""
        still = torch.zeros(self.shape, dtype=torch.bool, device=self.rows.device)
        columns = self.columns[:, None] + torch.arange(2, self.patches + 1, device=self.rows.device)
        still[self.rows[:, None].expand_as(columns), columns] = True
        return still


def image_positions(length: int, attention_mask: Tensor | None, spans: Spans) -> Tensor:
    """Return int64 [B, T]: boi p, every patch p + 1, eoi p + 2; padding 0 and not counted."""
    steps = ~spans.standing()
    if attention_mask is None:
        return steps.long().cumsum(-1) - 1
    seen = attention_mask[:, -length:].bool()
    return ((steps & seen).long().cumsum(-1) - 1).masked_fill(~seen, 0)


def positions(
    embeds: Tensor, attention_mask: Tensor | None, past_key_values: Any, spans: Spans | None
) -> Tensor:
    """Return int64 [B, T] of embeddings [B, T, D], for a caller who gave none.

    Counted over the mask's ones as `generate` does, else over all tokens. The cache remembers how
    far the places of a row's tokens are ahead of their positions.
    """
    length = embeds.shape[1]
    mask = attention_mask if attention_mask is None or attention_mask.dim() == 2 else None
    if spans is not None and len(spans):
        if past_key_values is not None:
            past_key_values.image_lead = spans.standing().sum(1, keepdim=True)
        return image_positions(length, mask, spans)
    lead = getattr(past_key_values, "image_lead", 0)
    if mask is not None:
        counted = mask.long().cumsum(-1) - 1 - lead
        return counted.masked_fill(mask == 0, 0)[:, -length:]
    seen = past_key_values.get_seq_length() if past_key_values is not None else 0
    return (torch.arange(length, device=embeds.device) + seen).unsqueeze(0) - lead
