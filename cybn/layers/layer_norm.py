"""LayerNorm and RMSNorm: each sample by itself, over its last axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import family
from .._arguments import integer_from
from ._per_sample import PerSample
from ._settings import positive

__all__ = ["LayerNorm", "RMSNorm"]


def _sizes(normalized_shape: Any) -> tuple[int, ...]:
    """Return the normalized shape as a tuple of ints of at least 1."""
    given = [normalized_shape] if hasattr(normalized_shape, "__index__") else normalized_shape
    try:
        sizes = tuple(integer_from("a size in normalized_shape", size) for size in given)
    except TypeError:
        raise TypeError(
            f"normalized_shape is {normalized_shape!r}; it must be an int or a tuple of ints"
        ) from None
    if not sizes:
        raise ValueError("normalized_shape is empty; it must name at least one size")
    return sizes


class _LastAxes(PerSample):
    """What LayerNorm and RMSNorm share: the shape they normalize over."""

    normalized_shape: tuple[int, ...]
    eps: float | None
    elementwise_affine: bool

    def _admit(self, x: NDArray[Any]) -> None:
        if x.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            raise ValueError(
                f"x has shape {x.shape}; its last axes must have the shape "
                f"{self.normalized_shape}, the normalized_shape of this {type(self).__name__}"
            )

    def _options(self) -> dict[str, Any]:
        return {"axis": -len(self.normalized_shape), "eps": self.eps}


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
        Scale and shift; 1 and 0 at the start. Change them in place or assign.
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
        self.normalized_shape = _sizes(normalized_shape)
        self.eps = positive("eps", eps)
        self.elementwise_affine = bool(elementwise_affine)
        super().__init__(
            self.normalized_shape,
            self.elementwise_affine,
            self.elementwise_affine and bool(bias),
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
        Scale; 1 at the start. Change it in place or assign.
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

    _normalize = staticmethod(family.rms_norm)
    _differentiate = staticmethod(family.rms_norm_backward)
    _takes = ("gamma",)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        *,
        eps: float | None = None,
        elementwise_affine: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.normalized_shape = _sizes(normalized_shape)
        self.eps = None if eps is None else positive("eps", eps)
        self.elementwise_affine = bool(elementwise_affine)
        super().__init__(self.normalized_shape, self.elementwise_affine, False, dtype)

    def __repr__(self) -> str:
        eps = "None" if self.eps is None else f"{self.eps:g}"
        affine = f"elementwise_affine={self.elementwise_affine}"
        return self._describe(f"{self.normalized_shape}", f"eps={eps}", affine)
