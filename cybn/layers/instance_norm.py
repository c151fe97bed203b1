"""InstanceNorm in its 1d, 2d and 3d forms: each channel of each sample."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import family, functional
from .._arguments import array
from ..moments import Moments
from . import _settings
from ._running import Running
from ._sample_moments import SampleMoments
from ._settings import Setting
from .batch_norm import BatchNorm

__all__ = ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]


class _InstanceNorm(BatchNorm):
    """Instance normalization: each channel of each sample over its positions.

    In eval mode with running statistics it is batch normalization in eval mode; else each channel
    of each sample is normalized by itself, in both modes alike.

    Parameters
    ----------
    num_features : int
        C, the number of channels. At least 1.
    axis : int, default 1
        The channel axis of a batch, whose axis 0 holds the samples; negative counts from the end.
        Channels elsewhere than on axis 1 cost a copy of the input and of the result.
    eps : float, default 1e-5
        Added to the variance. Positive.
    momentum : float or None, default 0.1
        Weight of the new batch in the running statistics, in [0, 1]. None: the mean over all
        batches so far (PyTorch takes None for 0 here).
    affine : bool, default False
        Whether the layer has gamma and beta.
    track_running_stats : bool, default False
        Whether the layer has running statistics. A training step moves them towards the mean
        over the samples of their means and variances, and eval mode uses them. `drift` and
        `population_statistics` measure the same; how samples differ from each other is in none.
    running_ddof : {1, 0}, default 1
        1: `running_var` follows the unbiased variance, as in PyTorch; 0: the biased one.
    dtype : dtype, default float32
        Of gamma, beta, their gradients and the running statistics: float32 or float64. Inputs
        may be either, or a half type, whatever this is.

    Attributes
    ----------
    gamma, beta, grad_gamma, grad_beta : ndarray, shape (C,), or None
        As in `BatchNorm`.
    running_mean, running_var, num_batches_tracked, training
        As in `BatchNorm`.

    Raises
    ------
    ValueError, TypeError
        As in `BatchNorm`.

    References
    ----------
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
    Stylization", 2016.
    """

    _by_sample: ClassVar[bool] = True

    activation: Setting[Any] = Setting(_settings.nothing)
    virtual_batch_size: Setting[Any] = Setting(_settings.nothing)
    renorm: Setting[Any] = Setting(_settings.nothing)

    @staticmethod
    def _normalize(
        x: Any, gamma: Any, beta: Any, *, activation: Any, slope: Any, residual: Any, **options: Any
    ) -> tuple[NDArray[Any], Moments]:
        return family.instance_norm(x, gamma, beta, **options)

    @staticmethod
    def _differentiate(
        dy: Any,
        x: Any,
        moments: Any,
        gamma: Any,
        *,
        beta: Any,
        activation: Any,
        slope: Any,
        residual: Any,
        from_output: Any,
        out_residual: Any,
        **options: Any,
    ) -> tuple[NDArray[Any], ...]:
        return family.instance_norm_backward(dy, x, moments, gamma, **options)

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
        super().__init__(
            num_features,
            axis=axis,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            running_ddof=running_ddof,
            dtype=dtype,
        )

    # No residual here, unlike in BatchNorm: hence the three overrides that a checker would refuse.

    def __call__(  # type: ignore[override]
        self,
        x: ArrayLike,
        *,
        out: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]:
        """Call `forward`."""
        return self.forward(x, out=out, num_threads=num_threads)

    def forward(  # type: ignore[override]
        self,
        x: ArrayLike,
        *,
        out: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]:
        """Normalize a batch or one sample; in training mode, move the running statistics.

        Parameters
        ----------
        x : array_like of float32, float64, float16 or bfloat16
            A batch, or one sample without the axis of samples. Kept by reference for `backward`.
        out, num_threads
            As in `BatchNorm.forward`.

        Returns
        -------
        ndarray
            `out`, or a new array with the dtype and memory layout of `x`.

        Raises
        ------
        TypeError, ValueError
            As in `instance_norm`, and if the rank or the number of channels of `x` is not the
            layer's.
        """
        return self._batched(super().forward, x, out, num_threads)

    def backward(  # type: ignore[override]
        self,
        dy: ArrayLike,
        *,
        out: NDArray[Any] | None = None,
        num_threads: int | None = None,
    ) -> NDArray[Any]:
        """Return the gradient of the last forward's input; fill `grad_gamma` and `grad_beta`.

        As `BatchNorm.backward`, which see; `dy` has the shape that was given to `forward`.
        """
        return self._batched(super().backward, dy, out, num_threads)

    def _batched(
        self, step: Any, x: ArrayLike, out: NDArray[Any] | None, num_threads: int | None
    ) -> NDArray[Any]:
        """Take a step on `x` with an axis of samples, which is put in and taken out if need be."""
        x = x if isinstance(x, np.ndarray) else array("x", x)
        y: NDArray[Any]
        if x.ndim + 1 not in self._axes:
            y = step(x, out=out, num_threads=num_threads)
            return y
        y = step(x[np.newaxis], out=_batch_of(out), num_threads=num_threads)
        return y[0] if out is None else out

    def _keep(
        self,
        statistics: Any,
        x: NDArray[Any],
        y: NDArray[Any],
        residual: NDArray[Any] | None,
        selected: Mapping[str, Any],
    ) -> Any:
        """Return what backward may need; y does not stand in for x where there are many groups."""
        saved = super()._keep(statistics, x, y, residual, selected)
        if saved.from_output and isinstance(statistics, Moments):
            return saved._replace(x=None, from_output=False)
        return saved

    def _measure(
        self, x: NDArray[Any], learns: bool, num_threads: int | None, **selected: Any
    ) -> SampleMoments:
        """Return the moments within the samples."""
        moved = np.moveaxis(x, self._axis, 1)
        rows = moved.reshape(1, moved.shape[0] * moved.shape[1], prod(moved.shape[2:]))
        if learns:
            functional._check_batch(rows, 1)
        return self._whole(functional.moments(rows, axis=1, num_threads=num_threads))

    def _whole(self, statistics: Any) -> SampleMoments:
        """Return the moments within the samples, of those of each channel of each sample."""
        if not len(statistics):
            raise ValueError("x has no samples, so there is nothing to move running statistics by")
        return SampleMoments.of(statistics, self._num_features)

    def _after(self, before: Running, batch: Moments) -> Running:
        """Return the running statistics after `batch`, of which each sample has a mean."""
        assert isinstance(batch, SampleMoments)
        means = self._running_ddof * batch.samples
        after = before.absorb(batch, self._momentum, means)
        return before.settle(after, self._nan_policy)

    def _moments_of(self, data: ArrayLike | Moments) -> Moments:
        """Return the moments within the samples of a batch, or of one sample without its axis."""
        if isinstance(data, Moments):
            return super()._moments_of(data)
        x = array("data", data)
        return super()._moments_of(x[np.newaxis] if x.ndim + 1 in self._axes else x)


def _batch_of(out: Any) -> Any:
    """Return `out` as a batch of one; what is no array is for others to refuse."""
    return out[np.newaxis] if type(out) is np.ndarray else out


class InstanceNorm1d(_InstanceNorm):
    """Instance normalization over (N, C, L) or (C, L): sequences.

    Parameters are those of `BatchNorm`, but `affine` and `track_running_stats` are False unless
    asked for. A training step with running statistics moves them towards the mean over the samples
    of their means and variances; eval mode then normalizes with them. With ``axis=-1`` it takes
    (N, L, C) or (L, C), at the cost of a copy of the input and of the result.
    """

    _axes: ClassVar[dict[int, str]] = {3: "3 axes, (N, C, L), or 2, (C, L)"}


class InstanceNorm2d(_InstanceNorm):
    """Instance normalization over (N, C, H, W) or (C, H, W): images.

    Parameters are those of `InstanceNorm1d`; with ``axis=-1`` it takes (N, H, W, C) or (H, W, C).
    """

    _axes: ClassVar[dict[int, str]] = {4: "4 axes, (N, C, H, W), or 3, (C, H, W)"}


class InstanceNorm3d(_InstanceNorm):
    """Instance normalization over (N, C, D, H, W) or (C, D, H, W): volumes.

    Parameters are those of `InstanceNorm1d`; with ``axis=-1`` it takes (N, D, H, W, C) or
    (D, H, W, C).
    """

    _axes: ClassVar[dict[int, str]] = {5: "5 axes, (N, C, D, H, W), or 4, (C, D, H, W)"}
