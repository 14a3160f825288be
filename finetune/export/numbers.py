"""Weights as bytes to float32 and back, without torch: bfloat16 is the upper half of a float32.

torch would round as well, but importing it takes more memory and processor time than merging 2 GB.
"""

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
SPACING = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23}
"""Of neighbouring numbers, at most, as a share of them."""

# The dtype's bits as an integer, and its infinity there; larger ones are no numbers.
_INFINITY: dict[str, tuple[Any, int]] = {
    "BF16": (np.dtype("<i2"), 0x7F80),
    "F16": (np.dtype("<i2"), 0x7C00),
    "F32": (np.dtype("<i4"), 0x7F800000),
}

_SIXTEEN, _ONE, _BELOW_HALF = np.uint32(16), np.uint32(1), np.uint32(0x7FFF)


def widen(stored: NDArray[Any], dtype: str, out: Floats) -> None:
    """``stored`` (elements of STORAGE[dtype]) as float32 in ``out``; exact."""
    if dtype == "BF16":
        bits = out.view(np.uint32)
        bits[...] = stored
        np.left_shift(bits, _SIXTEEN, out=bits)
    else:
        out[...] = stored


def narrow(values: Floats, dtype: str, out: NDArray[Any], scratch: NDArray[np.uint32]) -> None:
    """``values`` rounded to the nearest (ties to even) number of ``dtype``, in ``out``.

    ``values`` hold something else afterwards; ``scratch`` has as many elements. A NaN whose lower
    half is full may come out as a zero: look for those before.
    """
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # an overflow to infinity is found by the caller
            out[...] = values
        return
    # Adding just below half a unit, and the lowest bit that is kept, carries into the upper half
    # exactly when rounding goes up: 0x3F808000 (a tie, even) -> 0x3F80FFFF -> 0x3F80, and
    # 0x3F818000 (a tie, odd) -> 0x3F820000 -> 0x3F82.
    bits = values.view(np.uint32)
    np.right_shift(bits, _SIXTEEN, out=scratch)
    np.bitwise_and(scratch, _ONE, out=scratch)
    np.add(scratch, _BELOW_HALF, out=scratch)
    np.add(bits, scratch, out=bits)
    np.right_shift(bits, _SIXTEEN, out=bits)
    np.copyto(out, bits, casting="unsafe")


def rounded(values: Floats, dtype: str) -> NDArray[Any]:
    """A small array as elements of STORAGE[dtype]."""
    out = np.empty(values.shape, STORAGE[dtype])
    narrow(values.copy(), dtype, out, np.empty(values.shape, np.uint32))
    return out


def is_finite(stored: NDArray[Any], dtype: str) -> bool:
    """Whether ``stored`` (elements of STORAGE[dtype], one or more) holds neither infinity nor NaN.

    As integers the positive ones are the largest; with the sign bit set, the largest of the unsigned.
    """
    kind, infinity = _INFINITY[dtype]
    signed = stored.view(kind)
    unsigned = stored.view(f"<u{kind.itemsize}")
    sign = 1 << (8 * kind.itemsize - 1)
    return bool(signed.max() < infinity and unsigned.max() < sign + infinity)


def to_float32(stored: bytes, dtype: str, shape: tuple[int, ...]) -> Floats:
    """A whole small tensor as float32."""
    out = np.empty(shape, np.float32)
    widen(np.frombuffer(stored, STORAGE[dtype]).reshape(shape), dtype, out)
    return out
