"""What all layers share: gamma and beta with their gradients, the mode, and the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _state
from ._settings import float_type

__all__ = ["Layer"]


class Layer:
    """A layer with gamma and beta, or one of them, or none.

    A layer names its function and that of its gradients.

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

    training: bool
    gamma: NDArray[Any] | None
    beta: NDArray[Any] | None
    grad_gamma: NDArray[Any] | None
    grad_beta: NDArray[Any] | None

    def __init__(self, shape: tuple[int, ...], scale: bool, shift: bool, dtype: DTypeLike) -> None:
        self._dtype = float_type(dtype)
        self.training = True
        self.gamma = np.ones(shape, self._dtype) if scale else None
        self.beta = np.zeros(shape, self._dtype) if shift else None
        self.grad_gamma = np.zeros(shape, self._dtype) if scale else None
        self.grad_beta = np.zeros(shape, self._dtype) if shift else None
        self._shape = shape
        self._names = [name for name, has in (("gamma", scale), ("beta", shift)) if has]
        self._gradient_names = [f"grad_{name}" for name in self._names]
        self._saved: Any = None  # what backward needs of the last forward

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of gamma, beta and all else that the layer holds: float32 or float64."""
        return self._dtype

    # ---- mode ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, or to eval mode where `mode` is False; return the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Switch to eval mode; return the layer."""
        return self.train(False)

    # ---- what passes share ---------------------------------------------------------------

    def _last(self, lost: str) -> Any:
        """Return what the last forward left for backward; RuntimeError where it left nothing.

        `lost` says what of it an output was written over, where it was.
        """
        saved = self._saved
        if saved is None:
            raise RuntimeError("backward needs a forward before it; each backward takes up one")
        if saved.x is None:
            raise RuntimeError(
                f"the last forward wrote its output over its {lost}; give forward another out"
            )
        return saved

    def _own(self, names: list[str]) -> list[NDArray[Any]]:
        """Return arrays of the layer; ValueError unless all can be written to in place."""
        arrays = []
        for name in names:
            array = getattr(self, name)
            if not (
                isinstance(array, np.ndarray)
                and array.shape == self._shape
                and array.flags.writeable
            ):
                raise ValueError(
                    f"{name} of this layer must be a writeable array of shape {self._shape}"
                )
            arrays.append(array)
        return arrays

    def _write(self, own: list[NDArray[Any]], values: Sequence[Any], saved: Any) -> None:
        """Write to two arrays of the layer, one, or none, and keep `saved` for backward.

        All of it or, interrupted, nothing.
        """
        values = _state.fitting(own, values)
        both = len(own) == 2
        # Neither a call nor a loop from here on: Python looks for interrupts there alone.
        if both:
            own[0][...], own[1][...] = values
        elif own:
            own[0][...] = values[0]
        self._saved = saved

    def _arrays(self) -> list[NDArray[Any]]:
        """Return parameters and gradients, whether they are trained or not."""
        return Layer.parameters(self) + Layer.gradients(self)

    # ---- parameters and state ------------------------------------------------------------

    def parameters(self) -> list[NDArray[Any]]:
        """Return gamma and beta, the arrays themselves, as far as the layer has them."""
        return [getattr(self, name) for name in self._names]

    def gradients(self) -> list[NDArray[Any]]:
        """Return the gradients in the order of `parameters`."""
        return [getattr(self, name) for name in self._gradient_names]

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
        self._write(self._own(self._names), self._given(state), self._saved)

    def _given(self, state: Mapping[str, Any]) -> list[NDArray[Any]]:
        """Return copies of gamma and beta of a state; ValueError where they do not fit."""
        return [_state.array(name, state[name], self._shape, self._dtype) for name in self._names]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_saved": None}  # the input is not the layer's to copy

    def _describe(self, *parts: str, more: tuple[str, ...] = ()) -> str:
        """Return the layer's repr from its parts, which have the dtype among them."""
        dtype = [] if self.dtype == np.float32 else [f"dtype={self.dtype}"]
        return f"{type(self).__name__}({', '.join([*parts, *dtype, *more])})"
