"""The base class of layers: gamma, beta and their gradients, mode, state, and two passes."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import _runtime
from .._arguments import array
from . import _passes, _state
from ._running import Running, RunningStatistics
from ._settings import Parameter, Setting, elsewhere, flag, float_type
from ._state import Keys

__all__ = ["Layer"]


class Layer(ABC):
    """The base class of all layers: a normalization with its parameters and their gradients.

    Calling a layer runs its forward pass. Copies, by `copy.copy`, `copy.deepcopy` and `pickle`,
    share no array with the layer, and need a forward of their own before `backward`.

    Attributes
    ----------
    gamma, beta : ndarray, or None
        Scale and shift; 1 and 0 at the start. Change them in place, or assign to them: assigned
        values are checked and copied into the existing array.
    grad_gamma, grad_beta : ndarray, or None
        Their gradients, overwritten in place by each `backward`; 0 at the start.
    training : bool
        The mode; see `train` and `eval`.

    Examples
    --------
    >>> import cybn
    >>> layers = cybn.BatchNorm2d(8), cybn.LayerNorm(8), cybn.GroupNorm(2, 8)
    >>> all(isinstance(layer, cybn.Layer) for layer in layers)
    True
    """

    training = Setting(flag)
    gamma, beta = Parameter(), Parameter()
    grad_gamma, grad_beta = Parameter(), Parameter()

    _running: RunningStatistics | None = None
    _axis: int
    _eps: Any
    _train_affine = True
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
        self._saved: _passes.Saved | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = cls.__dict__
        # A layer is called by its forward itself, without a call between.
        if "__call__" not in own and ("forward" in own or cls.__call__ is Layer.forward):
            cls.__call__ = cls.forward  # type: ignore[method-assign]
        if "_axes" in own and cls.__doc__:  # a form of another class, whose parameters it has
            before, title, parameters = (cls.__mro__[1].__doc__ or "").partition("Parameters\n")
            cls.__doc__ += "\n" + before[before.rfind("\n") :] + title + parameters

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the layer's arrays: float32 or float64."""
        return self._dtype

    # ---- passes --------------------------------------------------------------------------

    @abstractmethod
    def forward(
        self, x: ArrayLike, *, out: NDArray[Any] | None = None, num_threads: int | None = None
    ) -> NDArray[Any]:
        """Normalize `x`, and keep what `backward` needs.

        Parameters
        ----------
        x : array_like of float32, float64, float16 or bfloat16
            The layer refers to it, without a copy, until `backward`.
        out : ndarray, optional
            Array for y, with the shape and dtype of `x`. It may be `x` itself; then `backward`
            raises an error, unless the layer can recover x from y.
        num_threads : int, optional
            Threads for this call. None means `cybn.get_num_threads`.

        Returns
        -------
        ndarray
            `out`, or a new array with the dtype and memory layout of `x`.

        Raises
        ------
        TypeError, ValueError
            As in the function of the same name, and if the shape of `x` does not fit the layer.
        """

    def backward(
        self, dy: ArrayLike, *, out: NDArray[Any] | None = None, num_threads: int | None = None
    ) -> Any:
        """Return the gradient of the last forward's input; fill `grad_gamma` and `grad_beta`.

        Afterwards the layer no longer refers to the input, so call it once per forward.

        Parameters
        ----------
        dy : array_like, shape and dtype of the last forward's input
            Gradient with respect to y.
        out : ndarray, optional
            Array for dx. It may be `dy` itself.
        num_threads
            As in `forward`.

        Returns
        -------
        ndarray
            `out`, or a new array with the dtype and memory layout of the input.

        Raises
        ------
        RuntimeError
            If there was no forward since the last backward, if the forward overwrote its input and
            y does not determine it, or if gamma or x (or the y that replaced it) has changed.
        TypeError, ValueError
            If `dy` or `out` does not fit the input.
        """
        return _passes.backward(self, dy, out, None, num_threads)

    __call__ = forward

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, or to eval mode if `mode` is False; return the layer."""
        self.training = mode
        return self

    def eval(self) -> Self:
        """Switch to eval mode; return the layer."""
        return self.train(False)

    def _admit(self, x: ArrayLike) -> NDArray[Any]:
        """Return `x` as an array; raise ValueError if its rank or channels do not fit the layer."""
        if not isinstance(x, np.ndarray):
            x = array("x", x)
        shape, axis = x.shape, self._axis
        if self._axes and len(shape) not in self._axes:
            takes = " or ".join(self._axes.values())
            raise ValueError(f"x has shape {shape}; {type(self).__name__} takes {takes}")
        if -len(shape) <= axis < len(shape) and shape[axis] != self._shape[0]:
            other, where = (-1, "last") if axis == 1 else (1, "first")
            hint = ""
            if axis in (1, -1, len(shape) - 1) and shape[other] == self._shape[0]:
                hint = f". Its channels seem to come {where}: make the layer with axis={other}"
            raise ValueError(
                f"x has shape {shape}, with {shape[axis]} channels on axis {axis}; "
                f"this {type(self).__name__} has {self._channels}={self._shape[0]}{hint}"
            )
        return x

    # ---- parameters and state ------------------------------------------------------------

    def parameters(self) -> list[NDArray[Any]]:
        """Return the arrays of gamma and beta themselves, if the layer has and trains them."""
        return [getattr(self, f"_{name}") for name in self._names if self._train_affine]

    def gradients(self) -> list[NDArray[Any]]:
        """Return the gradients in the order of `parameters`."""
        return [getattr(self, f"_grad_{name}") for name in self._names if self._train_affine]

    def _own(self, names: Sequence[str]) -> list[NDArray[Any]]:
        """Return arrays of the layer; raise ValueError if one of them is read-only."""
        arrays: list[NDArray[Any]] = [getattr(self, f"_{name}") for name in names]
        for name, own in zip(names, arrays, strict=True):
            if not own.flags.writeable:
                raise ValueError(f"{name} of this layer must be a writeable array; it is read-only")
        return arrays

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return copies of the arrays that `load_state_dict` needs.

        Returns
        -------
        dict of str to ndarray
            ``gamma``, ``beta``, ``running_mean``, ``running_var`` and ``num_batches_tracked``
            (int64, shape ()), if the layer has them. A NaN or infinity in the running statistics is
            saved, but `load_state_dict` refuses it.
        """
        state = {name: getattr(self, f"_{name}").copy() for name in self._names}
        return state if self._running is None else state | self._running.state()

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> Keys:
        """Load a state. Everything is checked before anything is changed.

        Parameters
        ----------
        state : mapping of str to array_like
            With the keys of `state_dict`. Copied, and converted to the layer's dtype.
        strict : bool, default True
            Whether missing and unexpected keys are an error. If not, arrays without a key do not
            change, and unexpected keys are ignored.

        Returns
        -------
        missing_keys, unexpected_keys : list of str
            As a named tuple; both are empty if `strict` is True.

        Raises
        ------
        TypeError, ValueError
            If `state` is not a mapping; keys do not fit and `strict` is True, a shape or dtype is
            wrong, running_mean is not finite, or running_var is not finite or, with eps added, not
            positive. The layer is unchanged.
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
        with _runtime.turn:  # no call and no loop within it, as in `RunningStatistics.learn`
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
        """Return the layer's repr: `parts`, the dtype unless it is float32, and `more`."""
        dtype = [] if self.dtype == np.float32 else [f"dtype={self.dtype}"]
        return f"{type(self).__name__}({', '.join([*parts, *dtype, *more])})"

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if hasattr(self, name)]


# Names that other libraries or layers have, and the advice of the error if a layer lacks them.
_switch = "train_affine of a batch norm says whether gamma and beta are trained"
for _names, _advice in {
    "weight scale": "its scale is gamma",
    "bias offset": "its shift is beta",
    "moving_mean": "that is running_mean",
    "moving_variance moving_var running_variance": "that is running_var",
    "requires_grad trainable": _switch,
    "num_features num_channels num_groups normalized_shape axis affine elementwise_affine "
    "activation slope virtual_batch_size renorm momentum running_ddof nan_policy train_affine "
    "track_running_stats update_statistics use_batch_statistics "
    "running_mean running_var num_batches_tracked": "other kinds of layers have that",
}.items():
    for _name in _names.split():
        setattr(Layer, _name, elsewhere(_name, _advice))
