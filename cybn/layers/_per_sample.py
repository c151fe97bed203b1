"""Layers without running statistics: both modes compute the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._arguments import array
from ._layer import Layer

__all__ = ["PerSample"]


class _Saved(NamedTuple):
    """What backward needs of the last forward."""

    x: NDArray[Any] | None  # None where the output was written over it
    statistics: Any


def _unless_overwritten(x: NDArray[Any], out: NDArray[Any] | None) -> NDArray[Any] | None:
    """Return `x`, or None where `out` lies in its memory."""
    return None if out is not None and np.may_share_memory(x, out) else x


class PerSample(Layer, ABC):
    """A layer that normalizes each sample by itself; it names the keywords of its functions."""

    _takes: ClassVar[tuple[str, ...]] = ("gamma", "beta")  # what _normalize takes after x

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """Return the keywords of both functions."""

    @abstractmethod
    def _admit(self, x: NDArray[Any]) -> None:
        """Raise ValueError unless the shape of `x` is one for this layer."""

    def __call__(
        self,
        x: ArrayLike,
        *,
        out: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]:
        """Call `forward`."""
        return self.forward(x, out=out, num_threads=num_threads)

    def forward(
        self,
        x: ArrayLike,
        *,
        out: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]:
        """Normalize; the same in both modes.

        Parameters
        ----------
        x : array_like of float32, float64, float16 or bfloat16
            Kept by reference for `backward`.
        out : ndarray, optional
            Where y goes: shape and dtype of `x`. May be `x` itself; then there is no backward,
            which needs it.
        num_threads : int, optional
            Threads for this call; `cybn.get_num_threads` where None.

        Returns
        -------
        ndarray
            `out`, or a new array with the dtype and memory layout of `x`.

        Raises
        ------
        TypeError, ValueError
            As in the function of the layer's name, and if the shape of `x` is not the layer's.
        """
        if not isinstance(x, np.ndarray):
            x = array("x", x)
        self._admit(x)
        parameters = [getattr(self, name) for name in self._takes]
        y, statistics = self._normalize(
            x, *parameters, **self._options(), out=out, num_threads=num_threads
        )
        self._saved = _Saved(_unless_overwritten(x, out), statistics)
        return y

    def backward(
        self,
        dy: ArrayLike,
        *,
        out: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]:
        """Return the gradient of the last forward's input; fill the gradients of the parameters.

        The input is let go of afterwards: one backward a forward.

        Parameters
        ----------
        dy : array_like, shape and dtype of the last forward's input
            Gradient with respect to y.
        out : ndarray, optional
            Where dx goes; may be `dy` itself.
        num_threads : int, optional
            Threads for this call; `cybn.get_num_threads` where None.

        Returns
        -------
        ndarray
            `out`, or a new array with the dtype and memory layout of the input.

        Raises
        ------
        RuntimeError
            If there was no forward since the last backward, or it wrote over its input.
        TypeError, ValueError
            If `dy` or `out` does not fit the input.
        """
        saved = self._last("input, which backward needs")
        own = self._own(self._gradient_names)
        dx, *found = self._differentiate(
            dy,
            saved.x,
            saved.statistics,
            self.gamma,
            **self._options(),
            out=out,
            num_threads=num_threads,
        )
        self._write(own, found, saved=None)
        return dx
