"""How the tokens of replies are chosen where one setting holds for all: `predict`, `chat`, `evaluate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from finetune.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """The settings of `decoder.Decoding` but for a reply's length and seed, by the same names."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raises ConfigError for numbers that mean nothing."""
        for name, low, high in (
            ("temperature", 0.0, None), ("top_p", 0.0, 1.0), ("top_k", 0, None), ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0), ("frequency_penalty", -2.0, 2.0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                wanted = f"{low} or more" if high is None else f"from {low} to {high}"
                raise ConfigError(f"{name} is {value}; it must be {wanted}")
        if self.repetition_penalty <= 0:
            raise ConfigError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0, 1 changes nothing"
            )

    @property
    def by_request_field(self) -> dict[str, float]:
        """What is not the default, by the names of OpenAI's fields."""
        plain = asdict(GREEDY)
        return {name: value for name, value in asdict(self).items() if value != plain[name]}


GREEDY = Sampling()
"""Always the likeliest token."""
