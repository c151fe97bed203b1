"""Count, mean and M2 per channel: the one type for statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Moments"]


def _frozen(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return a read-only float64 copy of `values`, which must be one-dimensional."""
    array = np.array(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; it must have shape (C,)")
    array.setflags(write=False)
    return array


class Moments:
    """Count, mean and centred sum of squares of each channel. Immutable.

    Parameters
    ----------
    count : int
        How many values each channel has: N * S.
    mean : array_like, shape (C,)
        Mean of each channel. Copied, held as float64.
    m2 : array_like, shape (C,)
        Sum of squared deviations from the mean, so that ``m2 / count`` is the biased
        variance. Copied, held as float64.

    Raises
    ------
    TypeError
        If `count` is no integer.
    ValueError
        If `count` or an `m2` is negative, or `mean` and `m2` are not vectors of one length.

    Examples
    --------
    >>> import numpy as np
    >>> from cybn import Moments
    >>> a = Moments(2, [1.0], [2.0])
    >>> a.merge(Moments(2, [5.0], [2.0]))
    Moments(count=4, mean=[3.], var=[5.])
    """

    __slots__ = ("count", "m2", "mean")

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    def __init__(self, count: int, mean: ArrayLike, m2: ArrayLike) -> None:
        if not hasattr(count, "__index__"):
            raise TypeError(f"count is {count!r}; it must be an int")
        if count < 0:
            raise ValueError(f"count is {count}; it must not be negative")
        mean, m2 = _frozen(mean, "mean"), _frozen(m2, "m2")
        if mean.shape != m2.shape:
            raise ValueError(
                f"mean has shape {mean.shape} and m2 has shape {m2.shape}; they must be the same"
            )
        if (m2 < 0).any():
            raise ValueError(f"m2 is {m2.min()} in channel {m2.argmin()}; it must not be negative")
        self._set(int(count), mean, m2)

    def _set(self, count: int, mean: NDArray[np.float64], m2: NDArray[np.float64]) -> None:
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "m2", m2)

    @classmethod
    def _adopt(cls, count: int, mean: NDArray[np.float64], m2: NDArray[np.float64]) -> Moments:
        """Wrap two fresh float64 vectors that no one else will write to, without a copy."""
        self = cls.__new__(cls)
        mean.setflags(write=False)
        m2.setflags(write=False)
        self._set(count, mean, m2)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Moments is immutable: {name} cannot be set; make a new one")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Moments is immutable: {name} cannot be deleted")

    def __len__(self) -> int:
        """Return the number of channels, C."""
        return self.mean.size

    def var(self, ddof: int = 0) -> NDArray[np.float64]:
        """Return the variance of each channel, ``m2 / (count - ddof)``.

        Parameters
        ----------
        ddof : int, default 0
            0 for the biased variance, which normalizes; 1 for the unbiased one, which the
            running variance keeps.

        Returns
        -------
        ndarray of float64, shape (C,)
            A new array.

        Raises
        ------
        ValueError
            If ``count - ddof`` is not positive.
        """
        if self.count - ddof <= 0:
            raise ValueError(
                f"the variance with ddof={ddof} needs more than {ddof} values a channel, "
                f"and count is {self.count}"
            )
        return self.m2 / (self.count - ddof)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of the two samples taken together; neither is changed.

        The formula is that of Chan, Golub and LeVeque (1979). Counts are exact. Rounding
        depends on the order, so merge in a fixed one for the same bits on every run.

        Parameters
        ----------
        other : Moments
            Moments of another sample of the same C channels.

        Returns
        -------
        Moments
            ``other`` itself where this one has count 0, and the other way round.

        Raises
        ------
        TypeError
            If `other` is no `Moments`.
        ValueError
            If the numbers of channels differ.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other is of type {type(other).__name__}; it must be Moments")
        if len(self) != len(other):
            raise ValueError(f"other has {len(other)} channels; it must have {len(self)}")
        if self.count == 0:
            return other
        if other.count == 0:
            return self
        count = self.count + other.count
        with np.errstate(all="ignore"):  # infinite means give NaN, and stay visible
            delta = other.mean - self.mean
            mean = self.mean + delta * (other.count / count)
            m2 = self.m2 + other.m2 + delta**2 * (self.count * (other.count / count))
        return Moments._adopt(count, mean, m2)

    def __eq__(self, other: object) -> bool:
        """Whether counts, means and M2 are the same numbers (NaN equals NaN)."""
        if not isinstance(other, Moments):
            return NotImplemented
        return (
            self.count == other.count
            and np.array_equal(self.mean, other.mean, equal_nan=True)
            and np.array_equal(self.m2, other.m2, equal_nan=True)
        )

    __hash__ = None  # type: ignore[assignment]  # equal by value, and arrays have no hash

    def __reduce__(self) -> tuple[type[Moments], tuple[Any, ...]]:
        return Moments, (self.count, self.mean, self.m2)

    def __copy__(self) -> Moments:
        return self

    def __deepcopy__(self, memo: object) -> Moments:
        return self

    def __repr__(self) -> str:
        def short(v: NDArray[np.float64]) -> str:
            return np.array2string(v, precision=6, threshold=6, edgeitems=3, separator=", ")

        var = self.var() if self.count else self.m2
        return f"Moments(count={self.count}, mean={short(self.mean)}, var={short(var)})"
