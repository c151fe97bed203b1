"""Statistics within samples: what the running statistics of an instance norm are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._arguments import check_mapping
from ..moments import Moments, _is_nothing, _sum

__all__ = ["SampleMoments"]


class SampleMoments(Moments):
    """Moments of each channel within samples; how the samples differ is not in them.

    The variance is that of the samples about their own means, on average, as an instance norm
    computes it. `count` and `mean` are those of all values, and `m2` is the sum of the squared
    deviations of each from the mean of its sample. Samples of different sizes weigh by their size.

    Attributes
    ----------
    samples : int
        How many samples are in it.
    """

    __slots__ = ("samples",)

    samples: int

    @classmethod
    def of(cls, each: Moments, channels: int) -> SampleMoments:
        """Pool the moments of (N * C) rows of as many values each."""
        mean, m2 = (v.reshape(-1, channels) for v in (each.mean, each.m2))
        assert isinstance(each.count, int)
        return _restore(each.count * len(mean), mean.mean(0), m2.sum(0), len(mean))

    def _degrees(self, ddof: int) -> Any:
        return self.count - ddof * self.samples  # each sample has a mean of its own

    def merge(self, other: Moments) -> SampleMoments:
        """Return the moments of these samples and others taken together; neither is changed.

        Parameters
        ----------
        other : SampleMoments
            Of the same C channels; or `Moments` of no values at all.

        Raises
        ------
        TypeError
            If `other` is no `SampleMoments`.
        ValueError
            If the numbers of channels differ.
        OverflowError
            If the counts are too large to be added.
        """
        if not isinstance(other, SampleMoments):
            if isinstance(other, Moments) and _is_nothing(other.count) and len(other) == len(self):
                return self
            raise TypeError(
                f"other is of type {type(other).__name__}; these are statistics within samples, "
                "of an instance norm, and merge with their like only"
            )
        if len(self) != len(other):
            raise ValueError(f"other has {len(other)} channels; it must have {len(self)}")
        if _is_nothing(self.count):
            return other
        if _is_nothing(other.count):
            return self
        count = _sum(self.count, other.count)
        with np.errstate(all="ignore"):
            mean = self.mean + (other.mean - self.mean) * (other.count / count)
            m2 = self.m2 + other.m2
        return _restore(count, mean, m2, self.samples + other.samples)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return all that `from_state_dict` needs: as `Moments`, and ``samples``."""
        return super().state_dict() | {"samples": np.array(self.samples)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> SampleMoments:
        """Return what `state_dict` was called on; errors are those of `Moments`."""
        check_mapping(state)
        given = dict(state)
        samples = np.asarray(given.pop("samples", None))
        plain = Moments.from_state_dict(given)
        if samples.shape != () or samples.dtype.kind not in "iu" or samples < 1:
            raise ValueError(
                f"samples is {state.get('samples')!r}; it must be an int of at least 1"
            )
        return _restore(plain.count, plain.mean, plain.m2, int(samples))

    def __eq__(self, other: object) -> bool:
        """Whether all numbers are the same, the number of samples too."""
        alike = isinstance(other, SampleMoments) and self.samples == other.samples
        return alike and super().__eq__(other)

    __hash__ = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.count, self.mean, self.m2, self.samples)


def _restore(count: Any, mean: Any, m2: Any, samples: int) -> SampleMoments:
    """Return moments of these numbers, without a copy."""
    pooled = SampleMoments._adopt(count, mean, m2)
    object.__setattr__(pooled, "samples", samples)
    return pooled
