"""Python's collector of reference cycles, kept from walking over libraries that are there to stay.

torch, transformers and PEFT are a million objects. The collector would walk over them half a dozen
times while they are imported: 1.0 of the 5.8 CPU seconds from the start of Python to a first step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """In here it does not run; what was imported counts as old afterwards, and is not looked at soon."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # the two together move everything into the oldest generation, unwalked
        if was_enabled:
            gc.enable()


@contextmanager
def passing_over_the_old() -> Iterator[None]:
    """In here it looks only at what is made in here."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
