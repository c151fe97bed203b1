"""Channels of a part of a batch that the loops of a kernel cannot write; see `beyond.py`.

Other processes have the rest of the batch, so the statistics are given and cannot be computed
again. Such channels are computed in float64, from values divided by 2**e. This is the power of two
just above d = sqrt(var + eps), the divisor of the normalization. If e is negative, the mean is
subtracted first.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from . import batch_norm
from .beyond import exponent

__all__ = ["Part", "far", "unwritable"]

Array = NDArray[Any]
Exchange = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def far(moments: Any) -> NDArray[np.intp]:
    """Return the channels of finite values whose variance is too large for float64."""
    return np.flatnonzero(np.isinf(moments.m2) & np.isfinite(moments.mean))


@np.errstate(all="ignore")
def unwritable(moments: Any, gamma: Any, beta: Any, eps: float, wide: bool) -> NDArray[np.intp]:
    """Return the channels that the backward loops cannot write, as `beyond` of the kernels does."""
    v = moments.m2 / moments.count + eps
    size = (1.0 if gamma is None else np.abs(gamma)) / np.sqrt(v)
    size = size + (0.0 if beta is None else np.abs(beta))
    high, low, off, most = (1e240, 1e-240, 1e288, 1e300) if wide else (1e24, 1e-30, 1e30, 1e36)
    fits = (v <= high) & ((v <= 0) | (v >= low)) & (np.abs(moments.mean) <= off) & (size <= most)
    return np.flatnonzero(~fits & ~np.isnan(v) & np.isfinite(moments.mean))


class Part(NamedTuple):
    """Some channels of a part of a batch, in float64."""

    where: NDArray[np.intp]
    x: Array
    residual: Array | None
    axis: int
    mean: Array
    d: Array
    e: NDArray[np.intc]
    gamma: Array
    beta: Array
    settings: tuple[Any, ...]  # activation and slope

    @classmethod
    @np.errstate(all="ignore")
    def of(
        cls,
        where: NDArray[np.intp],
        x: Array,
        residual: Array | None,
        moments: Any,
        gamma: Any,
        beta: Any,
        settings: tuple[Any, ...],
    ) -> Self:
        """Return these channels of an array of any type, with the statistics of the batch."""
        axis, eps, *rest = settings
        axis %= x.ndim
        d = np.hypot(moments.std()[where], np.sqrt(eps))
        mean = moments.mean[where]
        e = np.where(np.abs(mean) > 2.0**1000, np.maximum(exponent(d), 2), exponent(d))
        gamma, beta = (
            np.full(where.size, absent) if v is None else np.asarray(v)[where].astype(np.float64)
            for v, absent in ((gamma, 1.0), (beta, 0.0))
        )
        return cls(
            where, _wide(x, where, axis), _wide(residual, where, axis), axis, mean, d, e, gamma,
            beta, (*rest,),
        )  # fmt: skip

    @np.errstate(all="ignore")
    def put(self, values: Array, into: Array) -> None:
        """Write the values of these channels into an array of all channels."""
        np.moveaxis(into, self.axis, 0)[self.where] = np.moveaxis(values, self.axis, 0)

    @np.errstate(all="ignore")
    def forward(self, selected: tuple[Any, ...], threads: int | None) -> Array:
        """Return y."""
        y: Array = batch_norm.inference(
            *self._scaled(), self.gamma, self.beta, self.residual,
            (self.axis, 0.0, *self.settings), selected, None, threads, True,
        )  # fmt: skip
        return y

    @np.errstate(all="ignore")
    def backward(
        self,
        dy: Array,
        count: Any,
        selected: tuple[Any, ...],
        from_output: bool,
        threads: int | None,
        exchange: Exchange,
    ) -> tuple[Array, ...]:
        """Return dx and, if there is a residual, its gradient.

        `exchange` takes dbeta and dgamma of the part, (2, channels), and returns those of the
        batch.
        """
        dy = _wide(dy, self.where, self.axis)
        size = np.abs(dy).max(tuple(i for i in range(dy.ndim) if i != self.axis))
        up = np.maximum(exponent(size), 0)
        x, mean, var = self._scaled()
        through = SimpleNamespace(count=count, mean=mean, m2=var * count)
        dx, _, _, *rest = batch_norm.backward(
            np.ldexp(dy, self._along(-up)), self.x if from_output else x, through, self.gamma,
            self.beta, self.residual, (self.axis, 5e-324, *self.settings), selected, from_output,
            None, None, threads,
            lambda sums: np.ldexp(exchange(np.ldexp(sums, up)), -up),
        )  # fmt: skip
        return np.ldexp(dx, self._along(up - self.e)), *(np.ldexp(g, self._along(up)) for g in rest)

    def _scaled(self) -> tuple[Array, Array, Array]:
        """Return the values divided by 2**e, and their mean and var + eps."""
        near = np.where(self.e < 0, self.mean, 0.0)
        x = np.ldexp(self.x - self._along(near), self._along(-self.e))
        return x, np.ldexp(self.mean - near, -self.e), np.ldexp(self.d, -self.e) ** 2

    def _along(self, values: Array) -> Array:
        return values.reshape([-1 if i == self.axis else 1 for i in range(self.x.ndim)])


def _wide(array: Any, where: NDArray[np.intp], axis: int) -> Any:
    return None if array is None else np.take(array, where, axis).astype(np.float64)
