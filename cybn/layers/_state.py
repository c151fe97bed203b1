"""Checking a state dict before anything is changed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import _arguments

_MOST_BATCHES = int(np.iinfo(np.int64).max)


def check_keys(state: Mapping[str, Any], expected: Iterable[str]) -> None:
    """Raise ValueError unless `state` has exactly the expected keys."""
    _arguments.check_mapping(state)
    expected = set(expected)
    missing, extra = sorted(expected - set(state)), sorted(map(str, set(state) - expected))
    if missing or extra:
        raise ValueError(
            f"the state does not fit this layer: missing {missing}, unexpected {extra}. "
            "Layers with other affine or track_running_stats settings have other keys"
        )


def vector(name: str, value: Any, channels: int, dtype: DTypeLike) -> NDArray[Any]:
    """Return a copy of `value` as (C,) of `dtype`."""
    return array(name, value, (channels,), dtype)


def array(name: str, value: Any, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return a copy of `value` as an array of this shape and dtype."""
    given = _arguments.array(name, value)
    if given.dtype.kind != "f":
        raise ValueError(f"{name} is {given.dtype}; it must be a float array")
    if given.shape != shape:
        raise ValueError(f"{name} has shape {given.shape}; it must have shape {shape}")
    with np.errstate(all="ignore"):
        return given.astype(dtype)


def fitting(own: Sequence[NDArray[Any]], values: Sequence[Any]) -> list[NDArray[Any]]:
    """Return values in the types of the arrays that they will be written to, one for each array.

    Writing then cannot fail, whatever NumPy's error state and Python's warnings: a conversion that
    overflows would leave some arrays written and others not.
    """
    return [_fit(array, value) for array, value in zip(own, values, strict=False)]


def _fit(array: NDArray[Any], value: Any) -> NDArray[Any]:
    if isinstance(value, np.ndarray) and value.dtype == array.dtype:
        return value  # nearly always, and less than half the time
    with np.errstate(all="ignore"):
        return np.asarray(value).astype(array.dtype)


def finite(name: str, array: NDArray[Any], least: float = -np.inf) -> NDArray[Any]:
    """Return `array`; ValueError where it is not finite, or below `least`."""
    wrong = np.flatnonzero(~(np.isfinite(array) & (array >= least)))
    if wrong.size:
        need = "finite" if least == -np.inf else f"finite and at least {least:g}"
        raise ValueError(
            f"{name} is {array[wrong[0]]} in channel {wrong[0]}; it must be {need}. "
            f"{wrong.size} of {array.size} channels are wrong"
        )
    return array


def batches(value: Any) -> int:
    """Return a number of batches as an int, from an int or an integer array of one value."""
    array = _arguments.array("num_batches_tracked", value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"num_batches_tracked is {value!r}; it must be one integer")
    count = operator.index(array.item())
    if not 0 <= count <= _MOST_BATCHES:
        raise ValueError(f"num_batches_tracked is {count}; it must be in 0..{_MOST_BATCHES}")
    return count
