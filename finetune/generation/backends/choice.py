"""Which program replies in the place of our own generation, if any does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import ConfigError
from finetune.generation.backends.address import Address
from finetune.generation.replies import Backend

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate

AT_ONCE = 32
"""Requests of an endpoint under way, where `evaluation.batch_size` is `auto`."""


@dataclass(frozen=True)
class Replying:
    """What answers the prompts of one model."""

    backend: Backend
    positions: int | None
    """Tokens that a prompt and its reply have room in; None where that is not known."""
    rows: int
    """Prompts at once."""
    facts: Callable[[], dict[str, Any]]
    """What is written down about it in the end."""


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """What generates the replies; losses and tasks are always computed here."""

    backend: Literal["transformers", "vllm"] = "transformers"
    endpoint: str = ""
    """`openai:MODEL@URL` of a server that replies in the place of the model's own weights."""

    @property
    def words(self) -> str:
        """By whom; nothing where it is our own generation."""
        if self.endpoint:
            return f"by {self.endpoint}"
        return "" if self.backend == "transformers" else f"by {self.backend}"

    def check(self, *, restricted: bool, sampled: bool, needs_weights: bool) -> None:
        """ConfigError for what replies from elsewhere do not go with.

        Args:
            restricted: replies are to have a form.
            sampled: they are not greedy.
            needs_weights: tasks or further losses are asked for.
        """
        if not self.words:
            return
        if self.endpoint:
            Address.of(self.endpoint, "--endpoint")
        if self.endpoint and needs_weights:
            raise ConfigError(
                "--endpoint gives replies only: leave out --tasks, --needle and --regression-data, which need the model's weights"
            )
        if restricted:
            named = "--endpoint" if self.endpoint else f"--backend {self.backend}"
            raise ConfigError(
                f"--json-schema and --require-call do not go with {named}; leave one of them out"
            )
        if not self.endpoint and sampled:
            raise ConfigError(
                "--backend vllm replies greedily; leave --temperature out, or use --backend transformers"
            )

    def at_endpoint(
        self, template: ChatTemplate, target: str, *, base: str | None, rows: int | str, max_new_tokens: int
    ) -> Replying:  # fmt: skip
        """A server that has the model; of `target` here only the tokenizer and config.json are read."""
        from finetune.generation.backends.endpoint import EndpointGenerator
        from finetune.generation.backends.vllm import context_of

        at_once = rows if isinstance(rows, int) else AT_ONCE
        address = Address.of(self.endpoint, "--endpoint")
        backend = EndpointGenerator(
            address, template, max_new_tokens=max_new_tokens, at_once=at_once
        )
        facts = {"dtype": "that of the endpoint"}
        return Replying(backend, context_of(target, base), at_once, lambda: facts)


OURS = BackendChoice()


@contextmanager
def through_vllm(
    template: ChatTemplate,
    target: str,
    lengths: Callable[[int | None], Iterable[int]],
    *,
    base: str | None,
    rows: int,
    max_new_tokens: int,
) -> Iterator[Replying]:
    """A vLLM of this process, while it is asked; `lengths` gives those of the prompts, for so many positions."""
    from finetune.generation.backends.vllm import VllmGenerator, context_of, number_format

    positions = context_of(target, base)
    longest = max(lengths(positions), default=1) + max_new_tokens
    facts = {"dtype": f"torch.{number_format(target)}"}
    generator = VllmGenerator(
        target, template, base=base, max_length=longest, max_new_tokens=max_new_tokens
    )
    with closing(generator) as backend:
        yield Replying(backend, positions, rows, lambda: facts)
