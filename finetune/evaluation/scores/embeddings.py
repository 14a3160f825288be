"""Replies beside their references -> how alike they are to a model that embeds words in context.

BERTScore (Zhang et al. 2020): every token of one text is matched with the token of the other whose
embedding is nearest by cosine. The F1 of both directions is the score, without rescaling.

T tokens of a text, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

from finetune.errors import ModelError

if TYPE_CHECKING:
    import torch

NAME = "bert_score"
AT_ONCE = 16
LONGEST = 512
"""Tokens of a text that are compared, where the model does not say how many it takes."""


@dataclass(frozen=True)
class Embedder:
    """A model that embeds tokens, from a folder or the hub."""

    path: str
    model: Any
    tokenizer: Any

    @classmethod
    def of(cls, path: str) -> Self:
        """Opens it; ModelError when it cannot be opened."""
        from transformers import AutoModel, AutoTokenizer

        from finetune.distributed.device import local_device
        from finetune.models.library_logging import quiet_libraries

        quiet_libraries()
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model: Any = AutoModel.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"--bert-score {path}: {str(error).splitlines()[0]}; name the folder or hub id of an "
                "encoder, such as FacebookAI/xlm-roberta-large"
            ) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(path, model.to(local_device()).eval(), tokenizer)

    def similarities(self, pairs: Iterable[tuple[str, str]]) -> Iterator[dict[str, float | None]]:
        """`bert_score` of every (reply, reference), in order; 0 where one of them is empty."""
        source = iter(pairs)
        while block := list(islice(source, AT_ONCE)):
            texts = list(dict.fromkeys(text for pair in block for text in pair))
            embedded = dict(zip(texts, self._embedded(texts), strict=True))
            for reply, reference in block:
                yield {NAME: f1(embedded[reply], embedded[reference])}

    def _embedded(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Embeddings of length one [T, D] of each text's own tokens, in the last layer."""
        import torch

        room = getattr(self.model.config, "max_position_embeddings", None) or LONGEST
        room = min(room, self.tokenizer.model_max_length, 4 * LONGEST) - 2  # RoBERTa counts from 2
        given = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=room, return_tensors="pt",
            return_special_tokens_mask=True,
        )  # fmt: skip
        special = given.pop("special_tokens_mask").bool()
        with torch.no_grad():
            hidden = self.model(**given.to(self.model.device)).last_hidden_state.float().cpu()
        own = given["attention_mask"].bool().cpu() & ~special
        return [
            torch.nn.functional.normalize(rows[mask], dim=-1)
            for rows, mask in zip(hidden, own, strict=True)
        ]

    @property
    def signature(self) -> dict[str, str]:
        """How the score came about."""
        return {
            NAME: f"F1 of greedy matches of token embeddings, last layer of {self.path}, not rescaled"
        }


def f1(reply: torch.Tensor, reference: torch.Tensor) -> float:
    """The F1 of nearest tokens in per cent, of normalised embeddings [T, D] of two texts."""
    if not len(reply) or not len(reference):
        return 0.0
    near = reply @ reference.T
    precision, recall = near.max(dim=1).values.mean(), near.max(dim=0).values.mean()
    total = float(precision + recall)
    return 100.0 * 2 * float(precision * recall) / total if total > 0 else 0.0
