"""LayerNorm, RMSNorm and GroupNorm: each sample by itself, so both modes compute the same."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import family
from .._arguments import array, integer, integer_from
from ._layer import Layer, Saved, marks_of
from ._settings import Fixed, Setting, flag, positive, positive_or_none

__all__ = ["GroupNorm", "LayerNorm", "RMSNorm"]


class _PerSample(Layer):
    """A layer whose passes are two functions of the family; it names them and their keywords."""

    _normalize: ClassVar[Callable[..., tuple[NDArray[Any], Any]]]
    _differentiate: ClassVar[Callable[..., tuple[NDArray[Any], ...]]]
    _takes: ClassVar[tuple[str, ...]] = ("_gamma", "_beta")  # what _normalize takes after x

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """Return the keywords of both functions."""

    def forward(
        self, x: ArrayLike, *, out: NDArray[Any] | None = None, num_threads: int | None = None
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
        x = self._admit(x)
        options, parameters = self._options(), [getattr(self, name) for name in self._takes]
        y, statistics = self._normalize(x, *parameters, **options, out=out, num_threads=num_threads)
        kept = None if out is not None and np.may_share_memory(x, out) else x
        marks = marks_of(kept, self._gamma)
        self._saved = Saved(self._differentiate, statistics, kept, marks, options)
        return y

    __call__ = forward

    def backward(
        self, dy: ArrayLike, *, out: NDArray[Any] | None = None, num_threads: int | None = None
    ) -> NDArray[Any]:
        """Return the gradient of the last forward's input; fill the gradients of the parameters.

        The input is not kept afterwards: one backward a forward.

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
            If there was no forward since the last backward, or it wrote over its input, or x or
            gamma has changed since.
        TypeError, ValueError
            If `dy` or `out` does not fit the input.
        """
        saved, x = self._last()
        own = self._own_gradients()
        given = dy, x, saved.statistics, self._gamma
        dx, *found = saved.differentiate(*given, **saved.settings, out=out, num_threads=num_threads)
        self._finish(own, found)
        return dx


def _sizes(name: str, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return the normalized shape as a tuple of ints of at least 1."""
    given: Any = [normalized_shape] if hasattr(normalized_shape, "__index__") else normalized_shape
    try:
        sizes = tuple(integer_from("a size in normalized_shape", size) for size in given)
    except TypeError:
        raise TypeError(
            f"normalized_shape is {normalized_shape!r}; it must be an int or a tuple of ints"
        ) from None
    if not sizes:
        raise ValueError("normalized_shape is empty; it must name at least one size")
    return sizes


class _LastAxes(_PerSample):
    """What LayerNorm and RMSNorm share: the shape they normalize over."""

    normalized_shape = Fixed(_sizes)
    elementwise_affine = Fixed(flag)

    def _admit(self, x: ArrayLike) -> NDArray[Any]:
        x = x if isinstance(x, np.ndarray) else array("x", x)
        if x.shape[-len(self._shape) :] != self._shape:
            raise ValueError(
                f"x has shape {x.shape}; its last axes must have the shape "
                f"{self._shape}, the normalized_shape of this {type(self).__name__}"
            )
        return x

    def _options(self) -> dict[str, Any]:
        return {"axis": -len(self._shape), "eps": self._eps}


class LayerNorm(_LastAxes):
    """Layer normalization: each sample over its last axes.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Shape of the axes that are normalized, which are the last ones of the input.
    eps : float, default 1e-5
        Added to the variance. Positive.
    elementwise_affine : bool, default True
        Whether the layer has gamma and beta.
    bias : bool, default True
        Whether it has beta; without meaning where `elementwise_affine` is False.
    dtype : dtype, default float32
        Of gamma, beta and their gradients: float32 or float64. Inputs may be either, or a half
        type, whatever this is.

    Attributes
    ----------
    gamma, beta : ndarray of `normalized_shape`, or None
        Scale and shift; 1 and 0 at the start. Change them in place, or assign values.
    grad_gamma, grad_beta : ndarray of `normalized_shape`, or None
        Their gradients, overwritten in place by each `backward`; 0 at the start.
    training : bool
        The mode, for the sake of uniformity: both compute the same.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    TypeError
        If `normalized_shape` holds anything but ints, or `dtype` is neither float32 nor float64.

    Notes
    -----
    The input of a forward is kept by reference, not copied, until the next forward or backward:
    do not change it in between. A call that raises has changed nothing.

    References
    ----------
    Ba, Kiros and Hinton, "Layer Normalization", 2016.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn import LayerNorm
    >>> ln = LayerNorm(2)
    >>> ln(np.array([[1.0, 3.0]], dtype=np.float32)).round(3)
    array([[-1.,  1.]], dtype=float32)
    """

    eps = Setting(positive)

    _normalize = staticmethod(family.layer_norm)
    _differentiate = staticmethod(family.layer_norm_backward)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        *,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.normalized_shape = normalized_shape
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        super().__init__(
            self.normalized_shape,
            self.elementwise_affine,
            self.elementwise_affine and flag("bias", bias),
            dtype,
        )

    def __repr__(self) -> str:
        bias = ["bias=False"] if self.elementwise_affine and self.beta is None else []
        affine = f"elementwise_affine={self.elementwise_affine}"
        return self._describe(f"{self.normalized_shape}", f"eps={self.eps:g}", affine, *bias)


class RMSNorm(_LastAxes):
    """RMS normalization: each sample divided by its root mean square over its last axes.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Shape of the axes that are normalized, which are the last ones of the input.
    eps : float, optional
        Added to the mean square. Positive; where None, the machine epsilon of the input's dtype,
        as in PyTorch; that of float32 for half types.
    elementwise_affine : bool, default True
        Whether the layer has gamma. It never has a beta.
    dtype : dtype, default float32
        Of gamma and its gradient: float32 or float64. Inputs may be either, or a half type,
        whatever this is.

    Attributes
    ----------
    gamma : ndarray of `normalized_shape`, or None
        Scale; 1 at the start. Change it in place, or assign values.
    grad_gamma : ndarray of `normalized_shape`, or None
        Its gradient, overwritten in place by each `backward`; 0 at the start.
    beta, grad_beta : None
    training : bool
        The mode, for the sake of uniformity: both compute the same.

    Raises
    ------
    ValueError, TypeError
        As in `LayerNorm`.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn import RMSNorm
    >>> RMSNorm(4)(np.array([3.0, 4.0, 0.0, 0.0], dtype=np.float32))
    array([1.2, 1.6, 0. , 0. ], dtype=float32)
    """

    eps = Setting(positive_or_none)

    _normalize = staticmethod(family.rms_norm)
    _differentiate = staticmethod(family.rms_norm_backward)
    _takes = ("_gamma",)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        *,
        eps: float | None = None,
        elementwise_affine: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.normalized_shape = normalized_shape
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        super().__init__(self.normalized_shape, self.elementwise_affine, False, dtype)

    def __repr__(self) -> str:
        eps = "None" if self.eps is None else f"{self.eps:g}"
        affine = f"elementwise_affine={self.elementwise_affine}"
        return self._describe(f"{self.normalized_shape}", f"eps={eps}", affine)


class GroupNorm(_PerSample):
    """Group normalization: each group of neighbouring channels of each sample.

    Parameters
    ----------
    num_groups : int
        Number of groups.
    num_channels : int
        C, the number of channels: a multiple of `num_groups`.
    axis : int, default 1
        The channel axis of the input, whose axis 0 holds the samples; negative counts from the
        end. Channels elsewhere than on axis 1 cost a copy of the input and of the result.
    eps : float, default 1e-5
        Added to the variance. Positive.
    affine : bool, default True
        Whether the layer has gamma and beta.
    dtype : dtype, default float32
        Of gamma, beta and their gradients: float32 or float64. Inputs may be either, or a half
        type, whatever this is.

    Attributes
    ----------
    gamma, beta : ndarray, shape (C,), or None
        Scale and shift; 1 and 0 at the start. Change them in place, or assign values.
    grad_gamma, grad_beta : ndarray, shape (C,), or None
        Their gradients, overwritten in place by each `backward`; 0 at the start.
    training : bool
        The mode, for the sake of uniformity: both compute the same.

    Raises
    ------
    ValueError
        If an argument is out of its range, or the channels do not split into the groups.
    TypeError
        If a number is no int, or `dtype` is neither float32 nor float64.

    Notes
    -----
    The input of a forward is kept by reference, not copied, until the next forward or backward:
    do not change it in between. A call that raises has changed nothing.

    References
    ----------
    Wu and He, "Group Normalization", 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn import GroupNorm
    >>> gn = GroupNorm(2, 4)
    >>> gn(np.array([[1.0, 3.0, 10.0, 30.0]], dtype=np.float32)).round(3)
    array([[-1.,  1., -1.,  1.]], dtype=float32)
    """

    num_groups = Fixed(integer_from)
    num_channels = Fixed(integer_from)
    affine = Fixed(flag)
    axis = Setting(integer)
    eps = Setting(positive)

    _normalize = staticmethod(family.group_norm)
    _differentiate = staticmethod(family.group_norm_backward)
    _channels: ClassVar[str] = "num_channels"

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        affine: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_groups = num_groups
        self.num_channels = num_channels
        if self.num_channels % self.num_groups:
            raise ValueError(
                f"num_channels is {num_channels}; it must be a multiple of num_groups, {num_groups}"
            )
        self.axis = axis
        self.eps = eps
        self.affine = affine
        super().__init__((self.num_channels,), self.affine, self.affine, dtype)

    def _options(self) -> dict[str, Any]:
        return {"num_groups": self.num_groups, "axis": self._axis, "eps": self._eps}

    def __repr__(self) -> str:
        axis = [] if self.axis == 1 else [f"axis={self.axis}"]
        sizes = f"{self.num_groups}", f"{self.num_channels}"
        return self._describe(*sizes, *axis, f"eps={self.eps:g}", f"affine={self.affine}")
