"""Prompts in, replies out, in their order: the loop of `evaluate` and of `predict`, which a kill only interrupts.

journal           windows that are whole, one after another
journal.batches   finished batches of the next window
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from finetune.generation.prompts import ReplyPrompt, window_size
from finetune.generation.settings import GREEDY, Sampling
from finetune.generation.structured import ANY_FORM, Form, PromptForm
from finetune.storage.journal import Journal

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate
    from finetune.generation.generate import Extras, Reply, Row, Window


class Backend(Protocol):
    """What answers windows of prompts, such as `generate.Generator`."""

    def replies(
        self,
        windows: Iterable[Window],
        *,
        note: Callable[[int, list[Row]], object] = ...,
        total: int | None = ...,
    ) -> Iterator[list[Reply]]:
        """The replies to each window's prompts, in their order."""


@dataclass(frozen=True)
class Answering:
    """How replies are made and kept."""

    template: ChatTemplate
    batch_size: int
    journal: Journal
    """Opened on rank 0; of `window` rows."""
    sampling: Sampling = GREEDY
    seed: int = 0
    form: Form = ANY_FORM
    """What every reply must be."""

    @property
    def window(self) -> int:
        """Prompts that are sorted by length together, and kept together."""
        return window_size(self.batch_size)

    def extras(self, number: int, prompts: Sequence[ReplyPrompt]) -> Extras:
        """What is asked besides, of a window that begins with prompt `number`."""
        from finetune.generation.generate import Extras, SeededSampling

        sampling = None
        if self.sampling != GREEDY:
            sampling = SeededSampling(self.sampling, self.seed, number)
        asked = [PromptForm(prompt.tools, prompt.opened) for prompt in prompts]
        return Extras(sampling, self.form.constraint_at(self.template, asked))


def answered(
    backend: Backend,
    prompts: Iterator[ReplyPrompt],
    how: Answering,
    *,
    behind: int = 0,
    total: int | None = None,
) -> Iterator[list[tuple[ReplyPrompt, Reply]]]:
    """Prompts with their replies, window by window, on rank 0; nothing elsewhere.

    All processes go through it to the end; memory holds a window, of those that are ahead two. Whoever
    gets a window adds its rows to the journal before asking for the next.

    Args:
        backend: generates.
        prompts: all of them, the same in every process.
        how: how, and where to.
        behind: prompts that the journal has answers to.
        total: of prompts, if it is known.
    """
    from finetune.distributed.processes import broadcast_from_rank0, is_rank0
    from finetune.generation.generate import Window

    on_rank0, held = is_rank0(), deque[list[ReplyPrompt]]()
    known = broadcast_from_rank0(how.journal.batches)

    def windows() -> Iterator[Window]:
        number = behind
        remaining = islice(prompts, behind, None)
        while window := list(islice(remaining, how.window)):
            if on_rank0:
                held.append(window)
            ids = [prompt.prompt_ids for prompt in window]
            yield Window(ids, how.extras(number, window), known if number == behind else {})
            number += len(window)

    left = None if total is None else total - behind
    for replies in backend.replies(windows(), note=how.journal.note, total=left):
        yield list(zip(held.popleft(), replies, strict=True))
