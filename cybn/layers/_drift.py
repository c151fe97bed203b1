"""How far the statistics of a batch lie from the running ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..moments import Moments
from ._running import Running

__all__ = ["Drift", "measure"]


class Drift(NamedTuple):
    """What inference will see differently from training, channel by channel.

    Attributes
    ----------
    shift : ndarray of float64, shape (C,)
        ``(mean - running_mean) / sqrt(running_var + eps)``: in inference the normalized batch
        has this mean instead of 0.
    log_variance_ratio : ndarray of float64, shape (C,)
        ``log((var + eps) / (running_var + eps))``: 0 where they agree, 0.69 where the batch has
        twice the variance, -0.69 where it has half.
    """

    shift: NDArray[np.float64]
    log_variance_ratio: NDArray[np.float64]

    def beyond(self, shift: float = 1.0, log_variance_ratio: float = 1.0) -> NDArray[np.intp]:
        """Return the channels that lie further off than this either way, or are not numbers.

        Parameters
        ----------
        shift, log_variance_ratio : float, default 1
            What is still acceptable, in absolute value.
        """
        near = np.abs(self.shift) <= shift
        near &= np.abs(self.log_variance_ratio) <= log_variance_ratio
        return np.flatnonzero(~near)


@np.errstate(all="ignore")
def measure(batch: Moments, running: Running, ddof: int, eps: float) -> Drift:
    """Return the drift of `batch`, its variance taken as the running one takes it."""
    var = running.var.astype(np.float64) + eps
    shift = (batch.mean - running.mean) / np.sqrt(var)
    return Drift(shift, np.log((batch.var(ddof) + eps) / var))
