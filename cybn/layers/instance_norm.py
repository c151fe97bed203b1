"""InstanceNorm in its 1d, 2d and 3d forms: each channel of each sample."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import family, functional
from .._arguments import array, integer, integer_from
from .._moments import Moments
from . import _explain, _passes, _settings, _snapshots, _trials
from . import _running as statistics
from ._layer import Layer, Saved, marks_of, same_memory
from ._parts import require_two
from ._running import RunningStatistics
from ._sample_moments import SampleMoments
from ._settings import Fixed, Setting

__all__ = ["InstanceNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]


class InstanceNorm(Layer):
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
        Added to the variance. Positive; 0 will do for a layer that only does inference.
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
    """

    _by_sample: ClassVar[bool] = True

    num_features = Fixed(integer_from)
    affine = Fixed(_settings.flag)
    axis = Setting(integer)
    eps = Setting(_settings.not_negative)
    train_affine = Setting(_settings.flag)
    activation, virtual_batch_size, renorm = (Setting(_settings.nothing) for _ in range(3))
    _activation = _virtual_batch_size = _renorm = None

    # What a layer has for its running statistics, for looking without touching, and in words.
    momentum, running_ddof = statistics.momentum, statistics.running_ddof
    nan_policy, track_running_stats = statistics.nan_policy, statistics.track_running_stats
    update_statistics = statistics.update_statistics
    use_batch_statistics = statistics.use_batch_statistics
    running_mean, running_var = statistics.running_mean, statistics.running_var
    num_batches_tracked = statistics.num_batches_tracked
    freeze, unfreeze = statistics.freeze, statistics.unfreeze
    set_statistics, reset_running_stats = statistics.set_statistics, statistics.reset_running_stats
    scale_shift = statistics.scale_shift
    preview = _trials.preview
    snapshot, restore, drift = _snapshots.snapshot, _snapshots.restore, _snapshots.drift
    explain = _explain.explain
    __repr__ = _explain.describe

    _running: RunningStatistics

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
        self.num_features, self.affine = num_features, affine
        super().__init__((self.num_features,), self.affine, self.affine, dtype)
        self._running = RunningStatistics(self.num_features, self.dtype)
        self.axis = axis
        self.eps = eps
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.running_ddof = running_ddof

    @classmethod
    def like(cls, library: str, num_features: int, **options: Any) -> Self:
        """Return a layer that means its settings as `library` does; see `BatchNorm.like`."""
        return cls(num_features, **_explain.settings(library, options))

    def forward(
        self, x: ArrayLike, *, out: NDArray[Any] | None = None, num_threads: int | None = None
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
        x = x if isinstance(x, np.ndarray) else array("x", x)
        if x.ndim + 1 in self._axes:  # one sample, a batch of one
            y = self.forward(x[np.newaxis], out=_batch_of(out), num_threads=num_threads)
            return y[0] if out is None else out
        x = self._admit(x)
        running, trial = self._running, _trials.active(self)
        training = self._training if trial is None else trial.training
        learns = trial is None and training and running.tracks and running.updates
        if learns and out is not None and running.policy == "raise":
            running.after(running.values, self._measure(x, True, num_threads))
        settings: dict[str, Any] = {"axis": self._axis, "eps": self._eps}
        options = settings | {"out": out, "num_threads": num_threads}
        batch: Moments | None = None
        by_itself = running.normalizes_by_batch(training)
        given: Any
        if by_itself:
            y, given = family.instance_norm(x, self._gamma, self._beta, **options)
            if running.tracks:
                batch = self._whole(given)
        else:
            if learns or trial is not None:  # before out, which may be x
                batch = self._measure(x, learns, num_threads)
            given = running.values
            y = functional.batch_norm_inference(
                x, given.mean, given.var, self._gamma, self._beta, **options
            )
        if trial is not None:
            trial.tell(self, batch)
            return y
        way = family.instance_norm_backward if by_itself else _passes.through_fixed
        saved = Saved(way, given, x, marks_of(x, self._gamma), settings)
        if out is not None and same_memory(x, y):
            if by_itself:
                saved = saved._replace(x=None)
            else:  # y tells what x was
                marks = marks_of(y, self._gamma, self._beta)
                saved = saved._replace(x=y, from_output=True, marks=marks)
        if learns and batch is not None:
            running.learn(batch, self, saved)
        else:
            self._saved = saved
        return y

    __call__ = forward

    def backward(
        self, dy: ArrayLike, *, out: NDArray[Any] | None = None, num_threads: int | None = None
    ) -> NDArray[Any]:
        """Return the gradient of the last forward's input; fill `grad_gamma` and `grad_beta`.

        As in `BatchNorm.backward`; `dy` has the shape that was given to `forward`.
        """
        dy = dy if isinstance(dy, np.ndarray) else array("dy", dy)
        if dy.ndim + 1 in self._axes:
            dx = self.backward(dy[np.newaxis], out=_batch_of(out), num_threads=num_threads)
            return dx[0] if out is None else out
        if _trials.active(self) is not None:
            raise RuntimeError("there is no backward in a preview: its forwards leave no trace")
        saved, x = self._last()
        own = self._own_gradients()
        options = saved.settings | {"out": out, "num_threads": num_threads}
        if saved.from_output:
            options |= {"from_output": True, "beta": self._beta}
        dx, *gradients = saved.differentiate(dy, x, saved.statistics, self._gamma, **options)
        self._finish(own, gradients)
        return dx

    def _admit(self, x: ArrayLike) -> NDArray[Any]:
        """Return a batch, of one sample where `x` is one."""
        x = x if isinstance(x, np.ndarray) else array("x", x)
        return super()._admit(x[np.newaxis] if x.ndim + 1 in self._axes else x)

    def _measure(
        self, x: NDArray[Any], learns: bool = False, num_threads: int | None = None
    ) -> SampleMoments:
        """Return the moments within the samples; ValueError where they are too few to learn."""
        moved = np.moveaxis(x, self._axis, 1)
        rows = moved.reshape(1, moved.shape[0] * moved.shape[1], prod(moved.shape[2:]))
        each = functional.moments(rows, axis=1, num_threads=num_threads)
        if learns:
            require_two(rows, 1, rows.shape[2], {})
        return self._whole(each)

    def _whole(self, each: Moments) -> SampleMoments:
        """Return the moments within the samples, of those of each channel of each sample."""
        if not len(each):
            raise ValueError("x has no samples, so there is nothing to move running statistics by")
        return SampleMoments.of(each, self._shape[0])


def _batch_of(out: Any) -> Any:
    """Return `out` as a batch of one; what is no array is for others to refuse."""
    return out[np.newaxis] if type(out) is np.ndarray else out


class InstanceNorm1d(InstanceNorm):
    """Instance normalization over (N, C, L) or (C, L): sequences.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    axis : int, default 1
        The channel axis; with -1 it takes (N, L, C) or (L, C),
        at the cost of a copy of the input and of the result.
    eps, momentum, affine, track_running_stats, running_ddof, dtype
        As in `BatchNorm`, but `affine` and `track_running_stats` are False unless asked for: 1e-5,
        0.1, False, False, 1 (unbiased) and float32. A training step with running statistics moves
        them towards the mean over the samples of their means and variances; eval mode then
        normalizes with them.
    """

    _axes: ClassVar[dict[int, str]] = {3: "3 axes, (N, C, L), or 2, (C, L)"}


class InstanceNorm2d(InstanceNorm):
    """Instance normalization over (N, C, H, W) or (C, H, W): images.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    axis : int, default 1
        The channel axis; with -1 it takes (N, H, W, C) or (H, W, C),
        at the cost of a copy of the input and of the result.
    eps, momentum, affine, track_running_stats, running_ddof, dtype
        As in `BatchNorm`, but `affine` and `track_running_stats` are False unless asked for: 1e-5,
        0.1, False, False, 1 (unbiased) and float32. A training step with running statistics moves
        them towards the mean over the samples of their means and variances; eval mode then
        normalizes with them.
    """

    _axes: ClassVar[dict[int, str]] = {4: "4 axes, (N, C, H, W), or 3, (C, H, W)"}


class InstanceNorm3d(InstanceNorm):
    """Instance normalization over (N, C, D, H, W) or (C, D, H, W): volumes.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    axis : int, default 1
        The channel axis; with -1 it takes (N, D, H, W, C) or (D, H, W, C),
        at the cost of a copy of the input and of the result.
    eps, momentum, affine, track_running_stats, running_ddof, dtype
        As in `BatchNorm`, but `affine` and `track_running_stats` are False unless asked for: 1e-5,
        0.1, False, False, 1 (unbiased) and float32. A training step with running statistics moves
        them towards the mean over the samples of their means and variances; eval mode then
        normalizes with them.
    """

    _axes: ClassVar[dict[int, str]] = {5: "5 axes, (N, C, D, H, W), or 4, (C, D, H, W)"}
