"""`model.freeze`: which weights stay as they are, whatever the method would train."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from finetune.errors import ConfigError
from finetune.models.families import VISION


def frozen_names(
    names: Iterable[str], patterns: Sequence[str], *, vision: str | None = None
) -> set[str]:
    """Those of the parameter `names` that a pattern is found in; `vision` is in every family's.

    Args:
        names: Of all parameters.
        patterns: `model.freeze`.
        vision: What the vision encoder is called in this family.

    Raises:
        ConfigError: A pattern is no regex, or is found in no name.
    """
    listed = list(names)
    found: set[str] = set()
    problems = []
    for pattern in patterns:
        try:
            compiled = re.compile(vision if vision and pattern == VISION else pattern)
        except re.error as error:
            problems.append(f"model.freeze: {pattern!r} is not a regex: {error}; correct it")
            continue
        hits = {name for name in listed if compiled.search(name)}
        if not hits:
            shown = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in listed))
            problems.append(
                f"model.freeze: {pattern!r} is in no weight's name; choose from {shown[:400]}"
            )
        found |= hits
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def routers(names: Iterable[str], router: str | None) -> set[str]:
    """Those of the parameter `names` that choose among experts: `router` is their modules' pattern.

    A token that goes to other experts is another function at once, and without the loss that keeps experts
    evenly used in pre-training a few of them take over.
    """
    if router is None:
        return set()
    return {name for name in names if re.fullmatch(rf"{router}\..+", name)}
