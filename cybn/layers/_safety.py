"""Looking without touching, and going back: preview, snapshot, restore, drift."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from numpy.typing import ArrayLike, NDArray

from .. import _runtime
from ..moments import Moments
from . import _drift
from ._drift import Drift
from ._passes import Passes
from ._running import Running
from ._trials import Trial

__all__ = ["Safety", "Snapshot"]


class Snapshot(NamedTuple):
    """What `BatchNorm.snapshot` took: give it to `BatchNorm.restore`, and change nothing in it."""

    affine: list[NDArray[Any]]  # gamma, beta and their gradients, or nothing
    running: Running
    training: bool
    switches: tuple[bool, bool | None, bool]
    tracks: bool
    seen: tuple[Moments, Running] | None


def _copy(seen: tuple[Moments, Running] | None) -> tuple[Moments, Running] | None:
    return None if seen is None else (seen[0], seen[1].copy())


class Safety(Passes):
    """What a layer offers beside training and inference; a part of `BatchNorm`."""

    def preview(self) -> Trial[Self]:
        """Run forwards in training mode that leave no trace, within a ``with`` block.

        A forward in it normalizes as in training, whatever the mode. Running statistics,
        `num_batches_tracked`, the mode and what the last real forward left for `backward` stay as
        they are; `backward` itself raises. The switches hold: a layer that is frozen, or has
        `use_batch_statistics` set, normalizes as it does in training, by the statistics it is
        told. Holds for the calling thread (or task) alone: others may go on training the layer.
        It ends with the block, also where an interrupt comes on the way in or out.

        Returns
        -------
        context manager
            For one ``with`` block; gives the layer.

        Examples
        --------
        >>> import numpy as np
        >>> from cybn import BatchNorm
        >>> bn = BatchNorm(1)
        >>> with bn.preview():
        ...     y = bn(np.array([[1.0], [3.0]]))
        >>> bn.num_batches_tracked
        0
        """
        return Trial(self, training=True)

    def snapshot(self) -> Snapshot:
        """Return a copy of gamma, beta, gradients, running statistics, mode and switches.

        Unlike a state dict it holds all that training changes, NaN included, and fits this layer
        or a copy of it. Settings, such as `momentum` and `renorm`, are not in it.
        """
        with _runtime.turn:
            running, seen = self._running, self._seen
        affine = [array.copy() for array in self._arrays()]
        mode, tracks = self.training, self._track_running_stats
        return Snapshot(affine, running.copy(), mode, self._switches(), tracks, _copy(seen))

    def restore(self, snapshot: Snapshot) -> Self:
        """Go back to a snapshot, to the bit; return the layer.

        gamma, beta and their gradients are written to in place. A forward since then can no
        longer be followed by a backward.

        Parameters
        ----------
        snapshot : Snapshot
            From `snapshot` of this layer, or of one made alike. May be used again.

        Raises
        ------
        TypeError
            If it is no snapshot.
        ValueError
            If it is that of another kind of layer. The layer is unchanged.
        """
        if not isinstance(snapshot, Snapshot):
            raise TypeError(
                f"snapshot is of type {type(snapshot).__name__}; it must come from snapshot()"
            )
        own = [*self._arrays(), self._running.mean]
        theirs = [*snapshot.affine, snapshot.running.mean]
        if [(a.shape, a.dtype) for a in own] != [(a.shape, a.dtype) for a in theirs]:
            raise ValueError(
                "snapshot is that of a layer with another num_features, affine or dtype"
            )
        if snapshot.tracks is not self._track_running_stats:
            raise ValueError(
                f"snapshot is that of a layer with track_running_stats={snapshot.tracks}; here it "
                f"is {self._track_running_stats}"
            )
        arrays = self._own(self._names + self._gradient_names)
        running, seen = snapshot.running.copy(), _copy(snapshot.seen)
        with _runtime.turn:  # and neither a call nor a loop in it, as in `_learn`
            if arrays:
                arrays[0][...], arrays[1][...], arrays[2][...], arrays[3][...] = snapshot.affine
            self._running, self._seen, self._saved = running, seen, None
            self.training = snapshot.training
            self.update_statistics, self.use_batch_statistics, self.train_affine = snapshot.switches
        return self

    def drift(self, data: ArrayLike | Moments | None = None) -> Drift:
        """Measure how far the statistics of a batch lie from the running ones, per channel.

        Parameters
        ----------
        data : array_like, Moments, or None
            A batch, or its moments, to compare with the running statistics as they are now. None:
            the last batch that moved them, against what they were before it. An instance norm
            compares the mean over the samples of their means and variances, as it learns them.

        Returns
        -------
        Drift
            ``shift``, in running standard deviations, and ``log_variance_ratio``. Variances are
            unbiased or not as `running_ddof` says.

        Raises
        ------
        RuntimeError
            If the layer has no running statistics, or `data` is None and no batch has moved
            them.
        TypeError, ValueError
            If `data` is not a batch that the layer takes, or moments of other channels, or
            statistics within samples where this is no instance norm.
        """
        if not self.track_running_stats:
            raise RuntimeError("drift needs running statistics; track_running_stats is False")
        if data is None:
            seen = self._seen
            if seen is None:
                raise RuntimeError(
                    "no batch has moved the running statistics since the layer was made, loaded "
                    "or copied; give drift a batch, or its Moments"
                )
            batch, running = seen
        else:
            batch, running = self._moments_of(data), self._running
        return _drift.measure(batch, running, self.running_ddof, self.eps)

    def _moments_of(self, data: ArrayLike | Moments) -> Moments:
        """Return the moments of a batch, which may be given as such; of this layer's channels."""
        if not isinstance(data, Moments):
            return self._measure(self._admit(data), False, None)
        self._refuse_within_samples("data", data)
        if len(data) != self.num_features:
            raise ValueError(
                f"data has {len(data)} channels; this layer has num_features={self.num_features}"
            )
        return data
