"""Where images lie in a batch of token ids, and which positions their tokens get.

Legend: N images, P patches per image (1600), B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from finetune.models.chatglm.configuration import ChatGLMConfig


class Spans:
    """Where the images lie in a batch: an eoi stands P + 1 places behind each boi.

    Never found by the placeholder between them, which is also the padding.
    """

    def __init__(self, begins: Tensor, ends: Tensor, patches: int) -> None:
        """Take bool [B, T] tensors that are true at each boi and at each eoi."""
        self.shape = begins.shape
        self.patches = patches
        last = patches + 1
        begins[:, max(0, begins.shape[1] - last) :] = False
        self.rows, self.columns = (begins & ends.roll(-last, dims=1)).nonzero(as_tuple=True)

    @classmethod
    def of_ids(cls, input_ids: Tensor, config: ChatGLMConfig) -> Spans:
        """Return the spans in token ids [B, T]."""
        begins, ends = (input_ids.eq(marker) for marker in markers(config))
        return cls(begins, ends, config.image_patches)

    @classmethod
    def of_embeds(cls, embeds: Tensor, table: nn.Module, config: ChatGLMConfig) -> Spans:
        """Return the spans in [B, T, D] that `table` made of token ids."""
        wanted = table(torch.tensor(markers(config), device=embeds.device)).detach()
        begins, ends = (embeds.detach().eq(row.to(embeds.dtype)).all(-1) for row in wanted)
        return cls(begins, ends, config.image_patches)

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

    def covered(self) -> Tensor:
        """Return bool [B, T]: true in every span."""
        return self._at(0, self.patches + 2)

    def standing(self) -> Tensor:
        """Return bool [B, T]: true at a patch that keeps the position of the patch before it."""
        return self._at(2, self.patches + 1)

    def _at(self, first: int, last: int) -> Tensor:
        """Return bool [B, T]: true from each span's `first` token to before its `last`."""
        chosen = torch.zeros(self.shape, dtype=torch.bool, device=self.rows.device)
        columns = self.columns[:, None] + torch.arange(first, last, device=self.rows.device)
        chosen[self.rows[:, None].expand_as(columns), columns] = True
        return chosen

    def unseen(self, cached: int) -> Tensor:
        """Return bool [N]: which images lie behind the first `cached` tokens; none may lie across."""
        if bool(((self.columns < cached) & (self.columns + self.patches + 2 > cached)).any()):
            raise ValueError(
                f"the cache ends inside an image, behind {cached} tokens; crop it to before the image"
            )
        return self.columns >= cached


def markers(config: ChatGLMConfig) -> list[int]:
    """Return the ids of boi and eoi."""
    return [config.boi_token_id or 0, config.eoi_token_id or 0]


def positions(
    tokens: Tensor, attention_mask: Tensor | None, past_key_values: Any, spans: Spans | None
) -> Tensor:
    """Return int64 [B, T] of tokens [B, T, ...]: boi p, every patch p + 1, eoi p + 2; padding 0.

    Counted over the mask's ones as `generate` does, else over all tokens, and on from the cache.
    """
    length = tokens.shape[1]
    mask = attention_mask if attention_mask is None or attention_mask.dim() == 2 else None
    still: Tensor | int = _standing_before(past_key_values, tokens.shape[0])
    if spans is not None and len(spans):
        still = still + spans.standing().long().cumsum(-1)
    if mask is not None:
        counted = mask.long().cumsum(-1)[:, -length:] - 1 - still
        return counted.masked_fill(mask[:, -length:] == 0, 0)
    seen = past_key_values.get_seq_length() if past_key_values is not None else 0
    return (torch.arange(length, device=tokens.device) + seen).unsqueeze(0) - still


def remember(past_key_values: Any, spans: Spans) -> None:
    """Note on the cache, before its tokens are in it, where patches keep their position."""
    before, known = past_key_values.get_seq_length(), _noted(past_key_values)
    still = spans.standing()
    if known is None:
        known = still[:, :0]
    past_key_values.standing_patches = torch.cat(
        [F.pad(known[:, :before], (0, before - min(before, known.shape[1]))), still], dim=1
    )


def _standing_before(past_key_values: Any, rows: int) -> Tensor | int:
    """How far the places of the cached tokens are ahead of their positions: [B, 1], or 0."""
    noted = _noted(past_key_values)
    if noted is None:
        return 0
    ahead = noted[:, : past_key_values.get_seq_length()].sum(1, keepdim=True)
    # Of a cache whose rows were multiplied, for beams or several replies.
    return ahead.repeat_interleave(rows // ahead.shape[0], dim=0)


def _noted(past_key_values: Any) -> Tensor | None:
    noted: Tensor | None = getattr(past_key_values, "standing_patches", None)
    return noted
