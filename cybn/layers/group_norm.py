"""GroupNorm: groups of channels of each sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import family
from .._arguments import integer, integer_from
from ._per_sample import PerSample
from ._settings import positive

__all__ = ["GroupNorm"]


class GroupNorm(PerSample):
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
        Scale and shift; 1 and 0 at the start. Change them in place or assign.
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

    _normalize = staticmethod(family.group_norm)
    _differentiate = staticmethod(family.group_norm_backward)

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
        self.num_groups = integer_from("num_groups", num_groups)
        self.num_channels = integer_from("num_channels", num_channels)
        if self.num_channels % self.num_groups:
            raise ValueError(
                f"num_channels is {num_channels}; it must be a multiple of num_groups, {num_groups}"
            )
        self.axis = integer("axis", axis)
        self.eps = positive("eps", eps)
        self.affine = bool(affine)
        super().__init__((self.num_channels,), self.affine, self.affine, dtype)

    def _admit(self, x: NDArray[Any]) -> None:
        if -x.ndim <= self.axis < x.ndim and x.shape[self.axis] != self.num_channels:
            raise ValueError(
                f"x has shape {x.shape}, with {x.shape[self.axis]} channels on axis {self.axis}; "
                f"this GroupNorm has num_channels={self.num_channels}"
            )

    def _options(self) -> dict[str, Any]:
        return {"num_groups": self.num_groups, "axis": self.axis, "eps": self.eps}

    def __repr__(self) -> str:
        axis = [] if self.axis == 1 else [f"axis={self.axis}"]
        sizes = f"{self.num_groups}", f"{self.num_channels}"
        return self._describe(*sizes, *axis, f"eps={self.eps:g}", f"affine={self.affine}")
