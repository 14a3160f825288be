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

_SIXTEEN, _ONE, _HALF = np.uint32(16), np.uint32(1), np.uint32(0x7FFF)


def widen(stored: NDArray[Any], dtype: str, out: Floats) -> None:
    """``stored`` (elements of STORAGE[dtype]) as float32 in ``out``; exact."""
    if dtype == "BF16":
        bits = out.view(np.uint32)
        bits[...] = stored
        np.left_shift(bits, _SIXTEEN, out=bits)
    else:
        out[...] = stored


def narrow(values: Floats, dtype: str, out: NDArray[Any], scratch: NDArray[np.uint32]) -> None:
    """``values`` rounded to the nearest (ties to even) number of ``dtype``, in ``out``."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # an overflow to infinity is found by the caller
            out[...] = values
        return
    # Adding 0x7FFF, or 0x8000 when the lowest kept bit is set, carries into the upper half exactly
    # when rounding goes up: 0x3F808000 (halfway) + 0x7FFF = 0x3F80FFFF stays, 0x3F818000 + 0x8000 goes up.
    # A NaN stays one: those that arithmetic makes have nothing in the lower half to carry.
    bits = values.view(np.uint32)
    np.right_shift(bits, _SIXTEEN, out=scratch)
    np.bitwise_and(scratch, _ONE, out=scratch)
    np.add(scratch, _HALF, out=scratch)
    np.add(scratch, bits, out=scratch)
    np.right_shift(scratch, _SIXTEEN, out=scratch)
    np.copyto(out, scratch, casting="unsafe")


def to_float32(stored: bytes, dtype: str, shape: tuple[int, ...]) -> Floats:
    """A whole small tensor as float32."""
    out = np.empty(shape, np.float32)
    widen(np.frombuffer(stored, STORAGE[dtype]).reshape(shape), dtype, out)
    return out
