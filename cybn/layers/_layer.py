"""What layers without running statistics share: parameters, mode, state, one backward a forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .._arguments import check_eps, number
from . import _state


class _Saved(NamedTuple):
    """What backward needs of the last forward."""

    x: NDArray[Any] | None  # None where the output was written over it
    statistics: Any


def float_type(dtype: Any) -> np.dtype[Any]:
    """Return float32 or float64 as a dtype; None, NumPy's word for float64, is refused."""
    try:
        given = None if dtype is None else np.dtype(dtype)
    except TypeError:
        given = dtype
    if given not in (np.float32, np.float64):
        raise TypeError(f"dtype is {given}; it must be float32 or float64")
    return np.dtype(np.float32 if given == np.float32 else np.float64)


def unless_overwritten(x: NDArray[Any], out: NDArray[Any] | None) -> NDArray[Any] | None:
    """Return `x`, or None where `out` lies in its memory."""
    return None if out is not None and np.may_share_memory(x, out) else x


def whole(name: str, value: Any) -> int:
    """Return `value` as an int of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; it must be an int")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    return int(value)


def positive(eps: Any) -> float:
    """Return `eps` as a positive, finite float."""
    eps = number("eps", eps)
    check_eps(eps)
    return float(eps)


class Layer(ABC):
    """A layer with gamma and beta, or one of them, or none; the base of the family.

    A layer names its function and that of its gradients, and the keywords that both take.

    Parameters
    ----------
    shape : tuple of int
        Of gamma and beta.
    scale, shift : bool
        Whether the layer has gamma, and beta.
    dtype : dtype
        Of both: float32 or float64.
    """

    _normalize: ClassVar[Callable[..., tuple[NDArray[Any], Any]]]
    _differentiate: ClassVar[Callable[..., tuple[NDArray[Any], ...]]]
    _takes: ClassVar[tuple[str, ...]] = ("gamma", "beta")  # what _normalize takes after x

    dtype: np.dtype[Any]
    training: bool
    gamma: NDArray[Any] | None
    beta: NDArray[Any] | None
    grad_gamma: NDArray[Any] | None
    grad_beta: NDArray[Any] | None

    def __init__(self, shape: tuple[int, ...], scale: bool, shift: bool, dtype: DTypeLike) -> None:
        self.dtype = float_type(dtype)
        self.training = True
        self.gamma = np.ones(shape, self.dtype) if scale else None
        self.beta = np.zeros(shape, self.dtype) if shift else None
        self.grad_gamma = np.zeros(shape, self.dtype) if scale else None
        self.grad_beta = np.zeros(shape, self.dtype) if shift else None
        self._shape = shape
        self._names = [name for name, has in (("gamma", scale), ("beta", shift)) if has]
        self._saved: _Saved | None = None

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """Return the keywords of both functions."""

    @abstractmethod
    def _admit(self, x: NDArray[Any]) -> None:
        """Raise ValueError unless the shape of `x` is one for this layer."""

    # ---- mode ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set `training` and return the layer; both modes compute the same."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Switch to eval mode; return the layer."""
        return self.train(False)

    # ---- forward and backward ------------------------------------------------------------

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
        x : array_like of float32 or float64
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
            x = np.asarray(x)
        self._admit(x)
        parameters = [getattr(self, name) for name in self._takes]
        y, statistics = self._normalize(
            x, *parameters, **self._options(), out=out, num_threads=num_threads
        )
        self._saved = _Saved(unless_overwritten(x, out), statistics)
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
        saved = self._saved
        if saved is None:
            raise RuntimeError("backward needs a forward before it; each backward takes up one")
        if saved.x is None:
            raise RuntimeError(
                "the last forward wrote its output over its input, which backward needs; "
                "give forward another out"
            )
        own = [self._own(f"grad_{name}") for name in self._names]
        dx, *found = self._differentiate(
            dy,
            saved.x,
            saved.statistics,
            self.gamma,
            **self._options(),
            out=out,
            num_threads=num_threads,
        )
        gradients = _state.fitting(own, found[: len(own)])
        self._write(own, gradients, saved=None)
        return dx

    def _own(self, name: str) -> NDArray[Any]:
        """Return an array of the layer; ValueError unless it can be written to in place."""
        array = getattr(self, name)
        if not (
            isinstance(array, np.ndarray) and array.shape == self._shape and array.flags.writeable
        ):
            raise ValueError(
                f"{name} of this layer must be a writeable array of shape {self._shape}"
            )
        return array

    def _write(
        self, own: list[NDArray[Any]], values: list[NDArray[Any]], saved: _Saved | None
    ) -> None:
        """Write to one or two arrays of the layer, or none, and keep `saved`.

        Without a call or a loop, so that an interrupt comes before all of it, or after.
        """
        if len(own) == 2:
            own[0][...], own[1][...] = values
        elif own:
            own[0][...] = values[0]
        self._saved = saved

    # ---- parameters and state ------------------------------------------------------------

    def parameters(self) -> list[NDArray[Any]]:
        """Return gamma and beta, the arrays themselves, as far as the layer has them."""
        return [getattr(self, name) for name in self._names]

    def gradients(self) -> list[NDArray[Any]]:
        """Return the gradients in the order of `parameters`."""
        return [getattr(self, f"grad_{name}") for name in self._names]

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return copies of all that `load_state_dict` needs: ``gamma`` and ``beta``."""
        return {name: getattr(self, name).copy() for name in self._names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; every part is checked before any is changed.

        Parameters
        ----------
        state : mapping of str to array_like
            With the keys of `state_dict`. Copied, and converted to the layer's dtype.

        Raises
        ------
        TypeError
            If `state` is no mapping.
        ValueError
            If keys are missing or unexpected, or a shape or dtype is wrong. The layer is
            unchanged.
        """
        _state.check_keys(state, self._names)
        own = [self._own(name) for name in self._names]
        given = [_state.array(name, state[name], self._shape, self.dtype) for name in self._names]
        self._write(own, _state.fitting(own, given), self._saved)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_saved": None}  # the input is not the layer's to copy

    def _describe(self, *parts: str) -> str:
        """Return the layer's repr from its parts."""
        dtype = [] if self.dtype == np.float32 else [f"dtype={self.dtype}"]
        return f"{type(self).__name__}({', '.join([*parts, *dtype])})"
