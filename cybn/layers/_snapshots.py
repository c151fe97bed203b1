"""Snapshot, restore and drift of a layer."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _runtime
from .._moments import Moments
from ._running import Running

__all__ = ["Drift", "Snapshot", "drift", "restore", "snapshot"]

Layer = TypeVar("Layer", bound=Any)


class Snapshot(NamedTuple):
    """The result of `BatchNorm.snapshot`, for `BatchNorm.restore`. It must not be changed."""

    affine: list[NDArray[Any]]  # gamma, beta and their gradients, or nothing
    running: Running
    training: bool
    switches: tuple[bool, bool | None, bool]
    tracks: bool
    seen: tuple[Moments, Running] | None


class Drift(NamedTuple):
    """The differences between a batch and the running statistics, per channel.

    Attributes
    ----------
    shift : ndarray of float64, shape (C,)
        ``(mean - running_mean) / sqrt(running_var + eps)``: in inference the normalized batch
        has this mean instead of 0.
    log_variance_ratio : ndarray of float64, shape (C,)
        ``log((var + eps) / (running_var + eps))``: 0 if they agree, 0.69 if the batch has twice the
        variance, -0.69 if it has half.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> drift = cybn.BatchNorm(1).drift(np.array([[1.0], [3.0]]))  # against mean 0, variance 1
    >>> drift.shift.round(2), drift.beyond(shift=1)
    (array([2.]), array([0]))
    """

    shift: NDArray[np.float64]
    log_variance_ratio: NDArray[np.float64]

    def beyond(self, shift: float = 1.0, log_variance_ratio: float = 1.0) -> NDArray[np.intp]:
        """Return the channels whose drift exceeds a limit or is NaN.

        Parameters
        ----------
        shift, log_variance_ratio : float, default 1
            The largest absolute values that are acceptable.
        """
        near = np.abs(self.shift) <= shift
        near &= np.abs(self.log_variance_ratio) <= log_variance_ratio
        return np.flatnonzero(~near)


def snapshot(self: Any) -> Snapshot:
    """Return a copy of gamma, beta, gradients, running statistics, mode and switches.

    Unlike a state dict, it contains everything that training changes, NaN included. `restore` of
    this layer or of a copy takes it. It does not contain settings such as `momentum` and `renorm`.
    """
    statistics = self._running
    with _runtime.turn:
        running, seen = statistics.values, statistics.seen
    affine = [getattr(self, f"_{name}").copy() for name in _names(self)]
    switches = statistics.updates, statistics.by_batch, self._train_affine
    seen = None if seen is None else (seen[0], seen[1].copy())
    return Snapshot(affine, running.copy(), self.training, switches, statistics.tracks, seen)


def _names(layer: Any) -> list[str]:
    """Return the names of parameters and gradients, whether they are trained or not."""
    return [*layer._names, *(f"grad_{name}" for name in layer._names)]


def restore(self: Layer, snapshot: Snapshot) -> Layer:
    """Restore a snapshot exactly; return the layer.

    gamma, beta and their gradients are written in place. Afterwards `backward` needs a new forward.

    Parameters
    ----------
    snapshot : Snapshot
        From `snapshot` of this layer, or of one with the same settings. It may be used again.

    Raises
    ------
    TypeError, ValueError
        If it is not a snapshot, or that of another kind of layer. The layer is unchanged.
    """
    if not isinstance(snapshot, Snapshot):
        raise TypeError(
            f"snapshot is of type {type(snapshot).__name__}; it must come from snapshot()"
        )
    statistics, arrays = self._running, self._own(_names(self))
    own = [*arrays, statistics.values.mean]
    theirs = [*snapshot.affine, snapshot.running.mean]
    if [(a.shape, a.dtype) for a in own] != [(a.shape, a.dtype) for a in theirs]:
        raise ValueError("snapshot is that of a layer with another num_features, affine or dtype")
    if snapshot.tracks is not statistics.tracks:
        raise ValueError(
            f"snapshot is that of a layer with track_running_stats={snapshot.tracks}; here it "
            f"is {statistics.tracks}"
        )
    running, seen = snapshot.running.copy(), snapshot.seen
    seen = None if seen is None else (seen[0], seen[1].copy())
    with _runtime.turn:  # no call and no loop within it, as in `RunningStatistics.learn`
        if arrays:
            arrays[0][...], arrays[1][...], arrays[2][...], arrays[3][...] = snapshot.affine
        statistics.values, statistics.seen, self._saved = running, seen, None
        self._training = snapshot.training
        statistics.updates, statistics.by_batch, self._train_affine = snapshot.switches
    return self


def drift(self: Any, data: ArrayLike | Moments | None = None) -> Drift:
    """Compare the statistics of a batch with the running statistics, per channel.

    The result does not depend on the mode or on switches such as `use_batch_statistics`.

    Parameters
    ----------
    data : array_like, Moments, or None
        A batch, or its moments, to compare with the present running statistics. None means the last
        batch that updated them, compared with the statistics before it. An instance norm compares
        the averages, over the samples, of the means and variances within samples.

    Returns
    -------
    Drift
        ``shift``, in running standard deviations, and ``log_variance_ratio``. `running_ddof`
        decides whether variances are unbiased.

    Raises
    ------
    RuntimeError
        If the layer has no running statistics, or `data` is None and no batch has updated them.
    TypeError, ValueError
        If `data` does not fit the layer, or holds the within-sample statistics of an instance norm
        and this layer is not one.
    """
    statistics = self._running
    if not statistics.tracks:
        raise RuntimeError("drift needs running statistics; track_running_stats is False")
    if data is None:
        seen = statistics.seen
        if seen is None:
            raise RuntimeError(
                "no batch has updated the running statistics since the layer was made, loaded "
                "or copied; give drift a batch, or its Moments"
            )
        batch, running = seen
    else:
        running = statistics.values
        batch = data if isinstance(data, Moments) else self._measure(self._admit(data))
        self._refuse_within_samples("data", batch)
        if len(batch) != self.num_features:
            raise ValueError(
                f"data has {len(batch)} channels; this layer has num_features={self.num_features}"
            )
    with np.errstate(all="ignore"):
        var = running.var.astype(np.float64) + self._eps
        shift = (batch.mean - running.mean) / np.sqrt(var)
        return Drift(shift, np.log((batch.var(statistics.ddof) + self._eps) / var))
