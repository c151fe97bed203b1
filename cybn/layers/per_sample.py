"""LayerNorm, RMSNorm and GroupNorm, which normalize each sample by itself in both modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import _dispatch, family
from .._arguments import array, integer, integer_from
from .._words import Masked
from ._layer import Layer
from ._passes import Saved
from ._settings import Fixed, Setting, flag, optional, positive

__all__ = ["GroupNorm", "LayerNorm", "RMSNorm"]


class PerSample(Layer):
    """A layer whose passes are two functions of the family."""

    _normalize: ClassVar[Callable[..., tuple[NDArray[Any], Any]]]
    _differentiate: ClassVar[Callable[..., tuple[NDArray[Any], ...]]]
    _takes: ClassVar[tuple[str, ...]] = ("_gamma", "_beta")  # the arguments of _normalize after x

    def _forward(
        self, x: ArrayLike, options: dict[str, Any], out: Any, num_threads: int | None
    ) -> NDArray[Any]:
        """Normalize `x`; the options are keywords of both functions."""
        x, parameters = self._admit(x), [getattr(self, name) for name in self._takes]
        y, statistics = self._normalize(x, *parameters, **options, out=out, num_threads=num_threads)
        kept = None if out is not None and np.may_share_memory(x, out) else x
        marks = _dispatch.marks(kept, self._gamma, None, None)
        self._saved = Saved(self._gradients, statistics, kept, marks, None, options)
        return y

    @classmethod
    def _gradients(cls, dy: Any, x: Any, statistics: Any, gamma: Any, *given: Any) -> Any:
        """Return the gradients; see `Way.backward`."""
        _, _, options, _, _, out, _, threads = given
        return cls._differentiate(dy, x, statistics, gamma, **options, out=out, num_threads=threads)


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


class LastAxes(PerSample):
    """A norm over the last axes of its input: LayerNorm or RMSNorm."""

    normalized_shape = Fixed(_sizes)
    elementwise_affine = Fixed(flag)

    def __init__(
        self, normalized_shape: Any, eps: Any, elementwise_affine: bool, bias: bool, dtype: Any
    ) -> None:
        self.normalized_shape, self.eps = normalized_shape, eps
        self.elementwise_affine = scale = elementwise_affine
        super().__init__(self.normalized_shape, scale, scale and flag("bias", bias), dtype)

    def _admit(self, x: ArrayLike) -> NDArray[Any]:
        x = array("x", x)
        if x.shape[-len(self._shape) :] != self._shape:
            raise ValueError(
                f"x has shape {x.shape}; its last axes must have the shape "
                f"{self._shape}, the normalized_shape of this {type(self).__name__}"
            )
        return x

    def forward(
        self, x: ArrayLike, *, out: NDArray[Any] | None = None, num_threads: int | None = None
    ) -> NDArray[Any]:
        """Normalize; as `Layer.forward`."""
        return self._forward(x, {"axis": -len(self._shape), "eps": self._eps}, out, num_threads)

    def __repr__(self) -> str:
        eps = "None" if self._eps is None else f"{self._eps:g}"
        bias = "_beta" in self._takes and self.elementwise_affine and self.beta is None
        affine = f"elementwise_affine={self.elementwise_affine}", *["bias=False"] * bias
        return self._describe(f"{self.normalized_shape}", f"eps={eps}", *affine)


class LayerNorm(LastAxes):
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
        Whether it has beta. Ignored if `elementwise_affine` is False.
    dtype : dtype, default float32
        The type of gamma, beta and their gradients: float32 or float64. Inputs may have either type
        or a half type.

    Attributes
    ----------
    gamma, beta, grad_gamma, grad_beta : ndarray of `normalized_shape`, or None
        As in `Layer`, like `training`; both modes compute the same.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range or of another type.

    Notes
    -----
    The layer refers to the input of a forward, without a copy, until the next forward or backward.
    Do not change it in between. If a call raises an error, nothing has changed.

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
        super().__init__(normalized_shape, eps, elementwise_affine, bias, dtype)


class RMSNorm(LastAxes):
    """RMS normalization: each sample divided by its root mean square over its last axes.

    Parameters
    ----------
    normalized_shape, dtype
        As in `LayerNorm`.
    eps : float, optional
        Added to the mean square. Positive. None means the machine epsilon of the input's dtype, as
        in PyTorch, and that of float32 for half types.
    elementwise_affine : bool, default True
        Whether the layer has gamma. It never has a beta.

    Attributes
    ----------
    gamma, grad_gamma : ndarray of `normalized_shape`, or None
        As in `Layer`, like `training`; both modes compute the same.
    beta, grad_beta : None

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

    eps = Setting(optional(positive))

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
        super().__init__(normalized_shape, eps, elementwise_affine, False, dtype)


class GroupNorm(PerSample):
    """Group normalization: each group of neighbouring channels of each sample.

    Parameters
    ----------
    num_groups : int
        Number of groups.
    num_channels : int
        C, the number of channels: a multiple of `num_groups`.
    axis : int, default 1
        The channel axis of the input, not axis 0, which has the samples. Negative numbers count
        from the end.
    affine : bool, default True
        Whether the layer has gamma and beta.
    eps, dtype
        As in `LayerNorm`: 1e-5 and float32.

    Attributes
    ----------
    gamma, beta, grad_gamma, grad_beta : ndarray, shape (C,), or None
        As in `Layer`, like `training`; both modes compute the same.

    Raises
    ------
    ValueError, TypeError
        As in `LayerNorm`, and if the channels do not split into the groups.

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
        self.num_groups, self.num_channels = num_groups, num_channels
        if self.num_channels % self.num_groups:
            raise ValueError(
                f"num_channels is {num_channels}; it must be a multiple of num_groups, {num_groups}"
            )
        self.axis, self.eps, self.affine = axis, eps, affine
        super().__init__((self.num_channels,), self.affine, self.affine, dtype)

    def forward(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        masked: Masked = "normalize",
        out: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]:
        """Normalize; as `Layer.forward`, with `mask`, `lengths` and `masked` of `group_norm`."""
        options = {"num_groups": self.num_groups, "axis": self._axis, "eps": self._eps}
        if not (mask is None and lengths is None and masked == "normalize"):
            options |= {"mask": deepcopy(mask), "lengths": deepcopy(lengths), "masked": masked}
        return self._forward(x, options, out, num_threads)

    __call__ = forward

    def __repr__(self) -> str:
        axis = [] if self.axis == 1 else [f"axis={self.axis}"]
        sizes = f"{self.num_groups}", f"{self.num_channels}"
        return self._describe(*sizes, *axis, f"eps={self.eps:g}", f"affine={self.affine}")
