"""Where a packed row's documents begin, read from positions that restart at zero.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(
    position_ids: Tensor | None, attention_mask: Tensor | None, past_key_values: object
) -> Tensor | None:
    """Return bool [B, T], true at each first token, or None when the batch is not packed.

    Positions 0 1 2 0 1 are two documents. Only a zero starts one: the repeated positions of an
    image's patches do not. With a mask or a cache the positions say nothing about documents.
    """
    if position_ids is None or attention_mask is not None or past_key_values is not None:
        return None
    starts = position_ids == 0
    if not bool(starts[:, 1:].any()):
        return None
    starts[:, 0] = True
    return starts


def positions_in_documents(starts: Tensor) -> Tensor:
    """Return int64 [B, T]: 0 1 2 … from each start, whatever positions the rotation uses."""
    places = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return places - (places * starts).cummax(dim=1).values


def flash_arguments(starts: Tensor) -> dict[str, Tensor | int]:
    """Return the variable-length arguments with which flash attention keeps documents apart."""
    borders = starts.flatten().nonzero().flatten()
    cumulative = torch.cat([borders, borders.new_tensor([starts.numel()])]).to(torch.int32)
    longest = int(cumulative.diff().max())
    return {
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }
