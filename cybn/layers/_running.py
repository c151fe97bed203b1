"""The running statistics of a layer, and how a batch moves them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..moments import Moments


class Running(NamedTuple):
    """Running mean and variance after some number of batches.

    A layer holds one of these and replaces it whole, so that a reader in another thread never
    sees the mean of one batch with the variance of another.
    """

    mean: NDArray[Any]
    var: NDArray[Any]
    batches: int

    @classmethod
    def start(cls, channels: int, dtype: DTypeLike) -> Running:
        """Return mean 0 and variance 1."""
        return cls(np.zeros(channels, dtype), np.ones(channels, dtype), 0)

    def absorb(self, batch: Moments, momentum: float | None, ddof: int) -> Running:
        """Return the statistics after one more batch.

        ``running + (batch - running) * momentum``, in float64, rounded once. Where `momentum` is
        None the batch weighs 1 / batches: the mean of all batches so far.
        """
        batches = self.batches + 1
        weight = 1 / batches if momentum is None else momentum
        with np.errstate(all="ignore"):  # overflow and NaN are the data's, and stay visible
            mean = (1 - weight) * self.mean.astype(np.float64) + weight * batch.mean
            var = (1 - weight) * self.var.astype(np.float64) + weight * batch.var(ddof)
            return Running(mean.astype(self.mean.dtype), var.astype(self.var.dtype), batches)
