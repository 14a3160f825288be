"""Is what is written W + scale * B A? A check of rows as they pass by, never of a whole matrix.

Freivalds' check, while the numbers pass by: for random signs x, W' x must be W x + scale * B (A x) but
for rounding, in every row of every matrix that an adapter changes. It costs two products with a vector
where the update took one with a matrix, and computes B (A x) where the merge computed (B A).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from finetune.errors import ModelError
from finetune.export.adapter import Update
from finetune.export.numbers import SPACING, Floats

# Rounding errors of n numbers with random signs: n / 12 spacings squared on the average. Hoeffding's
# bound leaves a sum of one row below 200 / 12 with a chance of 1e-14, and many rows below 4 / 12.
_ONE_ROW, _MANY_ROWS = 200.0, 4.0


class ProductCheck:
    """The check of one matrix, block of rows by block of rows."""

    def __init__(self, name: str, update: Update, dtype: str) -> None:
        self._name, self._dtype = name, dtype
        signs = np.random.default_rng(0).integers(0, 2, update.a.shape[1])
        self._x = np.where(signs == 1, np.float32(1), np.float32(-1))
        change = update.b.astype(np.float64) @ (update.a.astype(np.float64) @ self._x)
        self._change = change * float(update.scale)
        # Sums in float32 of n terms, in whatever order, are wrong by about sqrt(n) of its spacings.
        self._spacing = max(SPACING[dtype], math.sqrt(len(self._x)) * SPACING["F32"])

    def before(self, weights: Floats) -> NDArray[np.float64]:
        """W x of rows that are to be changed."""
        return (weights @ self._x).astype(np.float64)

    def after(
        self,
        first: int,
        before: NDArray[np.float64],
        written: Floats,
        factors: Floats | None = None,
    ) -> None:
        """Refuse rows from `first` on whose product is not W x + scale * B (A x), times the factors.

        Raises:
            ModelError: They differ by more than rounding.
        """
        wanted = before + self._change[first : first + len(before)]
        wanted = wanted if factors is None else wanted * factors
        with np.errstate(over="ignore", invalid="ignore"):  # no numbers are no match
            missed = float(np.square((written @ self._x).astype(np.float64) - wanted).sum())
            flat = written.reshape(-1)
            size = float(np.dot(flat, flat))
            # One number may be so large that its square is none: the others are still compared.
            if size == math.inf:
                size = float(np.square(flat, dtype=np.float64).sum())
        allowed = size * self._spacing**2 / 12 * (_MANY_ROWS + _ONE_ROW / len(before))
        if self._dtype == "F16":  # the smallest are further apart
            allowed += written.size * (2.0**-24) ** 2
        if not missed <= allowed < math.inf:  # infinity is no number, either
            raise ModelError(
                f"{self._name}: rows {first} to {first + len(before) - 1} of what was merged are not "
                f"W + scale * B A (off by {missed**0.5:.3g}, rounding explains {allowed**0.5:.3g}); "
                "nothing was written. Please report this"
            )
