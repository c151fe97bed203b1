"""The running statistics of a layer, and how a batch moves them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import functional
from ..moments import Moments

NanPolicy = Literal["propagate", "raise", "skip"]


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

    def copy(self) -> Running:
        """Return statistics with arrays of their own."""
        return Running(self.mean.copy(), self.var.copy(), self.batches)

    def absorb(self, batch: Moments, momentum: float | None, ddof: int) -> Running:
        """Return the statistics after one more batch.

        The batch weighs `momentum`; where that is None, 1 / batches: the mean of all so far.
        """
        batches = self.batches + 1
        weight = 1 / batches if momentum is None else momentum
        mean, var = functional.absorb(self.mean, self.var, batch, weight, ddof)
        return Running(mean, var, batches)

    def settle(self, after: Running, policy: NanPolicy) -> Running:
        """Return which statistics stand after a batch: `after`, or these if it spoilt them."""
        if policy == "propagate":
            return after
        spoilt = np.flatnonzero(~(np.isfinite(after.mean) & np.isfinite(after.var)))
        if not spoilt.size:
            return after
        if policy == "skip":
            return self
        c = spoilt[0]
        raise FloatingPointError(
            f"x would make the running statistics of channel {c} mean {after.mean[c]} and "
            f"variance {after.var[c]}; {spoilt.size} of {after.mean.size} channels are not finite. "
            "Look for NaN and infinity in x, or choose another nan_policy; where they were not "
            "finite before, reset_running_stats() starts anew"
        )
