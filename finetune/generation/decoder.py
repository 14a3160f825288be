"""Requests -> tokens: the one decoder, for training's evaluation, `evaluate`, `predict`, chat and serving.

Every row has settings, a sampler, a stop and a callback of its own, so that requests need not be
alike; a row that has ended makes room for the next prompt at once. A greedy reply is the same
whatever stands beside it; a sampled one depends on its own seed alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from finetune.distributed.map_batches import Poll
from finetune.distributed.processes import any_rank, is_sharded
from finetune.errors import ModelError
from finetune.generation.batch import Batch, Prompt, SharedPrefix
from finetune.generation.drafts import Drafts

COLDEST = 1e-5
"""Below this temperature a reply is greedy: dividing by less leaves the range of numbers."""


class Constraint(Protocol):
    """What the next token of one reply may be, such as the next piece of JSON under a schema."""

    def restrict(self, logits: Tensor) -> Tensor:
        """The logits [V] with -inf at every token that may not come."""

    def accept(self, token: int) -> None:
        """Takes note of the token that came."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the tokens of one reply are chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that have this probability together are drawn from."""
    seed: int | None = None
    """Equal seeds draw equal replies; None: another one each time."""
    top_k: int = 0
    """Only so many of the likeliest tokens are drawn from; 0: all."""
    min_p: float = 0.0
    """Only tokens are drawn that have this part of the likeliest one's probability."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that stand in the reply."""
    frequency_penalty: float = 0.0
    """The same, for every time that they stand there."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or reply are divided by it, or multiplied below 0."""

    @property
    def is_greedy(self) -> bool:
        """Nothing is drawn."""
        return self.temperature < COLDEST or self.top_p <= 0 or self.top_k == 1

    @property
    def penalises(self) -> bool:
        """Tokens that have come already are less likely."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


class ScoredToken(NamedTuple):
    """A token of a reply, how likely it was, and which ones were likelier or next to it."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]
    """The `top` likeliest tokens with their log probabilities."""


class Scores:
    """The log probabilities of a reply's tokens, as the model gave them before penalties and cuts."""

    def __init__(self, top: int) -> None:
        self.tokens: list[ScoredToken] = []
        self._top = top

    def add(self, token: int, logits: Tensor) -> None:
        """Takes note of a token and the logits [V] that it was chosen by."""
        logprobs = logits.float().log_softmax(dim=-1)
        best = logprobs.topk(self._top)
        likeliest = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        self.tokens.append(ScoredToken(token, float(logprobs[token]), likeliest))


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, how its reply is chosen, and who reads it while it is written."""

    prompt: Prompt
    decoding: Decoding
    on_token: Callable[[int], bool] | None = None
    """Gets every token before the stop; True ends the reply behind it."""
    constraint: Constraint | None = None
    scores: Scores | None = None
    """Where the log probabilities of the reply's tokens go, if they are wanted."""
    adapter: str = ""
    """Which of the model's adapters writes the reply, where it has several."""


_NONE = -1
"""In place of the likeliest token, where the logits are no numbers."""


def _require_finite(is_finite: bool) -> None:
    """ModelError for logits that are NaN or infinite."""
    if not is_finite:
        raise ModelError(
            "the model's logits are not finite numbers: its weights are too large or damaged, or "
            "model.dtype is too narrow for them; use another checkpoint"
        )


class DecodingRow:
    """A reply while it is written."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.ids: list[int] = []
        """The tokens so far, without the stop."""
        self.is_done = False
        self.stopped = False
        """A stop token ended it."""
        self.error: Exception | None = None
        """Why it cannot be written; no other row is concerned."""
        longest = request.decoding.max_new_tokens
        self.drafts = Drafts(request.prompt, self.ids, longest, request.adapter)
        """Of a row that is written alone."""
        self._sampler = None if request.decoding.is_greedy else Sampler(request.decoding)

    def append(self, logits: Tensor, likeliest: int, stop_ids: frozenset[int]) -> None:
        """Chooses the next token by its logits [V]."""
        try:
            _require_finite(likeliest != _NONE)
            token = self._choose(logits, likeliest)
            if self.request.scores is not None and token not in stop_ids:
                self.request.scores.add(token, logits)
            self.take(token, stop_ids)
        except Exception as error:  # whatever it is: the other rows go on
            self.is_done, self.error = True, error

    def take(self, token: int, stop_ids: Collection[int]) -> None:
        """Adds a token to the reply, or ends it. The one stop rule."""
        if token in stop_ids:
            self.is_done = self.stopped = True
            return
        self.ids.append(token)
        on_token, longest = self.request.on_token, self.request.decoding.max_new_tokens
        enough = on_token is not None and on_token(token)
        self.is_done = enough or len(self.ids) >= longest

    def _choose(self, logits: Tensor, likeliest: int) -> int:
        constraint = self.request.constraint
        if self.request.decoding.penalises:
            logits = self._penalised(logits)
        if constraint is not None:
            logits = constraint.restrict(logits)
        if constraint is not None or self.request.decoding.penalises:
            likeliest = int(_argmax(logits))
        token = likeliest if self._sampler is None else self._sampler.draw(logits)
        if constraint is not None:
            constraint.accept(token)
        return token

    def _penalised(self, logits: Tensor) -> Tensor:
        """The logits [V] with those of tokens that have come already lowered."""
        decoding = self.request.decoding
        counts = torch.bincount(torch.tensor(self.ids, dtype=torch.long), minlength=len(logits))
        counts = counts.to(logits.device)
        seen = counts > 0
        seen[torch.tensor([*self.request.prompt], dtype=torch.long, device=logits.device)] = True
        factor = decoding.repetition_penalty
        repeated = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(seen, repeated, logits)
        return (
            logits - decoding.frequency_penalty * counts - decoding.presence_penalty * (counts > 0)
        )


class Sampler:
    """Draws the tokens of one reply from a random stream of its own."""

    def __init__(self, decoding: Decoding) -> None:
        self._temperature = decoding.temperature
        self._cuts = LogitsProcessorList()
        if decoding.top_k:
            self._cuts.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            self._cuts.append(TopPLogitsWarper(decoding.top_p))
        if decoding.min_p:
            self._cuts.append(MinPLogitsWarper(decoding.min_p))
        self._random = torch.Generator()
        if decoding.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(decoding.seed)

    def draw(self, logits: Tensor) -> int:
        """A token by its logits [V]."""
        warm = logits.double() / self._temperature
        if self._cuts:
            warm = self._cuts(torch.empty(0), warm[None])[0]
        chances = warm.softmax(dim=-1)
        _require_finite(bool(chances.isfinite().all()))
        if chances.device.type == "cpu":
            return int(torch.multinomial(chances, 1, generator=self._random))
        # One number goes to the device, instead of the whole vocabulary to the processor.
        return token_at(chances, torch.rand((), generator=self._random, dtype=torch.float64).item())


def token_at(chances: Tensor, part: float) -> int:
    """The token that holds this part, from 0 to below 1, of the probabilities [V] laid end to end."""
    ends = chances.cumsum(dim=-1)
    return int(torch.searchsorted(ends, ends[-1:] * part, right=True))


class Decoder:
    """Rows that are written together, a token a round; one alone may get several, unless `drafts` is False."""

    def __init__(
        self, model: Any, stop_ids: Sequence[int], prefix: SharedPrefix | None = None, *, drafts: bool = True
    ) -> None:  # fmt: skip
        self.batch = Batch(model, prefix if prefix is not None else SharedPrefix(model, []))
        self._drafts_for = model if drafts else None
        self._stop_ids = frozenset(stop_ids)
        self._choose: Callable[[list[str]], object] | None = getattr(model, "choose", None)
        """Of a model with several adapters: says which row is whose."""
        self._rows: list[DecodingRow] = []
        """As they stand in the batch; some have ended."""

    @property
    def active(self) -> list[DecodingRow]:
        """The rows that have not ended."""
        return [row for row in self._rows if not row.is_done]

    def add(
        self, requests: Sequence[Request], prefix: SharedPrefix | None = None
    ) -> list[DecodingRow]:
        """Computes new prompts and chooses the first token of each; the rows that were there wait.

        Of prompts that begin with `prefix` only the rest is computed. All are for one adapter.
        """
        rows = [DecodingRow(request) for request in requests]
        self.drop_done()
        if self._choose is not None:
            self._choose([requests[0].adapter])
        logits = self.batch.prefill([request.prompt for request in requests], prefix)
        self._rows += rows
        self._append(rows, logits)
        return rows

    def step(self) -> None:
        """One more token for every row."""
        if self._choose is not None:
            self._choose([row.request.adapter for row in self._rows])
        if self._drafts_for is not None and len(self._rows) == 1:
            [row] = self._rows
            if draft := row.drafts.next(self._drafts_for, self.batch):
                self._check(row, draft)
                return
        logits = self.batch.step([(row.ids or [0])[-1] for row in self._rows])
        self._append(self._rows, logits)

    def _check(self, row: DecodingRow, draft: Sequence[int]) -> None:
        """The tokens that the row's next steps would give, as far as the draft is right, and one more."""
        logits = self.batch.check([(row.ids or [0])[-1], *draft])
        right = 0
        for place, guess in enumerate([*draft, None]):
            self._append([row], logits[place : place + 1])
            if row.is_done or row.ids[-1] != guess:
                break
            right += 1
        self.batch.forget(len(draft) - place)
        row.drafts.judge(right)

    def taken(self, row: DecodingRow) -> SharedPrefix:
        """What was computed of a row that has just ended: of its prompt, and of its reply."""
        place = next(place for place, other in enumerate(self._rows) if other is row)
        return self.batch.taken(place, [*map(int, row.request.prompt), *row.ids])

    def drop_done(self) -> None:
        """Forgets the rows that have ended."""
        places = [place for place, row in enumerate(self._rows) if not row.is_done]
        if len(places) < len(self._rows):
            self._rows = [self._rows[place] for place in places]
            self.batch.keep(places)

    @property
    def is_sparse(self) -> bool:
        """So many of the rows that are computed have ended that dropping them pays."""
        return 4 * len(self.active) <= 3 * len(self._rows)

    def _append(self, rows: Sequence[DecodingRow], logits: Tensor) -> None:
        for row, own, likeliest in zip(rows, logits, _likeliest(logits), strict=True):
            if not row.is_done:
                row.append(own, likeliest, self._stop_ids)


def _likeliest(logits: Tensor) -> list[int]:
    """The likeliest token of each row [B, V]; `_NONE` where one of its logits is NaN or the largest infinite."""
    at = _argmax(logits)
    largest = logits.gather(1, at[:, None])[:, 0]
    found: list[int] = torch.where(largest.isfinite(), at, _NONE).tolist()
    return found


def _argmax(logits: Tensor) -> Tensor:
    """Where the largest of the last dimension are; a NaN counts as such."""
    if logits.device.type == "cpu":  # numpy's takes a tenth of the time of torch's
        return torch.as_tensor(logits.detach().numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def write_replies(
    model: Any,
    stop_ids: Sequence[int],
    requests: Sequence[Request],
    *,
    slots: int,
    prefix: SharedPrefix | None = None,
    should_stop: Poll | None = None,
) -> list[DecodingRow]:
    """The rows of `requests` that have ended: all, in their order, unless `should_stop` returned True.

    Every round is one forward pass, also in a process that has nothing left while others share its
    weights. Where such a model has a vision encoder, which only new prompts pass through, all
    processes take new prompts in the same rounds.

    Args:
        model: in evaluation mode, without gradients.
        stop_ids: tokens that end a reply.
        requests: what is asked.
        slots: rows at once.
        prefix: what all prompts begin with, if it was computed.
        should_stop: polled at every forward pass.

    Raises:
        Exception: what went wrong with a row, once it has.
    """
    decoder = Decoder(model, stop_ids, prefix)
    waiting = deque(requests)
    rows: list[DecodingRow] = []
    together = is_sharded(model)
    in_step = together and getattr(model.config, "vision_config", None) is not None
    while True:
        busy, stop = bool(waiting or decoder.active), should_stop is not None and should_stop()
        if together:
            busy, stop = any_rank(busy), any_rank(stop)
        if stop or not busy:
            return [row for row in rows if row.is_done]
        new = _taken(waiting, decoder, slots)
        adds = any_rank(bool(new)) if in_step else bool(new)
        if new:
            rows += decoder.add(new)
        elif adds:
            decoder.batch.attend_prefill()
        else:
            _step(decoder, more_come=bool(waiting))
        for row in rows:
            if row.error is not None:
                raise row.error


def _taken(waiting: deque[Request], decoder: Decoder, slots: int) -> list[Request]:
    """The requests that come in now: as many as there is room for, once that is a quarter of it."""
    active = len(decoder.active)
    free = slots - active
    if active and free < max(1, slots // 4):
        return []
    first = [waiting[place].prompt for place in range(min(free, len(waiting)))]
    return [waiting.popleft() for _ in range(decoder.batch.num_at_once(first))]


def _step(decoder: Decoder, *, more_come: bool) -> None:
    if not decoder.active:  # the others have work, and need this process's part of the weights
        decoder.batch.attend_step()
        return
    if not more_come and decoder.is_sparse:
        decoder.drop_done()
    decoder.step()
