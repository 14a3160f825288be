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

# The number format's bits as an integer, and its infinity there; larger ones are no numbers.
_INFINITY: dict[str, tuple[Any, int]] = {
    "BF16": (np.dtype("<i2"), 0x7F80),
    "F16": (np.dtype("<i2"), 0x7C00),
    "F32": (np.dtype("<i4"), 0x7F800000),
}

# So many are looked for one by one.
_FEW = 32
_SIXTEEN, _HALF, _EVEN = np.uint32(16), np.uint32(0x8000), np.uint32(0xFFFEFFFF)


def widen(stored: NDArray[Any], dtype: str, out: Floats) -> None:
    """``stored`` (elements of STORAGE[dtype]) as float32 in ``out``; exact."""
    if dtype == "BF16":
        bits = out.view(np.uint32)
        bits[...] = stored
        np.left_shift(bits, _SIXTEEN, out=bits)
    else:
        out[...] = stored


def narrow(values: Floats, dtype: str, out: NDArray[Any], ties: bytearray) -> None:
    """``values`` rounded to the nearest (ties to even) number of ``dtype``, in ``out``.

    ``values`` hold something else afterwards; ``ties`` is space for twice as many. A NaN whose lower
    half is full may come out as a zero: look for those before.
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
    halves = 2 * bits.size
    np.equal(bits.view("<u2"), 0, out=np.frombuffer(ties, np.bool_, halves))
    zeros = _places(ties, halves)
    bits[zeros[zeros % 2 == 0] // 2] &= _EVEN  # a lower half comes before its upper half
    np.right_shift(bits, _SIXTEEN, out=bits)
    np.copyto(out, bits, casting="unsafe")


def _places(marks: bytearray, size: int) -> NDArray[np.intp]:
    """Where the first ``size`` marks are set; fast when that is hardly anywhere, as ties are."""
    found: list[int] = []
    place = marks.find(1, 0, size)
    while place >= 0:
        found.append(place)
        if len(found) == _FEW:
            return np.flatnonzero(np.frombuffer(marks, np.bool_, size))
        place = marks.find(1, place + 1, size)
    return np.array(found, np.intp)


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
