"""The base class of batch and instance norms, which have running statistics."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import _explain, _runtime, _trials
from .._arguments import integer, integer_from
from .._moments import Moments
from .._sample_moments import SampleMoments
from .._words import Activation
from . import _settings, _snapshots
from ._layer import Layer
from ._passes import ALL, Way
from ._running import Running, RunningStatistics
from ._settings import Fixed, Setting, Statistic, optional

__all__ = ["Tracking"]

Array: TypeAlias = NDArray[Any] | Any  # or None, as in `Parameter`


class Tracking(Layer):
    """A layer of C channels that owns running statistics: a batch norm or an instance norm."""

    num_features = Fixed(integer_from)
    affine = Fixed(_settings.flag)
    axis = Setting(integer)
    eps = Setting(_settings.not_negative)
    train_affine = Setting(_settings.flag)
    momentum = Setting(optional(_settings.momentum), "_running.momentum")
    running_ddof = Setting(_settings.ddof, "_running.ddof")
    nan_policy = Setting(_settings.nan_policy, "_running.policy")
    track_running_stats = Setting(_settings.flag, "_running.tracks")
    update_statistics = Setting(_settings.flag, "_running.updates")
    use_batch_statistics = Setting(optional(_settings.flag), "_running.by_batch")
    running_mean: Statistic[Array, ArrayLike] = Statistic("mean")
    running_var: Statistic[Array, ArrayLike] = Statistic("var")
    num_batches_tracked: Statistic[int | Any, int] = Statistic("batches")

    preview = _trials.preview
    snapshot, restore, drift = _snapshots.snapshot, _snapshots.restore, _snapshots.drift
    explain = _explain.explain
    __repr__ = _explain.describe

    _running: RunningStatistics
    _activation: Activation | None
    _slope: float
    _by_sample: ClassVar[bool] = False  # whether the statistics are those within samples

    def __init__(
        self, num_features: int, affine: bool, dtype: DTypeLike, axis: int, eps: float,
        momentum: float | None, track_running_stats: bool, running_ddof: int,
    ) -> None:  # fmt: skip
        self.num_features, self.affine = num_features, affine
        super().__init__((self.num_features,), self.affine, self.affine, dtype)
        self._running = RunningStatistics(self.num_features, self.dtype)
        self.axis, self.eps, self.momentum = axis, eps, momentum
        self.track_running_stats, self.running_ddof = track_running_stats, running_ddof

    @classmethod
    def like(cls, library: str, num_features: int, **options: Any) -> Self:
        """Return a layer that uses the conventions of `library` for eps, momentum and variance.

        Parameters
        ----------
        library : {"torch", "keras", "onnx", "paper"}
            The library's default eps, its default momentum and the value that this weighs, and its
            running variance:

            - torch: 1e-5; 0.1, the new value; unbiased
            - keras: 1e-3; 0.99, the old value; biased
            - onnx: 1e-5; 0.9, the old value; biased
            - paper: 1e-5 (the paper does not give one); the mean over all batches; unbiased
        num_features, **options
            As for the layer itself, with `momentum` in the library's meaning: with "keras",
            ``momentum=0.99`` is 0.01 here. The channel axis stays 1: give ``axis=-1`` for another.

        Raises
        ------
        ValueError
            If `library` is not one of these, or an option is out of its range.
        """
        return cls(num_features, **_explain.settings(library, options))

    # ---- for the passes ------------------------------------------------------------------

    @abstractmethod
    def _way(self, training: bool) -> Way | None:
        """Return how to normalize by the batch, or None to use the running statistics."""

    @abstractmethod
    def _measure(self, x: Any, selected: Any = ALL, threads: Any = None, least: int = 1) -> Moments:
        """Return the moments of a batch; raise ValueError if fewer than `least` values count."""

    # ---- running statistics --------------------------------------------------------------

    def freeze(self) -> Self:
        """Stop all changes of the layer, in both modes; return the layer.

        Batches are normalized with the running statistics. These, gamma and beta do not change, but
        `backward` still returns the gradient of the input. This sets `update_statistics`,
        `use_batch_statistics` and `train_affine` to False.
        """
        running = self._running
        running.updates, running.by_batch, self._train_affine = False, False, False
        return self

    def unfreeze(self) -> Self:
        """Reset all three switches to their defaults; return the layer."""
        running = self._running
        running.updates, running.by_batch, self._train_affine = True, None, True
        return self

    def _refuse_within_samples(self, name: str, moments: Moments) -> None:
        """Raise TypeError if moments within samples are given to a batch norm."""
        if isinstance(moments, SampleMoments) and not self._by_sample:
            raise TypeError(
                f"{name} is of statistics within samples, which an instance norm found; those of "
                "a batch norm have the variance between samples too. Take those that "
                "population_statistics returns for this layer, or cybn.moments of its input"
            )

    def set_statistics(self, moments: Moments) -> None:
        """Set the running statistics from moments, such as those of a whole dataset.

        `running_mean` becomes their mean and `running_var` their variance with `running_ddof`.
        `num_batches_tracked` does not change.

        Parameters
        ----------
        moments : Moments
            Moments of C channels, with more than `running_ddof` values in each. For an instance
            norm, the result of `population_statistics` for it.

        Raises
        ------
        TypeError
            If `moments` is not a Moments, or holds the within-sample statistics of an instance
            norm and this layer is not one.
        AttributeError, ValueError
            If `track_running_stats` is False, or `moments` has another number of channels, too few
            values, or a value that is not finite. The layer is unchanged.
        """
        if not isinstance(moments, Moments):
            raise TypeError(f"moments is of type {type(moments).__name__}; it must be Moments")
        running = self._running
        self._refuse_within_samples("moments", moments)
        mean = running.checked("running_mean", moments.mean, self._eps)
        few = np.flatnonzero(np.asarray(moments._degrees(running.ddof)) <= 0)
        if few.size:
            raise ValueError(
                f"moments has count {moments.count}, which in channel {few[0]} is too few for the "
                f"running variance with running_ddof={running.ddof}. Take moments of more "
                "values, or make the layer with running_ddof=0"
            )
        var = running.checked("running_var", moments.var(running.ddof), self._eps)
        running.replace(mean=mean, var=var)

    def reset_running_stats(self) -> None:
        """Reset the running statistics to mean 0, variance 1 and no batches."""
        running = self._running
        start = Running.start(self.num_features, self.dtype)
        with _runtime.turn:
            running.values, running.seen = start, None

    def scale_shift(self, dtype: DTypeLike | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return eval mode's normalization as ``y = x * scale + shift``, channel by channel.

        Parameters
        ----------
        dtype : dtype, optional
            Type of the result, float32 or float64; by default that of the layer. It is computed in
            float64 and rounded once.

        Returns
        -------
        scale, shift : ndarray, shape (C,)
            ``gamma / sqrt(running_var + eps)`` and ``beta - running_mean * scale``, as new arrays,
            without the activation. If the mean is many standard deviations from zero, ``x * scale``
            and ``shift`` nearly cancel, and the layer itself is more accurate.

        Raises
        ------
        ValueError
            If eval mode normalizes by the batch, because `track_running_stats` is False or
            `use_batch_statistics` is True.
        TypeError
            If `dtype` is neither float32 nor float64.
        """
        running = self._running
        mean, var, _ = running.values
        dtype = var.dtype if dtype is None else _settings.float_type(dtype)
        if running.normalizes_by_batch(training=False):
            name = "use_batch_statistics" if running.tracks else "track_running_stats"
            raise ValueError(
                f"{name} is {getattr(self, name)}: this layer normalizes with the statistics of "
                "each batch, which no fixed scale and shift can do"
            )
        gamma = 1.0 if self._gamma is None else self._gamma.astype(np.float64)
        beta = 0.0 if self._beta is None else self._beta.astype(np.float64)
        with np.errstate(all="ignore"):
            scale = gamma / np.sqrt(var.astype(np.float64) + self._eps)
            shift = beta - mean.astype(np.float64) * scale
            return scale.astype(dtype), shift.astype(dtype)
