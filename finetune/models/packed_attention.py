"""Packed rows: where documents begin, read from positions that restart at zero, and attention in them.

Legend: B rows, T tokens, H heads, D head size.

sdpa takes a mask of T x T for a packed row. `in_documents` makes it attend piece by piece instead:
a document of more than 1,024 tokens is a piece without any mask, shorter neighbours share one piece
with a mask of their own. Time and memory then follow the documents, not the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

DOCUMENT_SDPA = "document_sdpa"  # what takes `documents` has a name that begins so
PIECE = 1024

Piece = tuple[int, int, int, Tensor | None]
"""Row, first and last token + 1, and what may see what (bool [1, 1, t, t]; None: causal)."""


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


def pieces(starts: Tensor) -> list[Piece]:
    """Cut rows [B, T] at documents' starts into pieces of up to 1,024 tokens or one document."""
    found: list[Piece] = []
    for row, begins in enumerate(starts):
        borders = [*begins.nonzero().flatten().tolist(), starts.shape[1]]
        first = 0
        for number in range(1, len(borders)):
            more = number + 1 < len(borders)
            if more and borders[number + 1] - borders[first] <= PIECE:
                continue
            begin, end = borders[first], borders[number]
            single = number - first == 1
            found.append((row, begin, end, None if single else _blocks(begins[begin:end])))
            first = number
    return found


def _blocks(begins: Tensor) -> Tensor:
    """Return bool [1, 1, t, t]: causal inside every document that `begins` [t] starts."""
    document = begins.cumsum(0)
    return (document[:, None] == document[None]).tril()[None, None]


def in_documents(attention: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function that takes `documents`, the `pieces` of a packed batch, in place of a mask."""

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        documents: list[Piece] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return [B, T, H, D] from query, key and value [B, H, T, D]."""
        if documents is None:
            result: tuple[Tensor, Tensor | None] = attention(
                module, query, key, value, attention_mask, **kwargs
            )
            return result
        rows: list[list[Tensor]] = [[] for _ in query]
        for row, begin, end, mask in documents:
            parts = (tensor[row : row + 1, :, begin:end] for tensor in (query, key, value))
            rows[row].append(attention(module, *parts, mask, **kwargs)[0])
        return torch.cat([torch.cat(row, dim=1) for row in rows]), None

    return attend


AttentionInterface.register(DOCUMENT_SDPA, in_documents(ALL_ATTENTION_FUNCTIONS["sdpa"]))
AttentionMaskInterface.register(DOCUMENT_SDPA, sdpa_mask)
