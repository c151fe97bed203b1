"""A layer that remembers statistics: how batches move them, and how they are read and set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import _runtime
from .._arguments import integer_from
from ..moments import Moments
from . import _settings, _state
from ._layer import Layer
from ._running import NanPolicy, Running
from ._sample_moments import SampleMoments
from ._settings import Fixed, Setting, float_type
from ._switches import Switches

__all__ = ["Tracking"]


class Tracking(Switches, Layer):
    """A layer with running statistics, unless `track_running_stats` is False."""

    _by_sample: ClassVar[bool] = False  # whether each sample has statistics of its own

    num_features = Fixed(integer_from)
    affine = Fixed(_settings.flag)
    eps = Setting(_settings.positive)
    momentum = Setting(_settings.momentum)
    track_running_stats = Setting(_settings.flag)
    running_ddof = Setting(_settings.ddof)
    nan_policy = Setting(_settings.nan_policy)

    _num_features: int
    _eps: float
    _momentum: float | None
    _track_running_stats: bool
    _running_ddof: int
    _nan_policy: NanPolicy

    def __init__(self, num_features: int, affine: bool, dtype: DTypeLike) -> None:
        self.num_features = num_features
        self.affine = affine
        super().__init__((self._num_features,), self.affine, self.affine, dtype)
        self._running = Running.start(self._num_features, self._dtype)
        self._seen: tuple[Moments, Running] | None = None  # last batch, and what it moved

    # ---- learning ------------------------------------------------------------------------

    def _by_batch(self, training: bool) -> bool:
        """Whether a batch is normalized with its own statistics."""
        if not self._track_running_stats:
            return True
        return training if self.use_batch_statistics is None else self.use_batch_statistics

    def _learns(self, training: bool) -> bool:
        """Whether a batch moves the running statistics."""
        return training and self._track_running_stats and self.update_statistics

    def _after(self, before: Running, batch: Moments) -> Running:
        """Return the running statistics after `batch`; they may be those of before."""
        after = before.absorb(batch, self._momentum, self._running_ddof)
        return before.settle(after, self._nan_policy)

    # What follows computes first, and takes its turn to put the result in place: if another thread
    # came between, once more from there. Neither a call nor a loop happens while it has its turn,
    # so that Python can neither be interrupted nor change threads: a change is whole, or is not.

    def _learn(self, batch: Moments, saved: Any) -> None:
        """Move the running statistics, and keep `saved` for backward."""
        while True:
            before = self._running
            after = self._after(before, batch)
            seen = self._seen if after is before else (batch, before)
            with _runtime.turn:
                if self._running is before:
                    self._running, self._seen, self._saved = after, seen, saved
                    return

    def _replace(self, **parts: Any) -> None:
        """Replace parts of the running statistics."""
        while True:
            before = self._running
            after = before._replace(**parts)
            with _runtime.turn:
                if self._running is before:
                    self._running = after
                    return

    # ---- parameters and state ------------------------------------------------------------

    def parameters(self) -> list[NDArray[Any]]:
        """Return ``[gamma, beta]``, the arrays themselves.

        Empty where `affine` or `train_affine` is False.
        """
        return super().parameters() if self.train_affine else []

    def gradients(self) -> list[NDArray[Any]]:
        """Return ``[grad_gamma, grad_beta]``, in the order of `parameters`."""
        return super().gradients() if self.train_affine else []

    @property
    def running_mean(self) -> NDArray[Any] | None:
        """Running mean, (C,), or None where `track_running_stats` is False."""
        return self._running.mean if self.track_running_stats else None

    @running_mean.setter
    def running_mean(self, value: ArrayLike) -> None:
        self._replace(mean=_state.finite("running_mean", self._tracked("running_mean", value)))

    @property
    def running_var(self) -> NDArray[Any] | None:
        """Running variance, (C,), or None where `track_running_stats` is False."""
        return self._running.var if self.track_running_stats else None

    @running_var.setter
    def running_var(self, value: ArrayLike) -> None:
        var = self._tracked("running_var", value)
        self._replace(var=_state.finite("running_var", var, least=0))

    @property
    def num_batches_tracked(self) -> int | None:
        """Training steps so far, or None where `track_running_stats` is False."""
        return self._running.batches if self.track_running_stats else None

    @num_batches_tracked.setter
    def num_batches_tracked(self, value: int) -> None:
        self._refuse_untracked("num_batches_tracked")
        self._replace(batches=_state.batches(value))

    def _refuse_untracked(self, name: str) -> None:
        if not self.track_running_stats:
            raise AttributeError(f"{name} cannot be set: track_running_stats is False")

    def _refuse_within_samples(self, name: str, moments: Moments) -> None:
        """Raise TypeError where the variance between samples is missing, and belongs to it."""
        if isinstance(moments, SampleMoments) and not self._by_sample:
            raise TypeError(
                f"{name} is of statistics within samples, which an instance norm found; those of "
                "a batch norm have the variance between samples too. Take those that "
                "population_statistics returns for this layer, or cybn.moments of its input"
            )

    def _tracked(self, name: str, value: ArrayLike) -> NDArray[Any]:
        self._refuse_untracked(name)
        return _state.vector(name, value, self.num_features, self.dtype)

    def set_statistics(self, moments: Moments) -> None:
        """Take these moments, such as those of a whole dataset, for the running statistics.

        `running_mean` becomes their mean and `running_var` their variance, unbiased or not as
        `running_ddof` says. `num_batches_tracked` stays as it is.

        Parameters
        ----------
        moments : Moments
            Of C channels, with more than `running_ddof` values in each. For an instance norm, what
            `population_statistics` found for it.

        Raises
        ------
        TypeError
            If `moments` is none, or is of statistics within samples, which an instance norm found,
            and this is no instance norm.
        AttributeError
            If `track_running_stats` is False.
        ValueError
            If it has other channels, too few values, or one that is not finite. The layer is
            unchanged.
        """
        if not isinstance(moments, Moments):
            raise TypeError(f"moments is of type {type(moments).__name__}; it must be Moments")
        self._refuse_within_samples("moments", moments)
        self._refuse_untracked("running_mean")
        few = np.flatnonzero(np.asarray(moments._degrees(self._running_ddof)) <= 0)
        if few.size and moments.mean.shape == self._shape:
            raise ValueError(
                f"moments has count {moments.count}, which in channel {few[0]} is too few for the "
                f"running variance with running_ddof={self._running_ddof}. Take moments of more "
                "values, or make the layer with running_ddof=0"
            )
        mean = _state.finite("running_mean", self._tracked("running_mean", moments.mean))
        var = self._tracked("running_var", moments.var(self._running_ddof))
        var = _state.finite("running_var", var, least=0)
        self._replace(mean=mean, var=var)

    def reset_running_stats(self) -> None:
        """Put the running statistics back to mean 0, variance 1, no batches."""
        start = Running.start(self.num_features, self.dtype)
        with _runtime.turn:
            self._running, self._seen = start, None

    def scale_shift(self, dtype: DTypeLike | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return eval mode's normalization as ``y = x * scale + shift``, channel by channel.

        Parameters
        ----------
        dtype : dtype, optional
            Of the result: float32 or float64; that of the layer where None. Computed in float64
            and rounded once.

        Returns
        -------
        scale, shift : ndarray, shape (C,)
            ``gamma / sqrt(running_var + eps)`` and ``beta - running_mean * scale``: new arrays.

        Raises
        ------
        ValueError
            If `track_running_stats` is False: without running statistics there is no such form.
        TypeError
            If `dtype` is neither float32 nor float64.

        Notes
        -----
        Where the mean is many standard deviations from zero, ``x * scale`` and ``shift`` cancel,
        and the layer itself, which subtracts the mean first, is the more accurate of the two.
        """
        dtype = self.dtype if dtype is None else float_type(dtype)
        if not self.track_running_stats:
            raise ValueError(
                "track_running_stats is False: this layer normalizes with the statistics of each "
                "batch, which no fixed scale and shift can do"
            )
        mean, var, _ = self._running
        gamma = 1.0 if self.gamma is None else self.gamma.astype(np.float64)
        beta = 0.0 if self.beta is None else self.beta.astype(np.float64)
        with np.errstate(all="ignore"):  # NaN and infinite statistics stay visible
            scale = gamma / np.sqrt(var.astype(np.float64) + self.eps)
            shift = beta - mean.astype(np.float64) * scale
            return scale.astype(dtype), shift.astype(dtype)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return copies of all that `load_state_dict` needs.

        Returns
        -------
        dict of str to ndarray
            ``gamma`` and ``beta`` where `affine`; ``running_mean``, ``running_var`` and
            ``num_batches_tracked`` (int64, shape ()) where `track_running_stats`. A NaN or
            infinity in the running statistics is saved, but not loaded again.
        """
        state = super().state_dict()
        if self.track_running_stats:
            mean, var, batches = self._running
            state |= {
                "running_mean": mean.copy(),
                "running_var": var.copy(),
                "num_batches_tracked": np.array(batches, np.int64),
            }
        return state

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
            If keys are missing or unexpected, a shape or dtype is wrong, running_mean is not
            finite, or running_var is not finite or is negative. The layer is unchanged.
        """
        _state.check_keys(state, self.state_dict())
        running = self._running
        if self.track_running_stats:
            running = Running(
                _state.finite("running_mean", self._tracked("running_mean", state["running_mean"])),
                _state.finite("running_var", self._tracked("running_var", state["running_var"]), 0),
                _state.batches(state["num_batches_tracked"]),
            )
        own = self._own(self._names)
        given = _state.fitting(own, self._given(state))
        with _runtime.turn:
            if own:
                own[0][...], own[1][...] = given
            self._running, self._seen = running, None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_seen": None}
