"""The running statistics of a layer: how batches move them, and how they are read, set and saved.

`RunningStatistics` is the part that a layer owns. Below it are the attributes and methods that a
layer with such a part has for it; a class takes them over by naming them in its body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, Self, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import _runtime, functional
from .._moments import Moments
from .._words import NanPolicy
from . import _settings, _state
from ._sample_moments import SampleMoments

__all__ = ["Running", "RunningStatistics"]


class Running(NamedTuple):
    """Running mean and variance after some number of batches; never changed, but replaced.

    So a reader in another thread never sees the mean of one batch with the variance of another.
    """

    mean: NDArray[Any]
    var: NDArray[Any]
    batches: int

    @classmethod
    def start(cls, channels: int, dtype: DTypeLike) -> Running:
        """Return mean 0 and variance 1."""
        return cls(np.zeros(channels, dtype), np.ones(channels, dtype), 0)

    def copy(self) -> Running:
        """Return statistics with arrays of their own."""
        return Running(self.mean.copy(), self.var.copy(), self.batches)


class RunningStatistics:
    """What a layer has learnt of its input, and how it learns.

    Attributes
    ----------
    values : Running
        The statistics now.
    seen : tuple of (Moments, Running), or None
        The last batch that moved them, and what they were before it.
    momentum, ddof, policy
        How a batch moves them: the settings momentum, running_ddof and nan_policy.
    tracks, updates, by_batch
        Whether they are kept, whether training moves them, and which statistics normalize: the
        settings track_running_stats, update_statistics and use_batch_statistics.
    """

    def __init__(self, channels: int, dtype: DTypeLike) -> None:
        self.values = Running.start(channels, dtype)
        self.seen: tuple[Moments, Running] | None = None
        self.momentum: float | None = 0.1
        self.ddof = 1
        self.policy: NanPolicy = "propagate"
        self.tracks = True
        self.updates = True
        self.by_batch: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"seen": None}

    def normalizes_by_batch(self, training: bool) -> bool:
        """Whether a batch is normalized with its own statistics."""
        if not self.tracks:
            return True
        return training if self.by_batch is None else self.by_batch

    def after(self, before: Running, batch: Moments) -> Running:
        """Return the statistics after one more batch; those before where the policy skips it."""
        batches = before.batches + 1
        weight = 1 / batches if self.momentum is None else self.momentum
        ddof = self.ddof
        if isinstance(batch, SampleMoments):
            ddof *= batch.samples  # each sample has a mean of its own
        mean, var = functional.absorb(before.mean, before.var, batch, weight, ddof)
        after = Running(mean, var, batches)
        return after if self.policy == "propagate" else self._settle(before, after)

    def _settle(self, before: Running, after: Running) -> Running:
        """Return which statistics stand: `after`, or those before where it is not finite."""
        spoilt = np.flatnonzero(~(np.isfinite(after.mean) & np.isfinite(after.var)))
        if not spoilt.size:
            return after
        if self.policy == "skip":
            return before
        c = spoilt[0]
        raise FloatingPointError(
            f"x would make the running statistics of channel {c} mean {after.mean[c]} and "
            f"variance {after.var[c]}; {spoilt.size} of {after.mean.size} channels are not finite. "
            "Look for NaN and infinity in x, or choose another nan_policy; where they were not "
            "finite before, reset_running_stats() starts anew"
        )

    # What follows computes first, and takes its turn to put the result in place: if another thread
    # came between, once more from there. Neither a call nor a loop happens while it has its turn,
    # so that Python can neither be interrupted nor change threads: a change is whole, or is not.

    def learn(self, batch: Moments, layer: Any, saved: Any) -> None:
        """Move the statistics, and keep in the layer what its backward needs."""
        while True:
            before = self.values
            after = self.after(before, batch)
            seen = self.seen if after is before else (batch, before)
            with _runtime.turn:
                if self.values is before:
                    self.values, self.seen, layer._saved = after, seen, saved
                    return

    def replace(self, **parts: Any) -> None:
        """Replace parts of the statistics."""
        while True:
            before = self.values
            after = before._replace(**parts)
            with _runtime.turn:
                if self.values is before:
                    self.values = after
                    return

    def state(self) -> dict[str, NDArray[Any]]:
        """Return copies of the statistics by name; nothing where they are not kept."""
        if not self.tracks:
            return {}
        mean, var, batches = self.values
        return {
            "running_mean": mean.copy(),
            "running_var": var.copy(),
            "num_batches_tracked": np.array(batches, np.int64),
        }

    def given(self, state: Mapping[str, Any], eps: float) -> Running:
        """Return the statistics that a state gives; ValueError where one will not do."""
        checks: dict[str, Callable[[Any], Any]] = {
            "running_mean": self.mean_of,
            "running_var": lambda value: self.var_of(value, eps),
            "num_batches_tracked": _state.batches,
        }
        olds: tuple[Any, ...] = self.values
        found = zip(checks.items(), olds, strict=True)
        return Running(*(check(state[n]) if n in state else old for (n, check), old in found))

    def mean_of(self, value: ArrayLike) -> NDArray[Any]:
        """Return a copy of `value` as a running mean."""
        return _state.finite("running_mean", self._vector("running_mean", value))

    def var_of(self, value: ArrayLike, eps: float) -> NDArray[Any]:
        """Return a copy of `value` as a running variance."""
        return _state.variance("running_var", self._vector("running_var", value), eps)

    def _vector(self, name: str, value: ArrayLike) -> NDArray[Any]:
        self.need(name)
        return _state.array(name, value, self.values.mean.shape, self.values.mean.dtype)

    def need(self, name: str) -> None:
        """Raise AttributeError unless running statistics are kept."""
        if not self.tracks:
            raise AttributeError(f"{name} cannot be set: track_running_stats is False")


# ---- the attributes of a layer -----------------------------------------------------------


Tracking: TypeAlias = Any  # a layer that has a `RunningStatistics` under the name _running

Layer = TypeVar("Layer")
Kept = TypeVar("Kept")
Given = TypeVar("Given")


class Statistic(Generic[Kept, Given]):
    """One of the three running statistics; None where the layer keeps none.

    The type says ``| Any`` for None, as that of `Parameter` does.
    """

    def __init__(self, name: str, check: Callable[[Tracking, Given], Kept]) -> None:
        self._name, self._check = name, check

    def __set_name__(self, owner: type, name: str) -> None:
        self._called = name

    @overload
    def __get__(self, layer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, layer: object, owner: type) -> Kept | Any: ...
    def __get__(self, layer: Any, owner: type) -> Any:
        """Return the array itself, or the number."""
        if layer is None:
            return self
        running = layer._running
        return getattr(running.values, self._name) if running.tracks else None

    def __set__(self, layer: Tracking, value: Given) -> None:
        """Replace it by a copy of a value that will do."""
        layer._running.need(self._called)
        layer._running.replace(**{self._name: self._check(layer, value)})


def _mean(layer: Tracking, value: ArrayLike) -> NDArray[Any]:
    running: RunningStatistics = layer._running
    return running.mean_of(value)


def _var(layer: Tracking, value: ArrayLike) -> NDArray[Any]:
    running: RunningStatistics = layer._running
    return running.var_of(value, layer._eps)


def _batches(layer: Tracking, value: int) -> int:
    return _state.batches(value)


running_mean = Statistic("mean", _mean)
running_var = Statistic("var", _var)
num_batches_tracked = Statistic("batches", _batches)

momentum = _settings.Setting(_settings.momentum, "_running.momentum")
running_ddof = _settings.Setting(_settings.ddof, "_running.ddof")
nan_policy = _settings.Setting(_settings.nan_policy, "_running.policy")
track_running_stats = _settings.Setting(_settings.flag, "_running.tracks")
update_statistics = _settings.Setting(_settings.flag, "_running.updates")
use_batch_statistics = _settings.Setting(_settings.flag_or_none, "_running.by_batch")


# ---- and its methods ---------------------------------------------------------------------


def freeze(self: Layer) -> Layer:
    """Let nothing in the layer change, in either mode; return the layer.

    Batches are normalized with the running statistics, which stay as they are, as do gamma and
    beta. Gradients still flow through to the input. Sets `update_statistics`,
    `use_batch_statistics` and `train_affine`, all three, to False.
    """
    _switch(self, (False, False, False))
    return self


def unfreeze(self: Layer) -> Layer:
    """Put all three switches back to where they are in a new layer; return the layer."""
    _switch(self, (True, None, True))
    return self


def _switch(layer: Any, switches: tuple[bool, bool | None, bool]) -> None:
    """Put switches in place; neither a call nor a loop, so that all of them are or none."""
    running = layer._running
    running.updates, running.by_batch, layer._train_affine = switches


def switches(layer: Any) -> tuple[bool, bool | None, bool]:
    """Return update_statistics, use_batch_statistics and train_affine."""
    return layer._running.updates, layer._running.by_batch, layer._train_affine


def refuse_within_samples(layer: Tracking, name: str, moments: Moments) -> None:
    """Raise TypeError where the variance between samples is missing, and belongs to it."""
    if isinstance(moments, SampleMoments) and not layer._by_sample:
        raise TypeError(
            f"{name} is of statistics within samples, which an instance norm found; those of "
            "a batch norm have the variance between samples too. Take those that "
            "population_statistics returns for this layer, or cybn.moments of its input"
        )


def set_statistics(self: Tracking, moments: Moments) -> None:
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
    running = self._running
    refuse_within_samples(self, "moments", moments)
    running.need("running_mean")
    few = np.flatnonzero(np.asarray(moments._degrees(running.ddof)) <= 0)
    if few.size and moments.mean.shape == running.values.mean.shape:
        raise ValueError(
            f"moments has count {moments.count}, which in channel {few[0]} is too few for the "
            f"running variance with running_ddof={running.ddof}. Take moments of more "
            "values, or make the layer with running_ddof=0"
        )
    mean = running.mean_of(moments.mean)
    running.replace(mean=mean, var=running.var_of(moments.var(running.ddof), self._eps))


def reset_running_stats(self: Tracking) -> None:
    """Put the running statistics back to mean 0, variance 1, no batches."""
    running = self._running
    start = Running.start(running.values.mean.size, running.values.mean.dtype)
    with _runtime.turn:
        running.values, running.seen = start, None


def scale_shift(
    self: Tracking, dtype: DTypeLike | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return eval mode's normalization as ``y = x * scale + shift``, channel by channel.

    Parameters
    ----------
    dtype : dtype, optional
        Of the result: float32 or float64; that of the layer where None. Computed in float64
        and rounded once.

    Returns
    -------
    scale, shift : ndarray, shape (C,)
        ``gamma / sqrt(running_var + eps)`` and ``beta - running_mean * scale``: new arrays. An
        activation, which comes after them, is not in them.

    Raises
    ------
    ValueError
        If eval mode normalizes by the batch, as `track_running_stats` is False or
        `use_batch_statistics` is True: then there is no such form.
    TypeError
        If `dtype` is neither float32 nor float64.

    Notes
    -----
    Where the mean is many standard deviations from zero, ``x * scale`` and ``shift`` cancel,
    and the layer itself, which subtracts the mean first, is the more accurate of the two.
    """
    running = self._running
    mean, var, _ = running.values
    dtype = var.dtype if dtype is None else _settings.float_type(dtype)
    if running.normalizes_by_batch(training=False):
        why = "use_batch_statistics is True" if running.tracks else "track_running_stats is False"
        raise ValueError(
            f"{why}: this layer normalizes with the statistics of each batch, which no fixed scale "
            "and shift can do"
        )
    gamma = 1.0 if self._gamma is None else self._gamma.astype(np.float64)
    beta = 0.0 if self._beta is None else self._beta.astype(np.float64)
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(var.astype(np.float64) + self._eps)
        shift = beta - mean.astype(np.float64) * scale
        return scale.astype(dtype), shift.astype(dtype)
