"""Weights as bytes to float32 and back, without torch: bfloat16 is the upper half of a float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# What can be computed with, by safetensors' names.
STORAGE: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}

# What still rounds to a finite float16.
F16_LARGEST = np.float32(65519.996)

_SIXTEEN, _HALF, _EVEN = np.uint32(16), np.uint32(0x8000), np.uint32(0xFFFEFFFF)


def widen(stored: NDArray[Any], dtype: str, out: Floats) -> None:
    """``stored`` (elements of STORAGE[dtype]) as float32 in ``out``; exact."""
    if dtype == "BF16":
        bits = out.view(np.uint32)
        bits[...] = stored
        np.left_shift(bits, _SIXTEEN, out=bits)
    else:
        out[...] = stored


def narrow(values: Floats, dtype: str, out: NDArray[Any], ties: NDArray[np.bool_]) -> None:
    """``values`` rounded to the nearest (ties to even) number of ``dtype``, in ``out``.

    ``values`` hold something else afterwards; ``ties`` is space for twice as many.
    """
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # an overflow to infinity is found by the caller
            out[...] = values
        return
    # Adding half a unit carries into the upper half exactly when rounding goes up. A tie leaves a lower
    # half of zero and went up too: 0x3F808000 -> 0x3F810000, which is odd; clearing the lowest bit that
    # is kept makes it 0x3F80, while 0x3F818000 -> 0x3F820000 was right already.
    bits = values.view(np.uint32)
    np.add(bits, _HALF, out=bits)
    np.equal(bits.view("<u2"), 0, out=ties)
    zeros = np.flatnonzero(ties)
    tied = zeros[zeros % 2 == 0] // 2  # a lower half comes before its upper half
    bits[tied] &= _EVEN
    np.right_shift(bits, _SIXTEEN, out=bits)
    np.copyto(out, bits, casting="unsafe")


def to_float32(stored: bytes, dtype: str, shape: tuple[int, ...]) -> Floats:
    """A whole small tensor as float32."""
    out = np.empty(shape, np.float32)
    widen(np.frombuffer(stored, STORAGE[dtype]).reshape(shape), dtype, out)
    return out
