"""Regexes of strangers, matched in a process of its own with a limit on time.

A pattern such as `(a+)+$` may take longer than anybody waits, and Python's `re` cannot be interrupted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from finetune.errors import ModelError

SECONDS = 5.0
"""For all names of a model; our own patterns take milliseconds."""
LONGEST = 10_000
"""Characters of a pattern."""

_BACKTRACKS = re.compile(r"[*+?{]")
_CHILD = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))  # a parent that was killed ends nobody
patterns, names = json.load(sys.stdin)
found = [[place for place, name in enumerate(names) if one.fullmatch(name)] for one in map(re.compile, patterns)]
json.dump(found, sys.stdout)
"""


def match_names(
    patterns: Sequence[str], names: Sequence[str], *, location: str
) -> dict[str, frozenset[str]]:
    """Those of `names` that each of `patterns` matches from end to end.

    Args:
        patterns: Regexes that somebody else wrote.
        names: Of modules.
        location: The file and key that hold the patterns, for the message.

    Raises:
        ModelError: A pattern is no regex, or takes too long.
    """
    for pattern in patterns:
        try:
            if len(pattern) > LONGEST:
                raise ValueError(f"longer than {LONGEST} characters")
            re.compile(pattern)
        except (re.error, ValueError, RecursionError, OverflowError) as error:
            raise ModelError(
                f"{location}: {pattern[:200]!r} is not a regex ({error}); correct it"
            ) from error
    simple = not any(_BACKTRACKS.search(pattern) for pattern in patterns)
    if simple:
        return {p: frozenset(n for n in names if re.fullmatch(p, n)) for p in patterns}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([list(patterns), list(names)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        shown = ", ".join(repr(pattern[:80]) for pattern in patterns[:3])
        raise ModelError(
            f"{location}: matching {shown} with the names of this model takes more than {SECONDS:g} s "
            "or 1 GiB; write the module names out"
        ) from error
    places = json.loads(done.stdout)
    return {p: frozenset(names[i] for i in at) for p, at in zip(patterns, places, strict=True)}
