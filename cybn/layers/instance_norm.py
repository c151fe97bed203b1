"""InstanceNorm and its 1d, 2d and 3d forms, which normalize each channel of each sample."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import _dispatch, family
from .._arguments import array, check_batch
from .._moments import Moments
from .._sample_moments import SampleMoments
from .._words import Masked
from . import _passes, _settings
from ._passes import ALL, Selected, Way
from ._settings import Setting
from ._tracking import Tracking

__all__ = ["InstanceNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]


class InstanceNorm(Tracking):
    """Instance normalization: each channel of each sample over its positions.

    In eval mode with running statistics it is batch normalization in eval mode; else each channel
    of each sample is normalized by itself, in both modes alike.

    Parameters
    ----------
    num_features : int
        C, the number of channels. At least 1.
    axis : int, default 1
        The channel axis of a batch, not axis 0, which has the samples. Negative numbers count from
        the end.
    eps, running_ddof, dtype
        As in `BatchNorm`: 1e-5, 1 (unbiased) and float32.
    momentum : float or None, default 0.1
        As in `BatchNorm`, so None means the average over all batches. (In PyTorch None stops the
        updates.)
    affine : bool, default False
        Whether the layer has gamma and beta.
    track_running_stats : bool, default False
        Whether the layer has running statistics. A training step moves them towards the averages,
        over the samples, of the means and variances within samples, and eval mode uses them.
        `drift` and `population_statistics` measure the same. None of them includes the differences
        between samples.

    Attributes
    ----------
    gamma, beta, grad_gamma, grad_beta, running_mean, running_var, num_batches_tracked, training, \
            update_statistics, use_batch_statistics, train_affine, nan_policy
        As in `BatchNorm`.

    Raises
    ------
    ValueError, TypeError
        As in `BatchNorm`.

    References
    ----------
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
    Stylization", 2016.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn import InstanceNorm1d
    >>> InstanceNorm1d(2)(np.array([[[1.0, 3.0], [5.0, 9.0]]], dtype=np.float32)).round(3)
    array([[[-1.,  1.],
            [-1.,  1.]]], dtype=float32)
    """

    _by_sample: ClassVar[bool] = True

    activation, virtual_batch_size, renorm = (Setting(_settings.nothing) for _ in range(3))
    _activation = _virtual_batch_size = _renorm = None
    _slope = 0.0

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        running_ddof: int = 1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        statistics = momentum, track_running_stats, running_ddof
        super().__init__(num_features, affine, dtype, axis, eps, *statistics)

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
        """Normalize a batch or one sample; in training mode, update the running statistics.

        As `Layer.forward`. `x` is a batch, or one sample without the axis of samples; then `mask`
        and `lengths` have no such axis either. These and `masked` are those of `instance_norm`.
        """
        x = array("x", x)
        selected: Selected = ALL
        if not (mask is None and lengths is None and masked == "normalize"):
            selected = mask, None, lengths, masked
        if not self._is_sample(x):
            return _passes.forward(self, x, None, selected, out, num_threads)
        mask, lengths = (None if v is None else np.asarray(v)[np.newaxis] for v in (mask, lengths))
        given: Any = {"mask": mask, "lengths": lengths, "masked": masked}
        y = self.forward(x[np.newaxis], out=_batch_of(out), num_threads=num_threads, **given)
        return y[0] if out is None else out

    __call__ = forward

    def backward(
        self, dy: ArrayLike, *, out: NDArray[Any] | None = None, num_threads: int | None = None
    ) -> NDArray[Any]:
        """Return the gradient of the last forward's input; fill `grad_gamma` and `grad_beta`.

        As in `BatchNorm.backward`. `dy` has the shape of the input of `forward`.
        """
        dy = array("dy", dy)
        if not self._is_sample(dy):
            dx: NDArray[Any] = _passes.backward(self, dy, out, None, num_threads)
            return dx
        dx = self.backward(dy[np.newaxis], out=_batch_of(out), num_threads=num_threads)
        return dx[0] if out is None else out

    def _is_sample(self, x: NDArray[Any]) -> bool:
        """Whether an array is one sample, without the axis of samples."""
        return x.ndim + 1 in self._axes

    def _admit(self, x: ArrayLike) -> NDArray[Any]:
        x = array("x", x)
        return super()._admit(x[np.newaxis] if self._is_sample(x) else x)

    def _way(self, training: bool) -> Way | None:
        if not self._running.normalizes_by_batch(training):
            return None
        return Way(_forward, _backward, self._whole)

    def _measure(self, x: Any, selected: Any = ALL, threads: Any = None, least: int = 1) -> Moments:
        if selected is not ALL:
            _, each = _forward(x, None, None, None, (self._axis, 1.0), selected, None, threads)
            return self._whole(each)
        moved = np.moveaxis(x, self._axis, 1)
        rows = moved.reshape(1, moved.shape[0] * moved.shape[1], prod(moved.shape[2:]))
        each = _dispatch.statistics(rows, 1, ALL, threads)
        check_batch(rows.shape, 1, None, least)
        return self._whole(each)

    def _whole(self, each: Moments) -> SampleMoments:
        """Return the moments within samples, given the moments of each channel of each sample."""
        if not len(each):
            raise ValueError("x has no samples, so running statistics cannot be updated")
        return SampleMoments.of(each, self._shape[0])


def _forward(
    x: Any, gamma: Any, beta: Any, _: Any, settings: Any, selected: Any, out: Any, threads: Any
) -> tuple[NDArray[Any], Moments]:
    """Normalize each channel of each sample; see `Way`."""
    options = _options(settings, selected, out, threads)
    return family.instance_norm(x, gamma, beta, **options)


def _backward(
    dy: Any, x: Any, moments: Moments, gamma: Any, beta: Any, *given: Any
) -> tuple[NDArray[Any], ...]:
    """Return the gradients of `_forward`; see `Way`."""
    _, settings, selected, _, out, _, threads = given
    options = _options(settings, selected, out, threads)
    return family.instance_norm_backward(dy, x, moments, gamma, **options)


def _options(settings: Any, selected: Selected, out: Any, threads: Any) -> dict[str, Any]:
    """Return the keywords of both functions."""
    mask, _, lengths, masked = selected
    chosen = {"mask": mask, "lengths": lengths, "masked": masked}
    return {"axis": settings[0], "eps": settings[1], "out": out, "num_threads": threads} | chosen


def _batch_of(out: Any) -> Any:
    """Return `out` as a batch of one; other objects are returned unchanged."""
    return out[np.newaxis] if type(out) is np.ndarray else out


class InstanceNorm1d(InstanceNorm):
    """`InstanceNorm` of sequences: (N, C, L) or (C, L); with ``axis=-1``, (N, L, C) or (L, C)."""

    _axes: ClassVar[dict[int, str]] = {3: "3 axes, (N, C, L), or 2, (C, L)"}


class InstanceNorm2d(InstanceNorm):
    """`InstanceNorm` of images: (N, C, H, W) or (C, H, W); with ``axis=-1``, C is last."""

    _axes: ClassVar[dict[int, str]] = {4: "4 axes, (N, C, H, W), or 3, (C, H, W)"}


class InstanceNorm3d(InstanceNorm):
    """`InstanceNorm` of volumes: (N, C, D, H, W) or (C, D, H, W); with ``axis=-1``, C is last."""

    _axes: ClassVar[dict[int, str]] = {5: "5 axes, (N, C, D, H, W), or 4, (C, D, H, W)"}
