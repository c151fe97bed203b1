"""The running statistics of a layer: how batches update them, and how they are set and saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import _runtime, functional
from .._arguments import check_degrees
from .._moments import Moments
from .._sample_moments import SampleMoments
from .._words import NanPolicy
from . import _state

__all__ = ["Running", "RunningStatistics"]

NAMES = "running_mean", "running_var", "num_batches_tracked"


class Running(NamedTuple):
    """Running mean and variance after some number of batches.

    A layer replaces the object and never changes it, so that a reader in another thread never sees
    the mean of one batch with the variance of another.
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
    """The running statistics of a layer, and the settings by which they are updated."""

    def __init__(self, channels: int, dtype: DTypeLike) -> None:
        self.values = Running.start(channels, dtype)
        self.seen: tuple[Moments, Running] | None = None  # last batch, statistics before it
        # The settings of the layer: momentum, running_ddof, nan_policy, track_running_stats,
        # update_statistics and use_batch_statistics.
        self.momentum: float | None = 0.1
        self.ddof = 1
        self.policy: NanPolicy = "propagate"
        self.tracks = self.updates = True
        self.by_batch: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"seen": None}

    @property
    def shown(self) -> Any:
        """The statistics as the layer shows them: all are None if it does not track them."""
        absent: Any = (None,) * 3
        return self.values if self.tracks else Running(*absent)

    def normalizes_by_batch(self, training: bool) -> bool:
        """Whether a batch is normalized with its own statistics."""
        if not self.tracks:
            return True
        return training if self.by_batch is None else self.by_batch

    def weight(self, before: Running) -> float:
        """Return the weight of the next batch in the running statistics."""
        return 1 / (before.batches + 1) if self.momentum is None else self.momentum

    def after(self, before: Running, batch: Moments) -> Running:
        """Return the statistics after one more batch, or `before` if the NaN policy skips it."""
        if not isinstance(batch, SampleMoments):
            check_degrees(batch.count, self.ddof)
        weight = self.weight(before)
        mean, var = functional.absorb(before.mean, before.var, batch, weight, self.ddof)
        return self._settle(before, Running(mean, var, before.batches + 1))

    def _settle(self, before: Running, after: Running) -> Running:
        """Return `after`; if it is not finite, do what the NaN policy asks for."""
        if self.policy == "propagate":
            return after
        spoilt = np.flatnonzero(~(np.isfinite(after.mean) & np.isfinite(after.var)))
        if not spoilt.size:
            return after
        if self.policy == "skip":
            return before
        c = spoilt[0]
        raise FloatingPointError(
            f"x would make the running statistics of channel {c} mean {after.mean[c]} and "
            f"variance {after.var[c]}; {spoilt.size} of {after.mean.size} channels are not finite. "
            "Look for NaN and infinity in x, or choose another nan_policy. If they were not "
            "finite before, call reset_running_stats()"
        )

    # The next two methods compute the result first, and then take the lock to store it. If another
    # thread has stored a result in the meantime, they compute again from that. While a method has
    # the lock it makes no call and runs no loop, so that Python cannot be interrupted or change
    # threads: all of the result is stored, or none.

    def learn(
        self, before: Running, moved: Running | None, batch: Moments, layer: Any, saved: Any
    ) -> None:
        """Update the statistics, and keep in the layer what its backward needs.

        `moved` is `before` updated by `batch`, or None if that has not been computed.
        """
        while True:
            if moved is None:
                after = self.after(before, batch)
            else:
                after = moved if self.policy == "propagate" else self._settle(before, moved)
            seen = self.seen if after is before else (batch, before)
            with _runtime.turn:
                if self.values is before:
                    self.values, self.seen, layer._saved = after, seen, saved
                    return
            before, moved = self.values, None

    def replace(self, **parts: Any) -> None:
        """Replace the statistics that are given by name."""
        while True:
            before = self.values
            after = before._replace(**parts)
            with _runtime.turn:
                if self.values is before:
                    self.values = after
                    return

    def state(self) -> dict[str, NDArray[Any]]:
        """Return copies of the statistics by name, or an empty dict if there are none."""
        if not self.tracks:
            return {}
        mean, var, batches = self.values
        copies = mean.copy(), var.copy(), np.array(batches, np.int64)
        return dict(zip(NAMES, copies, strict=True))

    def given(self, state: Mapping[str, Any], eps: float) -> Running:
        """Return the statistics in `state`, and the present ones for keys that it lacks."""
        found: Any = zip(NAMES, self.values, strict=True)
        return Running(*(self.checked(n, state[n], eps) if n in state else old for n, old in found))

    def checked(self, name: str, value: Any, eps: float) -> Any:
        """Return a checked copy of a value for the statistic `name`."""
        if not self.tracks:
            raise AttributeError(f"{name} cannot be set: track_running_stats is False")
        if name == "num_batches_tracked":
            return _state.batches(value)
        mean = self.values.mean
        own = _state.array(name, value, mean.shape, mean.dtype)
        return _state.finite(name, own, eps if name == "running_var" else None)
