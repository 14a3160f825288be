"""Dialogues to examples: rendered in batches, shortened by whole turns, kept on disk, counted.

Nothing grows with the data but a few bytes per example: dialogues are streamed into an Arrow file
in the cache, and examples are read from its memory map.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune import console
from finetune.data import cache
from finetune.data.store import ExampleFile, ExampleWriter, Span
from finetune.errors import DataError

if TYPE_CHECKING:
    from finetune.data.conversation import Conversation
    from finetune.data.spans import Rendered
    from finetune.data.template import ChatTemplate

IGNORED = -100
"""The label of a token that carries no loss."""
FORMAT = 1
"""Version of the stored file and of the rules that fill it; another one never reads this one's."""
BATCH = 1000
"""Dialogues rendered in one call of the tokenizer and written as one record batch."""
EXAMPLES_FILE = "examples.arrow"
_NAMED = 5
"""Dropped rows named per reason."""
_LISTED = 20
"""Too long rows listed in an error."""


@dataclass(frozen=True)
class LengthPolicy:
    """How long an example may be, and which replies it teaches."""

    max_length: int
    train_on: Literal["every_reply", "last_reply"] = "every_reply"
    on_too_long: Literal["drop_oldest_turns", "drop", "error"] = "drop_oldest_turns"


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a preparation; lengths and tokens are of the kept examples."""

    rows: int = 0
    """Rows read, bad ones among them."""
    bad: int = 0
    """Rows that are no dialogue, left out with `on_bad_row: skip`."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Dialogues left out, by reason."""
    named: tuple[str, ...] = ()
    """The first dropped dialogues of every reason, as `file:line: reason`."""
    truncated: int = 0
    """Dialogues that lost their oldest turns."""
    kept: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One dialogue to learn from; T tokens."""

    input_ids: npt.NDArray[np.int32]
    """[T], read-only."""
    labels: npt.NDArray[np.int64]
    """[T]: the ids where they carry loss, elsewhere -100; not shifted."""
    loss_weights: npt.NDArray[np.float32] | None
    """[T], 0 where nothing is learned; None when all supervised tokens weigh 1."""
    index: int
    """Its place in the dataset."""
    where: str
    """`file:line`."""


class PreparedDataset:
    """Examples by index over a memory-mapped file.

    `view` maps an example to its stored row when the two differ, because a source is repeated or
    taken in part; nothing is stored twice.
    """

    def __init__(
        self,
        file: ExampleFile,
        counts: Counts,
        fingerprint: str,
        view: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._file = file
        self._view = view
        self.counts = counts
        """Counts of the stored rows, whatever their sources' weights."""
        self.fingerprint = fingerprint
        """Changes when any example or its place changes; independent of paths."""
        stored = file.lengths()
        self.lengths = stored if view is None else stored[view]
        """Tokens of every example, int32 [examples]."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        row = self._row(index)
        stored = self._file[row]
        labels = np.full(len(stored.input_ids), IGNORED, dtype=np.int64)
        weights = None if (stored.weights == 1.0).all() else np.zeros(len(labels), np.float32)
        for start, end, weight in zip(stored.starts, stored.ends, stored.weights, strict=True):
            labels[start:end] = stored.input_ids[start:end]
            if weights is not None:
                weights[start:end] = weight
        return Example(stored.input_ids, labels, weights, index, self._file.where(row))

    def where(self, index: int) -> str:
        """The `file:line` of an example."""
        return self._file.where(self._row(index))

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return index if self._view is None else int(self._view[index])


def prepare(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    policy: LengthPolicy,
    *,
    key: str,
    cache_root: Path | None = None,
) -> PreparedDataset:
    """The examples of `conversations`, from the cache when `key` (a hash of their content) is known.

    Raises DataError when nothing is left to learn from, and with `on_too_long: error` listing
    every dialogue that is too long.
    """

    def build(folder: Path) -> dict[str, Any]:
        return _write(conversations, template, policy, folder)

    full_key = cache.key_of(_made_by(template, policy) | {"content": key})
    entry = cache.open_or_build(_folder(cache_root), full_key, build)
    return PreparedDataset(
        ExampleFile(entry.folder / EXAMPLES_FILE), _counts(entry.facts), full_key
    )


def _write(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    policy: LengthPolicy,
    folder: Path,
) -> dict[str, Any]:
    """Writes the examples into `folder`; returns their counts."""
    tally = _Tally()
    stream = iter(conversations)
    with (
        ExampleWriter(folder / EXAMPLES_FILE) as writer,
        console.progress(None, "tokenising dialogues") as meter,
    ):
        while batch := list(islice(stream, BATCH)):
            kept = list(_examples(batch, template, policy, tally))
            writer.append([k.ids for k in kept], [k.spans for k in kept], [k.where for k in kept])
            meter.advance(len(batch))
    tally.raise_if_refused(policy.max_length)
    return {"counts": asdict(tally.counts())}


class _Kept(NamedTuple):
    ids: npt.NDArray[np.int32]
    spans: Sequence[Span]
    where: str


def _examples(
    batch: Sequence[Conversation], template: ChatTemplate, policy: LengthPolicy, tally: _Tally
) -> Iterator[_Kept]:
    """The examples that the dialogues of a batch give; what they do not give goes into `tally`."""
    for conversation, rendered in zip(batch, template.render(batch), strict=True):
        tally.rows += 1
        fitting: Rendered | None = rendered
        if len(rendered.input_ids) > policy.max_length:
            fitting = _fit(rendered, conversation, template, policy, tally)
        if fitting is None:
            continue
        spans = template.trained_spans(fitting, conversation, policy.train_on)
        supervised = sum(end - start for start, end, weight in spans if weight > 0)
        if supervised == 0:
            tally.drop(conversation.where, "no reply that is trained")
            continue
        tally.keep(len(fitting.input_ids), supervised, shortened=fitting is not rendered)
        yield _Kept(fitting.input_ids, spans, conversation.where)


def _fit(
    rendered: Rendered,
    conversation: Conversation,
    template: ChatTemplate,
    policy: LengthPolicy,
    tally: _Tally,
) -> Rendered | None:
    """A shorter rendering, or None after noting why there is none."""
    length = len(rendered.input_ids)
    if policy.on_too_long == "error":
        tally.refuse(f"{conversation.where}: {length} tokens")
        return None
    if policy.on_too_long == "drop":
        tally.drop(conversation.where, "too long", f"{length} tokens")
        return None
    fitting = template.shorten(rendered, conversation, policy.max_length, policy.train_on)
    if fitting is None:
        tally.drop(conversation.where, "no trained reply fits", f"{length} tokens")
    return fitting


class _Tally:
    """Counts while examples are made."""

    def __init__(self) -> None:
        self.rows = self.truncated = self.kept = 0
        self.tokens = self.supervised_tokens = self.longest = 0
        self._dropped: Counter[str] = Counter()
        self._named: list[str] = []
        self._refused: list[str] = []
        self._num_refused = 0

    def keep(self, tokens: int, supervised: int, *, shortened: bool) -> None:
        self.kept += 1
        self.truncated += shortened
        self.tokens += tokens
        self.supervised_tokens += supervised
        self.longest = max(self.longest, tokens)

    def drop(self, where: str, reason: str, detail: str = "") -> None:
        self._dropped[reason] += 1
        if self._dropped[reason] <= _NAMED:
            self._named.append(f"{where}: {reason}" + (f" ({detail})" if detail else ""))

    def refuse(self, problem: str) -> None:
        self._num_refused += 1
        if len(self._refused) < _LISTED:
            self._refused.append(problem)

    def raise_if_refused(self, max_length: int) -> None:
        if not self._num_refused:
            return
        more = self._num_refused - len(self._refused)
        raise DataError(
            f"{self._num_refused} dialogues are longer than data.max_length ({max_length}); raise "
            "it, or set data.on_too_long to drop_oldest_turns or drop:\n  "
            + "\n  ".join([*self._refused, *([f"... and {more} more"] if more else [])])
        )

    def counts(self) -> Counts:
        return Counts(
            rows=self.rows,
            dropped=dict(self._dropped),
            named=tuple(self._named),
            truncated=self.truncated,
            kept=self.kept,
            tokens=self.tokens,
            supervised_tokens=self.supervised_tokens,
            longest=self.longest,
        )


def _made_by(template: ChatTemplate, policy: LengthPolicy) -> dict[str, Any]:
    """What decides the stored rows besides the dialogues."""
    return {"format": FORMAT, "template": template.fingerprint, "policy": asdict(policy)}


def _folder(cache_root: Path | None) -> Path:
    return (cache_root or cache.default_root()) / "examples"


def _counts(facts: Mapping[str, Any]) -> Counts:
    return Counts(**{**facts["counts"], "named": tuple(facts["counts"]["named"])})
