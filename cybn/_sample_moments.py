"""Statistics within samples, as an instance norm collects in its running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._arguments import check_mapping, integer
from ._counts import is_nothing
from ._merging import between, sum_of
from ._moments import Moments

__all__ = ["SampleMoments"]


class SampleMoments(Moments):
    """Moments of each channel within samples, without the differences between samples.

    The variance is the average of the variances of the samples, as an instance norm computes them.
    `count` and `mean` are those of all values. `m2` is the sum of the squared deviations of the
    values, each from the mean of its sample. Samples are weighted by their size.

    Parameters
    ----------
    count : int
        How many values each channel has, in all samples together.
    mean, m2 : array_like, shape (C,)
        As in `Moments`.
    samples : int
        The number of samples: at least 1 and at most `count`, or 0 if `count` is 0.

    Raises
    ------
    TypeError, ValueError
        As in `Moments`, and if `count` or `samples` is not a number as described above.
    """

    __slots__ = ("samples",)

    samples: int

    def __init__(self, count: Any, mean: ArrayLike, m2: ArrayLike, samples: int) -> None:
        super().__init__(count, mean, m2)
        if isinstance(self.count, np.ndarray):
            raise ValueError(
                f"count has shape {self.count.shape}; within samples it must be one number, "
                "because all channels have the same number of values"
            )
        samples = integer("samples", samples)
        least = int(not is_nothing(self.count))
        if not least <= samples <= self.count:
            raise ValueError(
                f"samples is {samples}; with count {self.count} it must be at least {least} and "
                "at most count"
            )
        object.__setattr__(self, "samples", samples)

    @classmethod
    def empty(cls, channels: int) -> SampleMoments:
        """Return the moments of no samples, to which others can be merged: all numbers are 0.

        Parameters
        ----------
        channels : int
            C.
        """
        return cls(0, np.zeros(channels), np.zeros(channels), 0)

    @classmethod
    def of(cls, each: Moments, channels: int) -> SampleMoments:
        """Pool the moments of N * C rows; samples are weighted by their size."""
        mean, m2 = (v.reshape(-1, channels) for v in (each.mean, each.m2))
        sizes = np.broadcast_to(each.count, len(each)).reshape(-1, channels)[:, :1]
        count = int(sizes.sum())
        weights = sizes / max(1, count)
        with np.errstate(all="ignore"):
            pooled = np.where(sizes, mean, 0).mean(0)
            if isinstance(each.count, np.ndarray) or not np.isfinite(pooled).all():
                # Sizes differ, or the sum overflows float64 although the mean does not.
                pooled = (np.where(sizes, mean, 0) * weights).sum(0)
            both = _restore(count, pooled, m2.sum(0), int(np.count_nonzero(sizes)))
            if not np.isinf(both.m2).any():
                return both
            stds = np.where(sizes, each.std().reshape(-1, channels), 0) * np.sqrt(weights)
            return both._tell(np.hypot.reduce(stds, axis=0))

    def _degrees(self, ddof: int) -> Any:
        return self.count - ddof * self.samples  # each sample has a mean of its own

    def update(self, x: ArrayLike, **options: Any) -> NoReturn:
        """Raise TypeError, because these moments come from `population_statistics` and `merge`.

        For each part x of the data call
        ``m = m.merge(cybn.population_statistics(norm, [x])[norm])``. For all parts at once call
        ``cybn.population_statistics(norm, parts)[norm]``.
        """
        raise TypeError(
            "statistics within samples have no update; measure with the instance norm they are "
            "for, and merge: m = m.merge(cybn.population_statistics(norm, [x])[norm])"
        )

    def merge(self, other: Moments) -> SampleMoments:
        """Return the moments of these samples and others taken together; neither is changed.

        Parameters
        ----------
        other : SampleMoments
            It has the same C channels. `Moments` of no values are accepted, too.

        Raises
        ------
        TypeError
            If `other` is not a `SampleMoments`.
        ValueError
            If the numbers of channels differ.
        OverflowError
            If the counts are too large to be added.
        """
        if not isinstance(other, SampleMoments):
            if isinstance(other, Moments) and is_nothing(other.count) and len(other) == len(self):
                return self
            raise TypeError(
                f"other is of type {type(other).__name__}; these are statistics within samples, "
                "of an instance norm, and merge only with others of that kind"
            )
        if len(self) != len(other):
            raise ValueError(f"other has {len(other)} channels; it must have {len(self)}")
        if is_nothing(self.count):
            return other
        if is_nothing(other.count):
            return self
        count = sum_of(self.count, other.count)
        with np.errstate(all="ignore"):
            mean = between(self.mean, other.mean, other.count / count)
            m2 = self.m2 + other.m2
            std = np.hypot(*(m._within() * np.sqrt(m.count / count) for m in (self, other)))
        return _restore(count, mean, m2, self.samples + other.samples, std)

    def _within(self) -> NDArray[np.float64]:
        """Return the standard deviation about the means of the samples, biased."""
        told = self._told()
        return np.sqrt(self.m2 / self.count) if told is None else told

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the `state_dict` of `Moments`, with ``samples`` added."""
        return super().state_dict() | {"samples": np.array(self.samples)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> SampleMoments:
        """Return the moments that `state_dict` was called on; errors are those of `Moments`."""
        check_mapping(state)
        given = dict(state)
        samples = np.asarray(given.pop("samples", None))
        plain = Moments.from_state_dict(given)
        if samples.shape != () or samples.dtype.kind not in "iu":
            raise ValueError(f"samples is {state.get('samples')!r}; it must be an int")
        return cls(plain.count, plain.mean, plain.m2, int(samples))._tell(plain._told())

    def __eq__(self, other: object) -> bool:
        """Return whether all numbers are the same, including the number of samples."""
        alike = isinstance(other, SampleMoments) and self.samples == other.samples
        return alike and super().__eq__(other)

    __hash__ = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.count, self.mean, self.m2, self.samples, self._told())


def _restore(count: Any, mean: Any, m2: Any, samples: int, std: Any = None) -> SampleMoments:
    """Return moments of these numbers, without a copy."""
    pooled = SampleMoments._adopt(count, mean, m2, None, std)
    object.__setattr__(pooled, "samples", samples)
    return pooled
