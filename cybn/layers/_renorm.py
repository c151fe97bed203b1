"""Batch renormalization: normalizing a batch, but towards the running statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._arguments import number
from ..moments import Moments
from ._running import Running

__all__ = ["Correction", "Renorm"]


class Renorm:
    """The limits of batch renormalization. Mutable, so that a schedule can move them.

    A layer with ``renorm=`` computes, in training,

    ``y = ((x - mean) / std * r + d) * gamma + beta``,
    ``r = clip(std / running_std, 1 / r_max, r_max)``,
    ``d = clip((mean - running_mean) / running_std, -d_max, d_max)``,

    with ``std = sqrt(var + eps)`` and ``running_std = sqrt(running_var + eps)``, the running
    statistics being those before this batch. Gradients do not flow through r and d. Within its
    limits that is what inference will compute, whatever the batch; with ``r_max=1, d_max=0`` it
    is plain batch normalization, to the bit.

    Parameters
    ----------
    r_max : float, default 3
        At least 1.
    d_max : float, default 5
        At least 0.

    Raises
    ------
    ValueError
        If a limit is out of its range, here or when it is assigned.

    Notes
    -----
    Begin with ``r_max=1, d_max=0``: the running statistics of a new layer say nothing yet. The
    paper leaves these for 5000 steps, then widens them step by step to the defaults: r_max at
    40000, d_max at 25000. Layers that were given one `Renorm` follow it together.

    References
    ----------
    Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
    Models", 2017.

    Examples
    --------
    >>> import cybn
    >>> limits = cybn.Renorm(r_max=1, d_max=0)
    >>> bn = cybn.BatchNorm2d(64, momentum=0.01, renorm=limits)
    >>> limits.r_max, limits.d_max = 3, 5  # when it has trained for a while
    """

    __slots__ = ("d_max", "r_max")

    r_max: float
    d_max: float

    def __init__(self, r_max: float = 3.0, d_max: float = 5.0) -> None:
        self.r_max = r_max
        self.d_max = d_max

    def __setattr__(self, name: str, value: float) -> None:
        least = {"r_max": 1, "d_max": 0}.get(name)
        if least is None:
            raise AttributeError(f"Renorm has no {name}; it has r_max and d_max")
        limit = number(name, value)
        if not limit >= least:
            raise ValueError(f"{name} is {limit}; it must be at least {least}")
        object.__setattr__(self, name, limit)

    def __reduce__(self) -> tuple[type[Renorm], tuple[float, float]]:
        return Renorm, (self.r_max, self.d_max)

    def __repr__(self) -> str:
        return f"Renorm(r_max={self.r_max:g}, d_max={self.d_max:g})"


class Correction(NamedTuple):
    """What renormalization does to one batch: xhat becomes xhat * r + d."""

    r: NDArray[np.float64]
    d: NDArray[np.float64]

    @classmethod
    @np.errstate(all="ignore")
    def of(cls, batch: Moments, running: Running, limits: Renorm, eps: float) -> Correction:
        """Return the correction from a batch to the running statistics, within limits."""
        std = np.sqrt(batch.var() + eps)
        running_std = np.sqrt(running.var.astype(np.float64) + eps)
        r = std / running_std
        d = (batch.mean - running.mean) / running_std
        return cls(
            np.clip(r, 1 / limits.r_max, limits.r_max), np.clip(d, -limits.d_max, limits.d_max)
        )

    def compose(
        self, gamma: NDArray[Any] | None, beta: NDArray[Any] | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the scale and shift of xhat that are correction, gamma and beta in one."""
        scale = self.r if gamma is None else self.r * gamma
        shift = self.d if gamma is None else self.d * gamma
        return scale, shift if beta is None else shift + beta

    @np.errstate(all="ignore")
    def gradient(self, dscale: NDArray[Any], dshift: NDArray[Any]) -> NDArray[np.float64]:
        """Return the gradient of gamma from those of scale and shift; r and d are constants."""
        dgamma: NDArray[np.float64] = self.r * dscale + self.d * dshift
        return dgamma
