"""Cross-entropy over supervised tokens only; the logits [B, T, V] never exist.

Legend: B rows, T tokens, N supervised positions, D hidden size, V vocabulary. Position t predicts
label t + 1. The output layer runs over the N positions in chunks, inside its own `forward`, so that
hooks around it (DeepSpeed ZeRO-3 gathers the weight there) see an ordinary module call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from finetune.models import kernels
from finetune.models.packed_attention import (
    Documents,
    document_starts,
    say_documents,
    whole_rows,
    without_packing,
)
from finetune.models.sequence_parallel import Split

IGNORED = -100
HeadLoss = Callable[[nn.Module, Tensor], Tensor]
# Logits held at once: 128 positions of GLM-4's 151,552 rows, 80 MB in fp32. Larger on an accelerator,
# where each chunk reads the whole weight from memory again.
CHUNK_ELEMENTS = {"cpu": 20_000_000, "other": 80_000_000}
PRODUCT_ROWS = 40_000
"""Rows of an output layer whose gradient is made at once, besides their float32 sum."""


class SupervisedHead(kernels.ReplyingLinear):
    """An output layer without bias that can return the summed loss of positions, not logits."""

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Return logits [..., V]; with targets [N] and weights [N] or None, sum(weight · ce)."""
        if targets is None:
            return kernels.linear(hidden, self.weight)
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        total: Tensor = _ChunkedLoss.apply(hidden, weight, targets, weights)  # type: ignore[no-untyped-call]
        return total


class _ChunkedLoss(torch.autograd.Function):
    """sum(weight · cross-entropy), with both gradients taken while each chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None
    ) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        ctx.dtypes = hidden.dtype, weight.dtype
        # fp32 until the loss scale is known: fp16 gradients would vanish here
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if needs_hidden else None
        grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if needs_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)
            chunks = _chunks(targets.shape[0], weight.shape[0], kind, trained=needs_weight)
            logits = _Logits(matrix, max((at.stop - at.start for at in chunks), default=0))
            for at in chunks:
                rows, target = hidden[at].to(dtype), targets[at]
                share = 1.0 if weights is None else weights[at].float().unsqueeze(1)
                total += (logits.losses(rows, target) * share).sum()
                if not (needs_hidden or needs_weight):
                    continue
                slope = logits.slope(target)
                if grad_hidden is not None:
                    torch.mul(slope @ matrix, share, out=grad_hidden[at])
                if grad_weight is not None:
                    _add_product(grad_weight, slope, (rows * share).to(dtype))
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Scale what forward prepared."""
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        hidden, weight = (None if g is None else _scaled(g, outer[0], dtype) for g, dtype in saved)
        return hidden, weight, None, None


def _scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient x by, rounded once, without a float32 copy of an output layer in between."""
    return torch.mul(gradient, by, out=torch.empty_like(gradient, dtype=dtype))


class _Logits:
    """The logits of one chunk at a time, in memory that all chunks share.

    Fresh memory for 80 MB of logits costs a third of the matrix product that fills it, and softmax
    twice that of an exponential in place.
    """

    def __init__(self, matrix: Tensor, size: int) -> None:
        self.matrix = matrix.detach()
        self.narrow = matrix.new_empty(size, matrix.shape[0])
        self.fused = kernels.runs("cross_entropy", matrix)
        same = self.fused or matrix.dtype is torch.float32
        self.wide = self.narrow if same else torch.empty_like(self.narrow, dtype=torch.float32)
        self.sums = self.wide

    def losses(self, rows: Tensor, target: Tensor) -> Tensor:
        """Return cross-entropies [N, 1] in fp32; leaves exp(logit - highest) behind for `slope`."""
        count = rows.shape[0]
        torch.mm(rows.detach(), self.matrix.T, out=self.narrow[:count])
        if self.fused:
            return kernels.cross_entropy_(self.narrow[:count], target).unsqueeze(1)
        logits = self.wide[:count]
        if logits.dtype is not self.narrow.dtype:
            logits.copy_(self.narrow[:count])
        highest = logits.amax(dim=1, keepdim=True)
        chosen = logits.gather(1, target.unsqueeze(1))
        self.sums = logits.sub_(highest).exp_().sum(dim=1, keepdim=True)
        return highest + self.sums.log() - chosen

    def slope(self, target: Tensor) -> Tensor:
        """Return the gradient [N, V] of the last `losses` by their logits: softmax - one-hot."""
        count = target.shape[0]
        if self.fused:
            return self.narrow[:count]
        slope = self.wide[:count].mul_(self.sums.reciprocal())
        slope.scatter_add_(1, target.unsqueeze(1), slope.new_full((count, 1), -1.0))
        return slope if self.narrow is self.wide else self.narrow[:count].copy_(slope)


def _add_product(total: Tensor, slope: Tensor, rows: Tensor) -> None:
    """Add slopeᵀ · rows [V, D] to the fp32 total."""
    if slope.dtype is torch.float32:
        total.addmm_(slope.T, rows)
        return
    # A product is as large as what it is added to.
    for start in range(0, total.shape[0], PRODUCT_ROWS):
        at = slice(start, start + PRODUCT_ROWS)
        total[at] += slope[:, at].T @ rows


def _chunks(length: int, vocabulary: int, kind: str, *, trained: bool = False) -> list[slice]:
    elements = CHUNK_ELEMENTS.get(kind, CHUNK_ELEMENTS["other"])
    # A trained head is added to for each chunk, so that fewer are better.
    widest = vocabulary // (4 if trained and kind != "cpu" else 1)
    size = max(1, elements // widest)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _recomputed(head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Return the same sum through any head (one that PEFT wrapped); backward runs it again."""

    def chunk_loss(rows: Tensor, target: Tensor, share: Tensor | None) -> Tensor:
        losses = F.cross_entropy(head(rows).float(), target, reduction="none")
        return (losses if share is None else losses * share).sum()

    total: Tensor = hidden.sum() * 0.0  # in the graph even when nothing is supervised
    vocabulary = int(getattr(head, "out_features", 151552))
    for at in _chunks(targets.shape[0], vocabulary, hidden.device.type) or [slice(0, 0)]:
        share = None if weights is None else weights[at]
        part: Tensor = checkpoint(chunk_loss, hidden[at], targets[at], share, use_reentrant=False)
        total = total + part
    return total


def supervised_places(labels: Tensor) -> Tensor:
    """Return int64 [N]: the places in [B x T] whose next label is learnt."""
    is_learnt = torch.zeros_like(labels, dtype=torch.bool)
    is_learnt[:, :-1] = labels[:, 1:] != IGNORED
    return is_learnt.flatten().nonzero().flatten()


def for_model(
    batch: Mapping[str, Tensor], device: torch.device, split: Split | None = None
) -> dict[str, Any]:
    """Return what `SupervisedLoss.forward` is given of a batch on the CPU, on its way to `device`.

    Documents and the places of the loss are found here, where looking at numbers costs no waiting.
    Of a batch that is `split` it is given its part, and labels [B, T/N + 1] with the next part's first.
    """
    if split is not None:
        return _part(batch, device, split)
    given: dict[str, Any] = {name: t.to(device, non_blocking=True) for name, t in batch.items()}
    labels = batch["labels"]
    starts = document_starts(batch.get("position_ids"), batch.get("attention_mask"), None)
    if starts is not None:
        given["documents"] = Documents.of(starts).to(device)
        labels = labels.masked_fill(starts, IGNORED)
    given["supervised"] = supervised_places(labels).to(device, non_blocking=True)
    return given


def _part(batch: Mapping[str, Tensor], device: torch.device, split: Split) -> dict[str, Any]:
    """`for_model` of the tokens that this process has of every row."""
    ids, labels, positions = batch["input_ids"], batch["labels"], batch.get("position_ids")
    if (starts := document_starts(positions, None, None)) is not None:
        labels = labels.masked_fill(starts, IGNORED)
    positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
    parts = {"input_ids": split.own(ids), "position_ids": split.own(positions)}
    parts["labels"] = split.own_and_next(labels, IGNORED)
    if "loss_weights" in batch:
        parts["loss_weights"] = split.own_and_next(batch["loss_weights"], 0.0)
    parts["supervised"] = supervised_places(parts["labels"])
    given: dict[str, Any] = {name: t.to(device, non_blocking=True) for name, t in parts.items()}
    packed = None if starts is None else Documents.of(starts, split).to(device)
    return given | {"documents": packed or whole_rows(device, split)}


def supervised_loss(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    *,
    loss_weights: Tensor | None = None,
    num_items: Tensor | float | None = None,
    supervised: Tensor | None = None,
) -> Tensor:
    """Return sum(w · ce) / num_items, or / sum(w) when that is None; 0 when nothing is supervised.

    `hidden` is [B, T, D]; `labels` [B, T] hold -100 where nothing is learnt, or are one more
    [B, T + 1] where the last place predicts too; `loss_weights` are the labels'. `supervised` is
    `supervised_places` of the labels: who knows it already saves a GPU the wait for it.
    """
    if supervised is None:
        supervised = supervised_places(labels)
    # The last layer may lie elsewhere than the ids.
    labels, supervised = labels.to(hidden.device), supervised.to(hidden.device)
    targets = labels.flatten().index_select(0, supervised + 1)
    weights = None
    if loss_weights is not None:
        weights = loss_weights.to(hidden.device).flatten().index_select(0, supervised + 1)
    if missing := labels.shape[1] - hidden.shape[1]:
        supervised = supervised - supervised // labels.shape[1] * missing
    chosen = hidden.flatten(0, 1).index_select(0, supervised)
    if isinstance(head, SupervisedHead):
        total: Tensor = head(chosen, targets=targets, weights=weights)
    else:
        total = _recomputed(head, chosen, targets, weights)
    if num_items is None:
        num_items = float(targets.numel()) if weights is None else weights.float().sum()
    if isinstance(num_items, int | float):  # nothing is sent to the GPU
        return total / (num_items or 1.0)
    divisor = torch.as_tensor(num_items, dtype=torch.float32, device=total.device)
    return total / torch.where(divisor > 0, divisor, torch.ones_like(divisor))


def _unshifted(shift_labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return labels and weights [B, T + 1] whose next ones are these [B, T], also of the last place."""
    return (
        F.pad(shift_labels, (1, 0), value=IGNORED),
        None if weights is None else F.pad(weights, (1, 0)),
    )


def _within(documents: Documents, labels: Tensor) -> Tensor:
    """Return the labels without each document's first token, which no other document predicts."""
    more = labels.shape[1] - documents.starts.shape[1]
    return labels.masked_fill(F.pad(documents.starts, (0, more)), IGNORED)


def _logits(head: nn.Module, hidden: Tensor, keep: int | Tensor) -> Tensor:
    """Return [B, K, V] of the last `keep` places (0: all), of those at [K], or of each row's own [B, K]."""
    if isinstance(keep, int):
        chosen = hidden[:, slice(-keep, None)]
    elif keep.dim() == 1:
        chosen = hidden[:, keep]
    else:
        chosen = hidden.gather(1, keep[..., None].expand(-1, -1, hidden.shape[-1]))
    return head(chosen)  # type: ignore[no-any-return]


def _when_read(head: nn.Module, hidden: Tensor, keep: int | Tensor) -> Callable[[], Tensor]:
    """Return what makes `_logits` later, under the autocast of now."""
    kind = hidden.device.type
    cast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def make() -> Tensor:
        with cast:
            return _logits(head, hidden, keep)

    return make


class LossOutput(CausalLMOutputWithPast):
    """A loss, and logits for who reads the attribute: made then, of hidden states kept for it."""

    make_logits: Callable[[], Tensor] | None = None

    @property
    def logits(self) -> Tensor | None:
        """Logits [B, K, V]; None where there is nothing to make them from."""
        if self.__dict__["logits"] is None and self.make_logits is not None:
            self.logits = self.make_logits()
        return self.__dict__["logits"]  # type: ignore[no-any-return]

    @logits.setter
    def logits(self, made: Tensor | None) -> None:
        self.__dict__["logits"] = made


class SupervisedLoss:
    """The causal-LM `forward` of every family here: in training a loss and no logits.

    Mixed into a transformers model that has `base_model` (ids to last hidden state) and
    `get_output_embeddings` (the head).
    """

    looks_at_positions = False
    """Whether `base_model` looks for documents in positions, and makes a mask, by itself."""
    output_type: type[CausalLMOutputWithPast] = CausalLMOutputWithPast
    """What outputs with logits are; its fields are those of the base model's output."""

    def forward(  # noqa: PLR0913 - the signature of transformers' causal models
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
        *,
        supervised: Tensor | None = None,
        documents: Documents | None = None,
        head_loss: HeadLoss | None = None,
        shift_labels: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits, or with labels [B, T] the loss; see `supervised_loss`.

        In eval mode without gradients labels get both, as evaluation loops of others expect; in a
        training step of others logits are made when they are read.
        `shift_labels` [B, T] in the place of labels are what each position itself predicts.
        `head_loss(head, hidden [B, T, D])` is any other loss; it is called in here because DDP and
        ZeRO must see every use of a weight inside the forward pass.
        Without a mask, positions that restart at 0 are packed documents, which do not see each other.
        Who knows `documents` already saves a GPU the wait for them.
        """
        model: Any = self
        if documents is None:
            starts = document_starts(position_ids, attention_mask, past_key_values)
            documents = None if starts is None else Documents.of(starts)
        if documents is not None and documents.pieces and use_cache:
            raise ValueError("packed documents have no cache; pass use_cache=False")
        if shift_labels is not None:
            labels, loss_weights = _unshifted(shift_labels, loss_weights)
        if documents is not None and labels is not None:
            labels = _within(documents, labels)
        is_training = labels is not None or head_loss is not None
        if documents is None and is_training and self.looks_at_positions and attention_mask is None:
            position_ids, documents = without_packing(model, input_ids, position_ids)
        if documents is not None:
            attention_mask = say_documents(model, documents, kwargs)
        if documents is not None or is_training:
            use_cache = bool(use_cache)  # a cache in training costs memory and hides the packing
        kwargs |= {} if output_attentions is None else {"output_attentions": output_attentions}
        return_dict = kwargs.pop("return_dict", None)
        outputs = model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden, head = outputs.last_hidden_state, model.get_output_embeddings()
        # A loop of others: ours knows the places of the loss and wants no logits.
        of_others = head_loss is None and labels is not None and supervised is None
        evaluated = of_others and not model.training and not torch.is_grad_enabled()
        asked = evaluated or (head_loss is None and labels is None)
        if head_loss is None and labels is not None:
            head_loss = partial(
                supervised_loss,
                labels=labels,
                loss_weights=loss_weights,
                num_items=num_items_in_batch,
                supervised=supervised,
            )
        loss = None if head_loss is None else head_loss(head, hidden)
        logits = _logits(head, hidden, logits_to_keep) if asked else None
        kind = LossOutput if logits is None else self.output_type
        shown = {field.name: getattr(outputs, field.name, None) for field in fields(kind)}
        result = kind(**shown | {"loss": loss, "logits": logits})
        if of_others and isinstance(result, LossOutput) and not torch.compiler.is_compiling():
            result.make_logits = _when_read(head, hidden, logits_to_keep)
        return result.to_tuple() if return_dict is False else result
