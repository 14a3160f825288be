"""Attention, branch by branch, beside sums written out; and what documents are told to it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_masks import by_documents
from torch import Tensor, nn

from finetune.models import kernels, packed_attention
from finetune.models.kernels.products import one_by_one
from finetune.models.packed_attention import (
    Documents,
    document_starts,
    flash_arguments,
    grouped_sdpa,
    pieces,
    say_documents,
    whole_rows,
    without_packing,
)
from finetune.models.sequence_parallel import Split

SCALE = 0.3
"""Not one over the root of the size, which torch would take by itself."""


def states(tokens: int, keys: int, groups: int, *, heads: int = 4, size: int = 8) -> list[Tensor]:
    """Query [2, heads, tokens, size], and keys and values that `groups` heads share."""
    generator = torch.Generator().manual_seed(tokens + keys)
    shapes = ((heads, tokens), (heads // groups, keys), (heads // groups, keys))
    return [torch.randn(2, *shape, size, generator=generator) for shape in shapes]


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, H, D] in float64; without a mask the last query sees the last key."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (t.double() for t in (query, *(t.repeat_interleave(groups, 1) for t in (key, value))))
    scores = q @ k.transpose(2, 3) * SCALE
    tokens, keys = scores.shape[2:]
    seen = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens) if mask is None else mask
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def mask_of(kind: str, tokens: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    seen = torch.ones(2, 1, tokens, keys, dtype=torch.bool).tril(keys - tokens)
    seen[1, :, :, 0] = False  # padding in front
    seen[..., -1] |= not bool(seen.any(-1).all())
    return seen if kind == "shared" else seen.expand(2, 4, tokens, keys).clone()


@pytest.mark.parametrize("mask", ["none", "shared", "of each head"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 6), (4, 4), (3, 7)])
def test_every_branch_gives_the_sums_that_are_written_out(
    tokens: int, keys: int, groups: int, mask: str
) -> None:
    parts = states(tokens, keys, groups)
    seen = mask_of(mask, tokens, keys)
    expected = written_out(*parts, seen).float()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found, _ = grouped_sdpa(nn.Module(), *parts, seen, scaling=SCALE)
        assert found.is_contiguous() or tokens == 1
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", ["none", "shared"])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 6), (4, 4), (3, 7)])
def test_every_branch_drops_what_it_is_told_to_drop(tokens: int, keys: int, mask: str) -> None:
    parts = states(tokens, keys, 2)
    for apart in (False, True):
        seen = mask_of(mask, 1 if apart else tokens, keys)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), one_by_one() if apart else nullcontext():
                found = [
                    grouped_sdpa(nn.Module(), *parts, seen, dropout=p, scaling=SCALE)[0]
                    for p in (0.0, 0.0, 0.5, 0.5)
                ]
            assert torch.equal(found[0], found[1])
            assert not torch.equal(found[2], found[3])


def test_queries_that_are_to_be_apart_have_the_bits_of_each_alone() -> None:
    parts, seen = states(3, 7, 2), mask_of("shared", 1, 7)
    assert seen is not None
    with one_by_one():
        found, _ = grouped_sdpa(nn.Module(), *parts, seen, scaling=SCALE)
    for at, end in enumerate((5, 6, 7)):
        query, key, value = parts
        alone, _ = grouped_sdpa(
            nn.Module(), query[:, :, at : at + 1], key[:, :, :end], value[:, :, :end],
            seen[..., :end], scaling=SCALE,
        )  # fmt: skip
        assert torch.equal(found[:, at : at + 1], alone)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_last_tokens_of_longer_rows_may_go_through_the_kernel_for_documents(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_documents)
    monkeypatch.setattr(packed_attention, "NARROW", (torch.float32,))
    used: list[int] = []
    real = packed_attention._behind_in_one_kernel
    monkeypatch.setattr(packed_attention, "_behind_in_one_kernel", lambda *given: used.append(1) or real(*given))  # fmt: skip
    parts = states(3, 7, groups)
    with kernels.running(("varlen_attention",), "cpu"):
        found, _ = grouped_sdpa(nn.Module(), *parts, None, scaling=SCALE)
        torch.testing.assert_close(found, written_out(*parts, None).float())
        assert used == [1]
        grouped_sdpa(nn.Module(), *parts, None, scaling=SCALE, dropout=0.1)
        with torch.no_grad():  # on a CPU a product of two parts
            grouped_sdpa(nn.Module(), *parts, None, scaling=SCALE)
    assert used == [1]


# --- what is told of documents ---------------------------------------------------------------------------


def two_rows() -> Documents:
    starts = torch.zeros(2, 6, dtype=torch.bool)
    starts[:, 0] = starts[0, 2] = True
    return Documents.of(starts)


def test_documents_know_their_borders_and_the_longest_of_them() -> None:
    found = two_rows()
    assert found.borders.tolist() == [0, 2, 6, 12]
    assert found.borders.dtype is torch.int32
    assert found.longest == 6
    told = flash_arguments(found)
    assert {name: t if isinstance(t, int) else t.tolist() for name, t in told.items()} == {
        "cu_seq_lens_q": [0, 2, 6, 12], "cu_seq_lens_k": [0, 2, 6, 12], "max_length_q": 6, "max_length_k": 6,
    }  # fmt: skip


def test_documents_elsewhere_are_the_same_documents() -> None:
    split = Split(2, 1, lambda sent: sent)
    moved = Documents.of(two_rows().starts, split).to(torch.device("meta"))
    assert (moved.split, moved.longest) == (split, 6)
    assert [part[:3] for part in moved.pieces] == [part[:3] for part in two_rows().pieces]
    tensors = [
        moved.starts,
        moved.borders,
        *(part[3] for part in moved.pieces if part[3] is not None),
    ]
    assert len(tensors) == 3
    assert all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize("size", [1, 3])
def test_a_prefix_stands_in_front_of_every_document(size: int) -> None:
    documents = two_rows()
    documents.with_prefixes(2)  # another one before
    tokens = torch.arange(size, size + 12)
    prefix = torch.arange(size)
    expected = torch.cat([part for own in tokens.split([2, 4, 6]) for part in (prefix, own)])
    assert torch.equal(documents.with_prefixes(size), expected)
    assert documents.with_prefixes(size) is documents.with_prefixes(size)


@pytest.mark.parametrize(
    ("attention", "told", "masks"),
    [
        ("document_sdpa", {"documents"}, True), ("document_prefix_sdpa", {"documents"}, True),
        ("flash_attention_2", {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}, False),
        ("eager", set(), False), ("sdpa", set(), False),
    ],
)  # fmt: skip
def test_each_attention_is_told_of_documents_in_its_own_way(
    attention: str, told: set[str], masks: bool
) -> None:
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention))
    kwargs: dict[str, Any] = {}
    mask = say_documents(model, two_rows(), kwargs)
    assert set(kwargs) == told
    assert (mask is not None) is masks
    if mask is not None:
        assert mask.dim() == 4
        assert kwargs["documents"].longest == 6
    ids = torch.zeros(2, 3, dtype=torch.long)
    places, documents = without_packing(model, ids, None)
    assert (documents is not None) is masks
    assert (None if places is None else places.tolist()) == ([[0, 1, 2]] if masks else None)
    given = torch.ones(1, 3)
    assert without_packing(model, ids, given) == (given, None)
    assert without_packing(model, None, None) == (None, None)


def test_whole_rows_have_no_pieces_and_attend_without_the_mask_that_stands_for_them() -> None:
    parts = states(4, 4, 2)
    whole = whole_rows(torch.device("cpu"))
    assert (whole.pieces, whole.split) == ([], None)
    attend = packed_attention.in_documents(grouped_sdpa)
    found, _ = attend(nn.Module(), *parts, torch.zeros(1, 1, 1, 1, dtype=torch.bool), whole, scaling=SCALE)  # fmt: skip
    torch.testing.assert_close(found, written_out(*parts, None).float())


@pytest.mark.parametrize("part", [None, 0, 1])
def test_a_prefix_in_front_of_documents_is_as_narrow_as_they_are_and_each_part_has_its_own(
    part: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_documents)
    prefix = torch.randn(2, 2, 3, 8)  # of two heads of keys, in float32
    attend = packed_attention.in_documents(grouped_sdpa, lambda _: prefix)
    split = None if part is None else Split(2, part, lambda sent: sent)
    tokens = 6 if part is None else 3
    parts = [one.bfloat16() for one in states(tokens, tokens, 2)]
    starts = two_rows().starts
    seen: list[Any] = []
    real = packed_attention.varlen_attention
    monkeypatch.setattr(packed_attention, "varlen_attention", lambda *given: seen.append(given[3]) or real(*given))  # fmt: skip
    with kernels.running(("varlen_attention",), "cpu"):
        out, _ = attend(nn.Module(), *parts, None, Documents.of(starts, split), scaling=SCALE)
    assert (out.shape, out.dtype) == ((2, tokens, 4, 8), torch.bfloat16)
    own = prefix if part is None else prefix[:, part : part + 1]
    assert torch.equal(seen[0], own.bfloat16())


@pytest.mark.parametrize("groups", [1, 2])
def test_documents_attend_at_the_scale_of_the_layer_in_pieces_and_in_one_kernel(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_documents)
    monkeypatch.setattr(packed_attention, "NARROW", (torch.float32,))
    parts, documents = states(6, 6, groups), two_rows()
    numbers = documents.starts.cumsum(1)
    seen = (numbers[:, None, :, None] == numbers[:, None, None]).tril()
    expected = written_out(*parts, seen).float()
    attend = packed_attention.in_documents(grouped_sdpa)
    for names in ((), ("varlen_attention",)):
        with kernels.running(names, "cpu"):
            found, _ = attend(nn.Module(), *parts, None, documents, scaling=SCALE)
        torch.testing.assert_close(found, expected)


def test_a_piece_without_a_mask_is_a_document_that_has_no_room_beside_others() -> None:
    starts = torch.zeros(1, 3000, dtype=torch.bool)
    starts[0, [0, 500, 1024, 1300, 2325]] = True  # of 500, 524, 276, 1025 and 675 tokens
    found = [(begin, end, mask is None) for _, begin, end, mask in pieces(starts)]
    assert found == [(0, 1024, False), (1024, 1300, True), (1300, 2325, True), (2325, 3000, True)]


def test_packing_is_seen_before_anything_is_changed() -> None:
    places = torch.tensor([[3, 4, 0, 1]])
    document_starts(places, None, None)
    assert places.tolist() == [[3, 4, 0, 1]]
