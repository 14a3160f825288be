"""Packed rows: where documents begin, read from positions that restart at zero, and attention in them.

Legend: B rows, T tokens, H heads, D head size.

sdpa takes a mask of T x T for a packed row. `in_documents` makes it attend piece by piece instead:
a document of more than 1,024 tokens is a piece without any mask, shorter neighbours share one piece
with a mask of their own. Time and memory then follow the documents, not the row. On a GPU a kernel
for documents of any length takes the whole row at once (torch's own `varlen_attn`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from finetune.models import kernels
from finetune.models.kernels.products import rows_are_apart
from finetune.models.sequence_parallel import Split

DOCUMENT_SDPA = "document_sdpa"  # what takes `documents` has a name that begins so
PIECE = 1024
NARROW = (torch.bfloat16, torch.float16)

Piece = tuple[int, int, int, Tensor | None]
"""Row, first and last token + 1, and what may see what (bool [1, 1, t, t]; None: causal)."""


def document_starts(
    position_ids: Tensor | None, attention_mask: Tensor | None, past_key_values: object
) -> Tensor | None:
    """Return bool [B, T], true at each first token, or None when the batch is not packed.

    Positions 0 1 2 0 1 are two documents. Only a zero starts one: the repeated positions of an
    image's patches do not. Of several coordinates [C, B, T] the first counts, time. With a mask or a
    cache the positions say nothing about documents.
    """
    if position_ids is None or attention_mask is not None or past_key_values is not None:
        return None
    if position_ids.dim() == 3:
        position_ids = position_ids[0]
    starts = position_ids == 0
    if not bool(starts[:, 1:].any()):
        return None
    starts[:, 0] = True
    return starts


def positions_in_documents(starts: Tensor) -> Tensor:
    """Return int64 [B, T]: 0 1 2 … from each start, whatever positions the rotation uses."""
    places = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return places - (places * starts).cummax(dim=1).values


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of packed rows lie.

    What a kernel must be told in numbers is found where the positions are. Made from a batch that
    the collator has just filled, on the CPU, no GPU is waited for.
    """

    starts: Tensor
    """bool [B, T], true at each first token."""
    pieces: list[Piece]
    borders: Tensor
    """int32 [documents + 1]: first tokens in [B x T], and its end."""
    longest: int
    """Tokens of the longest document."""
    split: Split | None = None
    """Which part of the rows this process has, where it shares them with others."""
    orders: dict[int, Tensor] = field(default_factory=dict)
    """See `with_prefixes`; made once for all layers."""

    @classmethod
    def of(cls, starts: Tensor, split: Split | None = None) -> Documents:
        """The documents that begin at `starts`."""
        first = starts.flatten().nonzero().flatten()
        borders = torch.cat([first, first.new_tensor([starts.numel()])]).to(torch.int32)
        return cls(starts, pieces(starts), borders, int(borders.diff().max()), split)

    def to(self, device: torch.device) -> Documents:
        """The same on a device, which is not waited for."""
        moved = [
            (row, begin, end, None if mask is None else mask.to(device, non_blocking=True))
            for row, begin, end, mask in self.pieces
        ]
        starts, borders = (t.to(device, non_blocking=True) for t in (self.starts, self.borders))
        return Documents(starts, moved, borders, self.longest, self.split)

    def with_prefixes(self, size: int) -> Tensor:
        """int64: where each document's `size` prefix tokens and then its own are in [size + B x T]."""
        if size not in self.orders:
            flat, device = self.starts.flatten(), self.starts.device
            tokens = torch.arange(len(flat), device=device)
            places = tokens + flat.cumsum(0) * size
            number = len(self.borders) - 1
            first = self.borders[:-1] + torch.arange(number, device=device) * size
            open_places = first[:, None] + torch.arange(size, device=device)
            order = tokens.new_empty(len(flat) + number * size)
            order[places] = tokens + size
            order[open_places.long()] = torch.arange(size, device=device)
            self.orders[size] = order
        return self.orders[size]


def varlen_attention(
    parts: tuple[Tensor, Tensor, Tensor],
    documents: Documents,
    scaling: float,
    prefix: Tensor | None = None,
) -> Tensor:
    """Return [B, T, H, D] of queries, keys and values [B, H, T, D], all documents in one kernel.

    A `prefix` [2, G, N, D] of keys and values is in front of every document.
    """
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, tokens, size = parts[0].shape
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in parts)  # [B x T, H, D]
    borders, longest = documents.borders, documents.longest
    if prefix is not None:
        width = prefix.shape[2]
        order = documents.with_prefixes(width)
        key, value = (
            torch.cat([own.transpose(0, 1), states]).index_select(0, order)
            for own, states in zip(prefix, (key, value), strict=True)
        )
        steps = torch.arange(len(borders), device=borders.device, dtype=borders.dtype)
        borders, longest = borders + steps * width, longest + width
    out: Any = varlen_attn(
        query, key, value, documents.borders, borders, documents.longest, longest,
        scale=scaling, window_size=(-1, 0), enable_gqa=key.shape[1] < heads,
    )  # fmt: skip
    result: Tensor = out.view(rows, tokens, heads, size)
    return result


def whole_rows(device: torch.device, split: Split | None = None) -> Documents:
    """Every row is one document, and nothing need be found out."""
    empty = torch.zeros(1, 1, dtype=torch.bool, device=device)
    return Documents(empty, [], empty.flatten().int(), 0, split)


def flash_arguments(documents: Documents) -> dict[str, Tensor | int]:
    """Return the variable-length arguments with which flash attention keeps documents apart."""
    return {
        "cu_seq_lens_q": documents.borders,
        "cu_seq_lens_k": documents.borders,
        "max_length_q": documents.longest,
        "max_length_k": documents.longest,
    }


def say_documents(model: Any, documents: Documents, kwargs: dict[str, Any]) -> Tensor | None:
    """Put what the model's attention wants to know into `kwargs`; return a mask to hand on."""
    implementation = str(model.config._attn_implementation)
    if implementation.startswith("flash"):
        kwargs.update(flash_arguments(documents))
    elif implementation.startswith("document"):
        kwargs["documents"] = documents
        return documents.starts[:, None, None]  # 4-D: handed on, no T x T mask is made
    return None


def without_packing(
    model: Any, ids: Tensor | None, positions: Tensor | None
) -> tuple[Tensor | None, Documents | None]:
    """Positions and documents that spare transformers a look for packing, which a GPU is waited for."""
    if ids is None or positions is not None:
        return positions, None
    if not str(model.config._attn_implementation).startswith("document"):
        return None, None
    return torch.arange(ids.shape[1], device=ids.device)[None], whole_rows(ids.device)


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


def grouped_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return [B, T, H, D] from query [B, H, T, D] and key and value [B, G, S, D], G dividing H.

    Without a mask it is causal, the last query seeing the last key. Keys and values are not repeated
    for the heads that share them, but where CUDA's kernels want a mask and whole heads.
    """
    heads, tokens, keys = query.shape[1], query.shape[2], key.shape[2]
    groups = heads // key.shape[1]
    if tokens > 1 and attention_mask is not None and rows_are_apart():
        ends = range(keys - tokens + 1, keys + 1)
        alone = [
            grouped_sdpa(module, query[:, :, at : at + 1], key[:, :, :end], value[:, :, :end], attention_mask[..., :end], dropout, scaling)[0]
            for at, end in enumerate(ends)
        ]  # fmt: skip
        return torch.cat(alone, dim=1), None
    if tokens == 1 and groups > 1 and attention_mask is not None and attention_mask.shape[1] == 1:
        # One query: the heads that share a key are as good as so many queries.
        query = query.reshape(len(query), -1, groups, query.shape[-1])
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
        return out.reshape(len(out), 1, heads, -1), None
    if attention_mask is not None and groups > 1 and query.is_cuda:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        groups = 1
    idle = 0
    if attention_mask is None and 1 < tokens < keys:
        if not torch.is_grad_enabled() and not dropout and query.device.type == "cpu":
            return _behind_others(query, key, value, scaling), None
        if _fits_one_kernel(query, {"dropout": dropout}):
            return _behind_in_one_kernel(query, key, value, scaling), None
        # Queries of zeros in front make it square, and causal attention needs no mask.
        idle = keys - tokens
        query = F.pad(query, (0, 0, idle, 0))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=attention_mask is None and tokens > 1,
        scale=scaling,
        enable_gqa=groups > 1,
    )
    return out.transpose(1, 2)[:, idle:].contiguous(), None


def _behind_others(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Return [B, T, H, D] of the last T tokens of S, without a mask of T x S.

    Attention to the tokens before and to the T themselves, joined by what each part weighs.
    """
    rows, heads, tokens, size = query.shape
    before, groups = key.shape[2] - tokens, heads // key.shape[1]
    attend: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # The heads that share a key are as good as so many queries.
    folded = query.reshape(rows, -1, groups * tokens, size)
    outs, weights = attend(folded, key[:, :, :before], value[:, :, :before], scale=scaling)
    own_key, own_value = (t[:, :, before:].repeat_interleave(groups, dim=1) for t in (key, value))
    own_outs, own_weights = attend(query, own_key, own_value, is_causal=True, scale=scaling)
    outs, weights = outs.reshape(query.shape), weights.reshape(rows, heads, tokens)
    share = (weights - own_weights).sigmoid()[..., None].to(outs.dtype)
    result: Tensor = torch.lerp(own_outs, outs, share)
    return result.transpose(1, 2).contiguous()


def _behind_in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor:
    """Return [B, T, H, D] of the last T tokens of S, from the kernel that takes documents."""
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, tokens, size = query.shape
    keys = key.shape[2]
    borders = torch.arange(rows + 1, device=query.device, dtype=torch.int32)
    states, others, values = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    out: Any = varlen_attn(
        states, others, values, borders * tokens, borders * keys, tokens, keys,
        scale=scaling, window_size=(-1, 0), enable_gqa=key.shape[1] < heads,
    )  # fmt: skip
    result: Tensor = out.view(rows, tokens, heads, size)
    return result


def _fits_one_kernel(query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Attention kernels are for 16 bits, and have no dropout."""
    return (
        query.dtype in NARROW
        and kernels.runs("varlen_attention", query)
        and not kwargs.get("dropout")
    )


def _of_one_size(*states: Tensor) -> list[Tensor]:
    """Return the tensors with zeros behind each head's numbers, which change no score and no sum."""
    size = max(tensor.shape[-1] for tensor in states)
    return [F.pad(tensor, (0, size - tensor.shape[-1])) for tensor in states]


def in_documents(
    attention: Callable[..., Any],
    prefix: Callable[[torch.nn.Module], Tensor | None] = lambda module: None,
) -> Callable[..., Any]:
    """An attention function that takes `documents` of a packed batch in place of a mask.

    `prefix` gives the keys and values [2, G, N, D] that `attention` puts in front of a module's own.
    """

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        documents: Documents | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return [B, T, H, D] from query, key and value [B, H, T, D]."""
        if (width := value.shape[-1]) != query.shape[
            -1
        ]:  # latent attention (MLA) may have two sizes
            query, key, value = _of_one_size(query, key, value)
            out, _ = attend(module, query, key, value, attention_mask, documents, **kwargs)
            return out[..., :width], None
        if documents is None or documents.split is None:
            return whole(module, query, key, value, attention_mask, documents, **kwargs)
        split = documents.split
        query, key, value = split.by_heads(query, key, value)
        out, _ = whole(module, query, key, value, None, documents, **kwargs, split=split)
        return split.by_tokens(out), None

    def whole(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        documents: Documents | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if documents is None or not documents.pieces:
            mask = attention_mask if documents is None else None
            result: tuple[Tensor, Tensor | None] = attention(
                module, query, key, value, mask, **kwargs
            )
            return result
        if _fits_one_kernel(query, kwargs):
            opened = prefix(module)
            if opened is not None:
                split = kwargs.get("split")
                opened = (opened if split is None else split.own_groups(opened)).to(key.dtype)
            scaling = kwargs["scaling"]
            return varlen_attention((query, key, value), documents, scaling, opened), None
        rows: list[list[Tensor]] = [[] for _ in query]
        for row, begin, end, mask in documents.pieces:
            parts = (tensor[row : row + 1, :, begin:end] for tensor in (query, key, value))
            rows[row].append(attention(module, *parts, mask, **kwargs)[0])
        return torch.cat([torch.cat(row, dim=1) for row in rows]), None

    return attend


AttentionInterface.register(DOCUMENT_SDPA, in_documents(grouped_sdpa))
AttentionMaskInterface.register(DOCUMENT_SDPA, sdpa_mask)
