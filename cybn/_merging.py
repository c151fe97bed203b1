"""Merge the statistics of two parts, with as little rounding error as float64 allows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._counts import Count, is_finite

__all__ = ["Part", "between", "deviation_of", "merged", "share_of", "sum_of"]

Rest = NDArray[np.float64] | float  # rounding error of a mean
Part = tuple[Count, NDArray[np.float64], NDArray[np.float64], Rest]  # count, mean, m2, rest


@np.errstate(all="ignore")  # infinite means give NaN, so they stay visible
def merged(one: Part, other: Part) -> tuple[Count, Any, Any, Any]:
    """Return count, mean, M2 and rest of two parts together; neither may be empty.

    The formula is that of Chan, Golub and LeVeque (1979). A mean is correct also if the difference
    of the two means overflows float64. M2 is infinite if it overflows.
    """
    (n, mean, m2, rest), (n_other, mean_other, m2_other, rest_other) = one, other
    count = sum_of(n, n_other)
    share = share_of(n_other, count)
    delta = (mean_other - mean) + (rest_other - rest)
    total, left = added(mean, rest, delta * share)
    if not np.isfinite(total).all():
        total = np.where(np.isfinite(total), total, between(mean, mean_other, share))
    squares = m2 + m2_other + delta * (n * share) * delta
    # If a channel is empty in one part, delta is meaningless, and its square may be infinite.
    one_sided = np.asarray((n == 0) | (n_other == 0))
    return count, total, np.where(one_sided, m2 + m2_other, squares), left


Deviation = tuple[NDArray[np.float64], Rest, NDArray[np.float64]]  # mean, its rest, std


@np.errstate(all="ignore")
def deviation_of(one: Deviation, other: Deviation, share: Any) -> NDArray[np.float64]:
    """Return the standard deviation of two parts together; their variance may overflow float64.

    `share` is the count of the other part over the count of both.
    """
    (mean, rest, std), (mean_other, rest_other, std_other) = one, other
    half = np.abs((mean_other / 2 - mean / 2) + (rest_other / 2 - rest / 2))
    apart = 2 * np.sqrt(share * (1 - share)) * half
    within = np.hypot(np.sqrt(1 - share) * std, np.sqrt(share) * std_other)
    both: NDArray[np.float64] = np.where(
        share == 0, std, np.where(share == 1, std_other, np.hypot(within, apart))
    )
    return both


def sum_of(a: Count, b: Count) -> Count:
    """Return the count of two parts together; raise OverflowError if it is too large."""
    try:
        with np.errstate(all="ignore"):
            total = a + b
    except OverflowError:
        raise OverflowError(f"the counts {a} and {b} are too large to be added") from None
    # The sum of two counts of int64 wraps around to a negative number.
    if not is_finite(total) or np.any(np.asarray(total) < 0):
        raise OverflowError(f"the counts {a} and {b} are too large to be added")
    return total


def share_of(part: Count, whole: Count) -> NDArray[np.float64] | float:
    """Return part / whole, or 0 for channels whose `whole` is 0."""
    if not isinstance(whole, np.ndarray):
        return part / whole
    return np.divide(part, whole, out=np.zeros(whole.size), where=whole > 0)


def between(
    a: NDArray[np.float64], b: NDArray[np.float64], share: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    """Return a + (b - a) * share, also if b - a overflows float64."""
    near = a + (b - a) * share
    far: NDArray[np.float64] = np.where(np.isfinite(near), near, a * (1 - share) + b * share)
    return far


def added(
    mean: NDArray[np.float64], rest: Rest, step: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean + rest + step as a rounded sum and its rounding error (Knuth's two-sum)."""
    rough = mean + step
    back = rough - mean
    left = (mean - (rough - back)) + (step - back) + rest
    whole = np.isfinite(rough)  # an infinite or NaN mean has no rest
    left = np.where(whole, left, 0.0)
    total = rough + left
    return total, np.where(whole, left - (total - rough), 0.0)
