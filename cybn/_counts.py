"""The parts of `Moments`: counts, and vectors with one number per channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._arguments import array, check_mapping

__all__ = [
    "Count",
    "Immutable",
    "counted",
    "frozen",
    "is_finite",
    "is_nothing",
    "parts_of",
    "short",
    "vector",
]


class Immutable:
    """An object whose attributes cannot be assigned, and that is its own copy."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        self._refuse(name, "set")

    def __delattr__(self, name: str) -> None:
        self._refuse(name, "deleted")

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise AttributeError(f"Moments is immutable: {name} cannot be {what}; make a new one")

    def __copy__(self, memo: object = None) -> Self:
        return self

    __deepcopy__ = __copy__


Count = int | float | NDArray[Any]  # an array (C,) if a mask or weights differ by channel

_MOST = int(np.iinfo(np.int64).max)  # the largest count in an array of counts


def counted(count: Any, channels: int) -> Count:
    """Return `count` as an int, a float, or a read-only (C,) array of either."""
    given = array("count", count)
    if given.ndim == 0 and given.dtype.kind != "f" and hasattr(count, "__index__"):
        result: Count = int(count)  # of any size
        least: Any = result
    elif given.dtype.kind not in "iuf":
        raise TypeError(f"count is {count!r}; it must be an int, a float, or an array of one type")
    elif given.ndim == 0:
        result = least = float(given)
    else:
        if given.shape != (channels,):
            raise ValueError(
                f"count has shape {given.shape}; it must be one number, or have shape ({channels},)"
            )
        result = given.astype(np.float64 if given.dtype.kind == "f" else np.int64)
        if given.dtype.kind == "u" and given.max(initial=0) > _MOST:
            raise ValueError(f"count is {given.max()}; a count in an array is at most {_MOST}")
        result.setflags(write=False)
        least = result.min(initial=0)
    if not least >= 0:
        raise ValueError(f"count is {least}; it must not be negative")
    if not is_finite(result):
        raise ValueError(f"count is {count}; it must be finite")
    return result


def is_finite(count: Count) -> bool:
    """Return whether a count is finite, as every int is."""
    return isinstance(count, int) or bool(np.isfinite(count).all())


def is_nothing(count: Count) -> bool:
    return not isinstance(count, np.ndarray) and count == 0


def vector(values: ArrayLike, name: str) -> NDArray[Any]:
    """Return `values` as a vector of numbers, without a copy."""
    given = array(name, values)
    if given.dtype.kind not in "biuf":
        raise TypeError(f"{name} is {given.dtype}; it must be of numbers")
    if given.ndim != 1:
        raise ValueError(f"{name} has shape {given.shape}; it must have shape (C,)")
    return given


def frozen(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return a read-only float64 copy."""
    own = np.array(values, dtype=np.float64)
    own.setflags(write=False)
    return own


def parts_of(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return count, mean, M2, rest and std without a copy; rest and std are None if missing.

    Raise ValueError if a key is missing or unexpected, or if rest or std is not valid.
    """
    check_mapping(state)
    required = {"count", "mean", "m2"}
    if not required <= set(state) <= required | {"rest", "std"}:
        raise ValueError(
            f"the state has the keys {sorted(map(str, state))}; it must have "
            "count, mean, m2 and may have rest and std"
        )
    count = array("count", state["count"])
    mean = vector(state["mean"], "mean")
    rest, std = (vector(state[n], n) if n in state else None for n in ("rest", "std"))
    for name, given in (("rest", rest), ("std", std)):
        if given is not None and given.shape != mean.shape:
            raise ValueError(f"{name} has shape {given.shape}; it must have shape ({mean.size},)")
    if rest is not None and not np.isfinite(rest).all():
        raise ValueError("rest is not finite; it must be the rounding error of the mean, or 0")
    return count[()] if count.ndim == 0 else count, mean, state["m2"], rest, std


def short(value: Count) -> str:
    """Return a short text for a number or a vector."""
    if not isinstance(value, np.ndarray):
        return f"{value}"
    return np.array2string(value, precision=6, threshold=6, edgeitems=3, separator=", ")
