"""How statistics of two parts become those of both, with as little rounding as float64 allows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._counts import Count, is_finite

__all__ = ["Part", "between", "deviation_of", "merged", "share_of", "sum_of"]

Rest = NDArray[np.float64] | float
Part = tuple[Count, NDArray[np.float64], NDArray[np.float64], Rest]  # count, mean, m2, rest


@np.errstate(all="ignore")  # infinite means give NaN, and stay visible
def merged(one: Part, other: Part) -> tuple[Count, Any, Any, Any]:
    """Return count, mean, M2 and the rest of the mean of two parts, neither of them empty.

    The formula is that of Chan, Golub and LeVeque (1979). A mean is what it should be where the
    distance between the two is beyond float64; M2 is infinite where it is beyond.
    """
    (n, mean, m2, rest), (n_other, mean_other, m2_other, rest_other) = one, other
    count = sum_of(n, n_other)
    share = share_of(n_other, count)
    delta = (mean_other - mean) + (rest_other - rest)
    total, left = added(mean, rest, delta * share)
    if not np.isfinite(total).all():
        total = np.where(np.isfinite(total), total, between(mean, mean_other, share))
    squares = m2 + m2_other + delta * (n * share) * delta
    # A channel that one side is empty in has no delta, and its square may be infinite.
    one_sided = np.asarray((n == 0) | (n_other == 0))
    return count, total, np.where(one_sided, m2 + m2_other, squares), left


Deviation = tuple[NDArray[np.float64], Rest, NDArray[np.float64]]  # mean and its rest, deviation


@np.errstate(all="ignore")
def deviation_of(one: Deviation, other: Deviation, share: Any) -> NDArray[np.float64]:
    """Return the standard deviation of two parts, whose variance may be beyond float64.

    `share` is that of the other part in the count.
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
    """Return the count of two parts; OverflowError where it is beyond its type."""
    try:
        with np.errstate(all="ignore"):
            total = a + b
    except OverflowError:
        raise OverflowError(f"the counts {a} and {b} are too large to be added") from None
    # Two counts of int64 wrap round to a negative one.
    if not is_finite(total) or np.any(np.asarray(total) < 0):
        raise OverflowError(f"the counts {a} and {b} are too large to be added")
    return total


def share_of(part: Count, whole: Count) -> NDArray[np.float64] | float:
    """Return part / whole, 0 where the whole is 0."""
    if not isinstance(whole, np.ndarray):
        return part / whole
    return np.divide(part, whole, out=np.zeros(whole.size), where=whole > 0)


def between(
    a: NDArray[np.float64], b: NDArray[np.float64], share: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    """Return a + (b - a) * share, also where b - a is beyond float64."""
    near = a + (b - a) * share
    far: NDArray[np.float64] = np.where(np.isfinite(near), near, a * (1 - share) + b * share)
    return far


def added(
    mean: NDArray[np.float64], rest: Rest, step: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean + rest + step as a rounded sum and what that leaves over (Knuth's two-sum)."""
    rough = mean + step
    back = rough - mean
    left = (mean - (rough - back)) + (step - back) + rest
    whole = np.isfinite(rough)  # an infinite or NaN mean leaves nothing
    left = np.where(whole, left, 0.0)
    total = rough + left
    return total, np.where(whole, left - (total - rough), 0.0)
