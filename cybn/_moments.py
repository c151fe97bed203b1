"""`Moments`: the count, mean and M2 of each channel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _dispatch
from ._arguments import channel_axis
from ._counts import Count, Immutable, counted, frozen, is_nothing, parts_of, short, vector
from ._measuring import Progress, float_array, measured, selected
from ._merging import Part, deviation_of, merged, share_of
from ._runtime import thread_count

__all__ = ["Moments"]

Vector: TypeAlias = NDArray[np.float64]


class Moments(Immutable):
    """Count, mean and centred sum of squares of each channel. Immutable.

    `empty` and `update` collect statistics of data of any size, and `merge` combines those of
    several parts or processes. Each returns a new object.

    Parameters
    ----------
    count : int, float, or array_like of shape (C,)
        The number of values of each channel, N * S. With weights it is their sum, a float. It is an
        array if a mask or weights differ by channel.
    mean : array_like, shape (C,)
        Mean of each channel, copied as float64.
    m2 : array_like, shape (C,)
        Sum of squared deviations from the mean, so that ``m2 / count`` is the biased variance. It
        is copied as float64.

    Raises
    ------
    TypeError
        If `count`, `mean` or `m2` does not consist of numbers, or is masked.
    ValueError
        If `count` or an `m2` is negative, `count` is not finite, or `mean` and `m2` are not
        vectors of the same length.

    Notes
    -----
    New values are first measured by themselves and then merged, so sums stay short. The rounding
    error of the mean is stored and added back, so it does not grow with the number of parts.
    docs/statistics.md has figures.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn import Moments
    >>> a = Moments(2, [1.0], [2.0])
    >>> a.merge(Moments(2, [5.0], [2.0]))
    Moments(count=4, mean=[3.], var=[5.])
    >>> m = Moments.empty(1)
    >>> for chunk in ([[0.0], [2.0]], [[4.0], [6.0]]):
    ...     m = m.update(chunk)
    >>> m
    Moments(count=4, mean=[3.], var=[5.])
    """

    __slots__ = ("_rest", "_std", "count", "m2", "mean")

    count: Count
    mean: Vector
    m2: Vector
    _rest: Vector | None  # rounding error of the mean; None means 0
    _std: Vector  # set only if an m2 overflows float64 and the deviation is known

    def __init__(self, count: Count, mean: ArrayLike, m2: ArrayLike) -> None:
        mean, m2 = vector(mean, "mean"), vector(m2, "m2")
        if mean.shape != m2.shape:
            raise ValueError(
                f"mean has shape {mean.shape} and m2 has shape {m2.shape}; they must be the same"
            )
        if (m2 < 0).any():
            raise ValueError(f"m2 is {m2.min()} in channel {m2.argmin()}; it must not be negative")
        self._put(counted(count, mean.size), frozen(mean), frozen(m2), None)

    def _put(self, *values: Any) -> None:
        for name, value in zip(("count", "mean", "m2", "_rest"), values, strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def _adopt(cls, count: Count, mean: Any, m2: Any, rest: Any = None, std: Any = None) -> Self:
        """Return moments of arrays that nothing else will write to, without a copy."""
        for array in (count, mean, m2):
            if isinstance(array, np.ndarray):
                array.setflags(write=False)
        self = cls.__new__(cls)
        self._put(count, mean, m2, rest)
        return self._tell(std)

    def _tell(self, std: Vector | None) -> Self:
        """Store the standard deviations if an m2 overflows float64; return these moments."""
        if std is not None and np.isinf(self.m2).any():
            object.__setattr__(self, "_std", std)
        return self

    def _told(self) -> Vector | None:
        """Return the standard deviations if they are stored, otherwise None."""
        return getattr(self, "_std", None)

    @classmethod
    def empty(cls, channels: int) -> Moments:
        """Return the moments of no values: count, mean and M2 are 0.

        Parameters
        ----------
        channels : int
            C.
        """
        return cls(0, np.zeros(channels), np.zeros(channels))

    def __len__(self) -> int:
        """Return the number of channels, C."""
        return self.mean.size

    def var(self, ddof: int = 0) -> NDArray[np.float64]:
        """Return the variance of each channel, ``m2 / (count - ddof)``.

        Parameters
        ----------
        ddof : int, default 0
            0 for the biased variance, which is used to normalize; 1 for the unbiased one, which is
            used for the running variance. With weights, use 1 if a weight is the number of times a
            value was seen, and 0 if it is a measure of trust in the value.

        Returns
        -------
        ndarray of float64, shape (C,)
            A new array. If counts differ by channel, it is NaN where ``count - ddof`` is at most 0.

        Raises
        ------
        ValueError
            If ``count - ddof`` is not positive and all channels have one count.
        """
        degrees = self._degrees(ddof)
        if isinstance(degrees, np.ndarray):
            var: Vector = np.full(len(self), np.nan)
            return np.divide(self.m2, degrees, out=var, where=degrees > 0)
        if degrees <= 0:
            raise ValueError(
                f"the variance with ddof={ddof} needs a count of more than {self.count - degrees}, "
                f"and count is {self.count}"
            )
        return self.m2 / degrees

    def std(self, ddof: int = 0) -> NDArray[np.float64]:
        """Return the standard deviation of each channel, the square root of `var`."""
        deviation: Vector = np.sqrt(self.var(ddof))
        if (told := self._told()) is None:
            return deviation
        with np.errstate(all="ignore"):
            told = told * np.sqrt(self.count / self._degrees(ddof))
        return np.where(np.isinf(deviation), told, deviation)

    def __add__(self, other: object) -> Moments:
        """Return the moments of both, as `merge` does, so that `sum` takes a list of moments."""
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def __radd__(self, other: object) -> Moments:
        """Return these moments if `other` is the 0 that `sum` begins with."""
        return self if type(other) is int and other == 0 else NotImplemented

    def _degrees(self, ddof: int) -> Count:
        """Return the divisor of M2 in the variance."""
        return self.count - ddof

    def update(
        self,
        x: ArrayLike,
        *,
        axis: int = 1,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        progress: Progress | None = None,
        num_threads: int | None = None,
    ) -> Moments:
        """Return the moments of the values so far and those of `x` together.

        This object does not change: write ``m = m.update(x)``.

        Parameters
        ----------
        x : array_like of float32, float64, float16 or bfloat16, at least 2 axes
            It may be larger than memory: a `numpy.memmap`, a dataset of h5py or zarr, or any other
            array that is read by slices. It is read in pieces of at most 4 million values (or one
            position of all channels, if those are more). It may be empty.
        axis : int, default 1
            The channel axis. Negative numbers count from the end.
        mask : array_like of bool, optional
            True for values that are used; others are ignored, and may be NaN. With as many axes as
            `x`, it is broadcastable to `x`, and may differ by channel. With fewer, it applies to
            all channels, as in `batch_norm`, and is broadcastable to the shape of `x` without the
            channel axis, such as (N, L) for (N, C, L) and (N, L, C).
        weights : array_like, optional
            How often each value counts: not negative, with a shape as for `mask`, of any float or
            integer type. The count is then a float, the sum of the weights. They may be larger than
            memory, too.
        lengths : array_like of int, shape (N,), optional
            How many positions of each sample are used, from the front, along the first axis that is
            neither samples nor channels: L in (N, C, L) and, with ``axis=-1``, in (N, L, C). With a
            mask as well, a value must be used by both.
        progress : callable, optional
            Given the pieces, an iterable with a length, it returns an iterable over them, and
            may draw a bar: `tqdm.tqdm`, or a `functools.partial` of it.
        num_threads : int, optional
            Threads for this call. None means `cybn.get_num_threads`. Results are bitwise identical
            for any number.

        Returns
        -------
        Moments
            Its count is an array if `mask` or `weights` has size C along the channel axis, and C is
            more than 1.

        Raises
        ------
        TypeError
            If `x` has another dtype, `mask` is not bool, or `lengths` are not integers. Convert
            integer data, such as images, piece by piece:
            ``for piece in x: m = m.update(piece.astype(np.float32), axis=...)``.
        ValueError
            If `x` has fewer than 2 axes or another number of channels, a mask, weights or lengths
            do not fit it, a weight is negative or not finite, or their sum is not finite. This
            object never changes.

        Notes
        -----
        Pieces are cut along the outermost axis in memory and merged in order. A piece has up to
        262144 values, or 32 per channel if that is more. A single index of the axis that has more
        values is a piece by itself, and is cut further above 4 million values. Pieces depend only
        on shape and strides. Each is measured in float64, also for float32 data. For float64 data
        in one piece, the result is bitwise identical to that of `cybn.moments`. Otherwise the last
        bits may differ.
        """
        data = float_array(x)
        axis = channel_axis(data, axis)
        if data.shape[axis] != len(self):
            raise ValueError(
                f"x has shape {data.shape}, with {data.shape[axis]} channels on axis {axis}; "
                f"these moments have {len(self)}"
            )
        selection = selected(data.shape, axis, mask, weights, lengths)
        threads = thread_count(num_threads)
        if data.size == 0:
            return self
        pieces = measured(data, axis, selection, threads, progress)
        parts = (Moments._adopt(count, mean, m2, std=std) for count, mean, m2, std in pieces)
        return reduce(Moments.merge, parts, self)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both samples together; neither is changed.

        The formula is that of Chan, Golub and LeVeque (1979). Counts are exact. Rounding
        depends on the order, so merge in a fixed order to get the same bits on every run.

        Parameters
        ----------
        other : Moments
            Moments of another sample of the same C channels.

        Returns
        -------
        Moments
            `other` itself if this object has count 0, and this object if `other` has count 0.

        Raises
        ------
        TypeError
            If `other` is not a `Moments`.
        ValueError
            If the numbers of channels differ.
        OverflowError
            If a count would be too large for its type (int64, if each channel has its own count).
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other is of type {type(other).__name__}; it must be Moments")
        if type(other) is not type(self) and not is_nothing(self.count):
            raise TypeError(
                f"other is of type {type(other).__name__}, which has the statistics within samples "
                "of an instance norm; merge it only with others of that kind"
            )
        if len(self) != len(other):
            raise ValueError(f"other has {len(other)} channels; it must have {len(self)}")
        if is_nothing(self.count):
            return other
        if is_nothing(other.count):
            return self
        both = Moments._adopt(*merged(self._parts(), other._parts()))
        if np.isinf(both.m2).any():
            ours, theirs = ((m.mean, m._parts()[3], m.std()) for m in (self, other))
            both._tell(deviation_of(ours, theirs, share_of(other.count, both.count)))
        return both

    def _parts(self) -> Part:
        return self.count, self.mean, self.m2, 0.0 if self._rest is None else self._rest

    def allreduce(self, comm: Any) -> Moments:
        """Return the moments of the samples of all processes taken together.

        Every process must call it. All get the same bits, because all merge in the order of the
        ranks.

        Parameters
        ----------
        comm : object with a method ``allgather``
            For example `mpi4py.MPI.COMM_WORLD`, or a `cybn.mpi.Ranks`, which waits for a limited
            time only. The method takes a value and returns the list of the values of all processes.

        Returns
        -------
        Moments
            The same in every process.

        Raises
        ------
        TypeError
            If `comm` has no such method, or another process did not pass a `Moments`.
        ValueError, OverflowError
            As in `merge`, in every process.
        """
        if not hasattr(comm, "allgather"):
            raise TypeError(
                f"comm is of type {type(comm).__name__}; it must have a method allgather, as "
                "mpi4py.MPI.COMM_WORLD has"
            )
        parts: list[Moments] = comm.allgather(self)
        return reduce(lambda one, other: one.merge(other), parts)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return what `from_state_dict` needs, as plain arrays, for example for `numpy.savez`.

        Returns
        -------
        dict of str to ndarray
            Copies: ``count`` of shape () or (C,) as int64 or float64; ``mean``, ``m2`` and
            ``rest`` (the rounding error of the mean) of shape (C,) as float64. If an ``m2`` is
            infinite because it overflows float64, there is also ``std``.

        Raises
        ------
        OverflowError
            If the count is 2**63 or more.
        """
        count = np.array(self.count, np.int64 if isinstance(self.count, int) else None)
        rest = np.zeros(len(self)) + self._parts()[3]
        parts = {"count": count, "mean": self.mean.copy(), "m2": self.m2.copy(), "rest": rest}
        told = self._told()
        return parts if told is None else parts | {"std": told.copy()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Moments:
        """Return the moments that `state_dict` was called on.

        Parameters
        ----------
        state : mapping of str to array_like
            With the keys of `state_dict`. ``rest`` is 0 if it is missing. Values are copied.

        Raises
        ------
        ValueError
            If a key is missing or unexpected, or a value is not valid for `Moments`.
        TypeError
            If `state` is not a mapping, or a value does not consist of numbers.
        """
        count, mean, m2, rest, std = parts_of(state)
        given = cls(count, mean, m2)
        rest, std = (None if value is None else frozen(value) for value in (rest, std))
        return cls._adopt(given.count, given.mean, given.m2, rest, std)

    def __eq__(self, other: object) -> bool:
        """Return whether counts, means and M2 are the same numbers (NaN equals NaN)."""
        if not isinstance(other, Moments):
            return NotImplemented
        ours, theirs = ((m.mean, m.m2, getattr(m, "_std", ())) for m in (self, other))
        same = (np.array_equal(*two, equal_nan=True) for two in zip(ours, theirs, strict=True))
        return np.array_equal(self.count, other.count) and all(same)

    __hash__ = None  # type: ignore[assignment]  # equal by value, and arrays have no hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Moments._adopt, (self.count, self.mean, self.m2, self._rest, self._told())

    def __repr__(self) -> str:
        var = self.m2 if is_nothing(self.count) else self.var()
        numbers = f"count={short(self.count)}, mean={short(self.mean)}, var={short(var)}"
        return f"{type(self).__name__}({numbers})"


_dispatch.use_moments(Moments)
