"""What all layers are: gamma and beta with their gradients, a mode, a state, and two passes."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import _runtime
from .._arguments import array
from . import _state
from ._running import Running, RunningStatistics
from ._settings import Parameter, Setting, flag, float_type
from ._state import Keys

__all__ = ["ALL", "Layer", "Saved", "marks_of", "same_memory"]

ALL = (None, None, None, "normalize")  # positions count
_WHOLE = 2048  # bytes of an array that are remembered one and all


class Saved(NamedTuple):
    """What backward needs of the last forward, and what it was computed with."""

    differentiate: Callable[..., tuple[NDArray[Any], ...]]  # the function of the gradients
    statistics: Any  # what that function takes after dy and x
    x: NDArray[Any] | None  # None where an output was written over it
    marks: tuple[bytes | None, ...]  # what `marks_of` gave
    settings: Any  # of the layer: they may have been assigned since
    residual: NDArray[Any] | None = None
    selected: tuple[Any, Any, Any, str] = ALL  # mask, weights, lengths and `masked`
    from_output: bool = False  # whether x is the output, which tells what x was


def marks_of(
    x: NDArray[Any] | None,
    gamma: NDArray[Any] | None,
    beta: NDArray[Any] | None = None,
    residual: NDArray[Any] | None = None,
) -> tuple[bytes | None, ...]:
    """Return a few values of each array, all of a small one: most changes are seen in them."""
    return (
        None if x is None else _mark(x),
        None if gamma is None else _mark(gamma),
        None if beta is None else _mark(beta),
        None if residual is None else _mark(residual),
    )


def _mark(array: NDArray[Any]) -> bytes:
    if array.nbytes <= _WHOLE:
        return array.tobytes()
    return array[tuple([slice(None, None, n // 2 or 1) for n in array.shape])].tobytes()


def same_memory(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    """Whether two arrays start at one address; they then are one, or `out` was refused."""
    if a is None or b is None:
        return False
    start: bool = a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    return start


class Layer(ABC):
    """A normalization that remembers its parameters: what all layers of cybn have in common.

    Calling a layer is its forward pass, so a list of layers is a network. Copies, by `copy.copy`,
    `copy.deepcopy` and `pickle`, share no array with the layer, and have no forward behind them.

    Attributes
    ----------
    gamma, beta : ndarray, or None
        Scale and shift; 1 and 0 at the start. Change them in place, or assign: values are then
        checked and copied into the array, which stays the same one.
    grad_gamma, grad_beta : ndarray, or None
        Their gradients, overwritten in place by each `backward`; 0 at the start.
    training : bool
        The mode; see `train` and `eval`.
    """

    training = Setting(flag)
    gamma = Parameter()
    beta = Parameter()
    grad_gamma = Parameter()
    grad_beta = Parameter()

    _running: RunningStatistics | None = None
    _axis: int
    _eps: Any
    _train_affine = True
    _by_sample: ClassVar[bool] = False  # whether statistics are those within samples
    _axes: ClassVar[dict[int, str]] = {}  # rank -> name of its axes; empty: any rank
    _channels: ClassVar[str] = "num_features"  # what the size of the channel axis is called

    def __init__(self, shape: tuple[int, ...], scale: bool, shift: bool, dtype: DTypeLike) -> None:
        self._dtype = float_type(dtype)
        self._shape = shape
        self._training = True
        self._gamma = np.ones(shape, self._dtype) if scale else None
        self._beta = np.zeros(shape, self._dtype) if shift else None
        self._grad_gamma = np.zeros(shape, self._dtype) if scale else None
        self._grad_beta = np.zeros(shape, self._dtype) if shift else None
        self._names = [name for name, has in (("gamma", scale), ("beta", shift)) if has]
        self._saved: Saved | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in cls.__dict__ and "__call__" not in cls.__dict__:
            # A subclass that overrides forward is called by it, without a call between.
            cls.__call__ = cls.__dict__["forward"]  # type: ignore[method-assign]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of gamma, beta and all else that the layer holds: float32 or float64."""
        return self._dtype

    # ---- passes --------------------------------------------------------------------------

    @abstractmethod
    def forward(
        self, x: ArrayLike, *, out: NDArray[Any] | None = None, num_threads: int | None = None
    ) -> NDArray[Any]:
        """Normalize `x`, and keep what `backward` needs."""

    @abstractmethod
    def backward(
        self, dy: ArrayLike, *, out: NDArray[Any] | None = None, num_threads: int | None = None
    ) -> Any:
        """Return the gradient of the last forward's input; fill `grad_gamma` and `grad_beta`."""

    def __call__(
        self, x: ArrayLike, *, out: NDArray[Any] | None = None, num_threads: int | None = None
    ) -> NDArray[Any]:
        """Do what `forward` does."""
        return self.forward(x, out=out, num_threads=num_threads)

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, or to eval mode where `mode` is False; return the layer."""
        self.training = mode
        return self

    def eval(self) -> Self:
        """Switch to eval mode; return the layer."""
        return self.train(False)

    # ---- what passes share ---------------------------------------------------------------

    def _admit(self, x: ArrayLike) -> NDArray[Any]:
        """Return `x` as an array; ValueError unless its rank and channels are the layer's."""
        if not isinstance(x, np.ndarray):
            x = array("x", x)
        shape, axis = x.shape, self._axis
        if self._axes and len(shape) not in self._axes:
            takes = " or ".join(self._axes.values())
            raise ValueError(f"x has shape {shape}; {type(self).__name__} takes {takes}")
        if -len(shape) <= axis < len(shape) and shape[axis] != self._shape[0]:
            other = -1 if axis == 1 else 1
            hint = ""
            if axis in (1, -1, len(shape) - 1) and shape[other] == self._shape[0]:
                where = "last" if other == -1 else "first"
                hint = f". Its channels seem to come {where}: make the layer with axis={other}"
            raise ValueError(
                f"x has shape {shape}, with {shape[axis]} channels on axis {axis}; "
                f"this {type(self).__name__} has {self._channels}={self._shape[0]}{hint}"
            )
        return x

    def _last(self) -> tuple[Saved, NDArray[Any]]:
        """Return what the last forward left, and its x; RuntimeError where backward cannot be."""
        saved = self._saved
        if saved is None:
            raise RuntimeError("backward needs a forward before it; each backward takes up one")
        x = saved.x
        if x is None:
            raise RuntimeError(
                "the last forward wrote its output over its input or residual, which backward "
                "needs; give forward another out"
            )
        had = saved.marks
        beta = None if had[2] is None else self._beta
        residual = None if had[3] is None else saved.residual
        now = marks_of(x, self._gamma, beta, residual)
        if now != had:
            names = "y" if saved.from_output else "x", "gamma", "beta", "residual"
            changed = [name for name, a, b in zip(names, now, had, strict=True) if a != b]
            over = ", which wrote y over its input," * saved.from_output
            raise RuntimeError(
                f"{' and '.join(changed)} {'has' if len(changed) == 1 else 'have'} changed since "
                f"the last forward{over} and backward needs what was there. Call backward first, "
                "and then change it, or give forward a copy"
            )
        return saved, x

    def _own_gradients(self) -> list[NDArray[Any]]:
        """Return the arrays of the gradients; ValueError unless all can be written to."""
        return self._own([f"grad_{name}" for name in self._names])

    def _own(self, names: list[str]) -> list[NDArray[Any]]:
        """Return arrays of the layer; ValueError unless all can be written to in place."""
        arrays: list[NDArray[Any]] = [getattr(self, f"_{name}") for name in names]
        for name, own in zip(names, arrays, strict=True):
            if not own.flags.writeable:
                raise ValueError(f"{name} of this layer must be a writeable array; it is read-only")
        return arrays

    def _finish(self, own: list[NDArray[Any]], gradients: Sequence[Any]) -> None:
        """Write the gradients and forget the last forward; or, interrupted, do neither."""
        if not self._train_affine:
            gradients = (0.0, 0.0)
        values = _state.fitting(own, gradients)
        both = len(own) == 2
        # Neither a call nor a loop from here on: Python looks for interrupts there alone.
        if both:
            own[0][...], own[1][...] = values
        elif own:
            own[0][...] = values[0]
        self._saved = None

    # ---- parameters and state ------------------------------------------------------------

    def parameters(self) -> list[NDArray[Any]]:
        """Return gamma and beta, the arrays themselves, as far as the layer has and trains them."""
        return [getattr(self, f"_{name}") for name in self._names if self._train_affine]

    def gradients(self) -> list[NDArray[Any]]:
        """Return the gradients in the order of `parameters`."""
        return [getattr(self, f"_grad_{name}") for name in self._names if self._train_affine]

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return copies of all that `load_state_dict` needs.

        Returns
        -------
        dict of str to ndarray
            ``gamma`` and ``beta``, as far as the layer has them, and its running statistics, if
            there are any: ``running_mean``, ``running_var`` and ``num_batches_tracked`` (int64,
            shape ()). A NaN or infinity in those is saved, but not loaded again.
        """
        state = {name: getattr(self, f"_{name}").copy() for name in self._names}
        return state if self._running is None else state | self._running.state()

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> Keys:
        """Take over a state; every part is checked before any is changed.

        Parameters
        ----------
        state : mapping of str to array_like
            With the keys of `state_dict`. Copied, and converted to the layer's dtype.
        strict : bool, default True
            Whether missing and unexpected keys are an error. Where they are not, what is missing
            stays as it is in the layer, and what is unexpected is not looked at.

        Returns
        -------
        missing_keys, unexpected_keys : list of str
            As a named tuple; both are empty where `strict` is True.

        Raises
        ------
        TypeError
            If `state` is no mapping.
        ValueError
            If keys do not fit and `strict` is True, a shape or dtype is wrong, running_mean is
            not finite, or running_var is not finite or, with eps added, not positive. The layer
            is unchanged.
        """
        running = self._running
        keys = _state.check_keys(state, self.state_dict(), flag("strict", strict))
        names = [name for name in self._names if name in state]
        own = self._own(names)
        given = [_state.array(name, state[name], self._shape, self._dtype) for name in names]
        values: Running | None = None
        if running is not None:
            values = running.given(state, self._eps) if running.tracks else running.values
        both = len(own) == 2
        with _runtime.turn:  # and neither a call nor a loop in it, as in `RunningStatistics.learn`
            if both:
                own[0][...], own[1][...] = given
            elif own:
                own[0][...] = given[0]
            if running is not None and values is not None:
                running.values, running.seen = values, None
        return keys

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_saved": None}  # the input is not the layer's to copy

    def __copy__(self) -> Self:
        return copy.deepcopy(self)

    def _describe(self, *parts: str, more: Sequence[str] = ()) -> str:
        """Return the layer's repr from its parts, which have the dtype among them."""
        dtype = [] if self.dtype == np.float32 else [f"dtype={self.dtype}"]
        return f"{type(self).__name__}({', '.join([*parts, *dtype, *more])})"
