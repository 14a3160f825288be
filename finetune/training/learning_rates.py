"""Which weights learn at which rate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from finetune.errors import ConfigError


@dataclass(frozen=True)
class Rates:
    """Peak learning rates by the names of the weights."""

    base: float
    by_name: Mapping[str, float] = field(default_factory=dict)
    """`training.learning_rates`: regexes searched in a name; the first that is found decides."""
    scale: Callable[[str], float] | None = None
    """How much faster than the others a weight learns, by its name: `methods.rate_scale`."""

    @property
    def is_one(self) -> bool:
        """Whether all weights learn at the same rate."""
        return not self.by_name and self.scale is None

    def of(self, name: str) -> float:
        """The rate of a weight."""
        rates = (rate for pattern, rate in self.by_name.items() if re.search(pattern, name))
        rate = next(rates, self.base)
        return rate * self.scale(name) if self.scale else rate

    def check(self, trained: Iterable[str]) -> None:
        """Raises ConfigError for patterns that are no regex or are in no trained weight's name."""
        names = list(trained)
        problems = []
        for pattern in self.by_name:
            try:
                if not any(re.search(pattern, name) for name in names):
                    problems.append(f"{pattern!r} is in the name of no weight that is trained")
            except re.error as error:
                problems.append(f"{pattern!r} is not a regex: {error}")
        if problems:
            raise ConfigError("\n".join(f"training.learning_rates: {p}" for p in problems))
