"""Checks of values for the state of a layer, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import _arguments

_MOST_BATCHES = int(np.iinfo(np.int64).max)

# The library that a state comes from, by the last part of one of its keys.
_ELSEWHERE = {
    "weight": "torch",
    "moving_mean": "keras",
    "moving_variance": "keras",
    "scale": "flax",
    "params": "flax",
    "batch_stats": "flax",
}


class Keys(NamedTuple):
    """The keys that `load_state_dict` with ``strict=False`` did not load."""

    missing_keys: list[str]  # their arrays in the layer have not changed
    unexpected_keys: list[str]


def check_keys(state: Mapping[str, Any], expected: Iterable[str], strict: bool) -> Keys:
    """Return the keys that do not fit; raise ValueError if there are any and `strict` is True."""
    _arguments.check_mapping(state)
    expected = set(expected)
    keys = Keys(sorted(expected - set(state)), sorted(map(str, set(state) - expected)))
    if strict and (keys.missing_keys or keys.unexpected_keys):
        raise ValueError(
            f"the state does not fit this layer: missing {keys.missing_keys}, unexpected "
            f"{keys.unexpected_keys}. {_advice(keys.unexpected_keys, expected)}"
        )
    return keys


def _advice(unexpected: list[str], expected: set[str]) -> str:
    leaves = [key.replace("/", ".").rpartition(".")[2].partition(":")[0] for key in unexpected]
    for leaf in leaves:
        library = _ELSEWHERE.get(leaf)
        if library:
            return (
                f"Such keys are those of {library}: cybn.interop.from_{library}(state, prefix) "
                "makes a layer of them, and its state_dict() is one that fits"
            )
    for key, leaf in zip(unexpected, leaves, strict=True):
        if leaf in expected and key.endswith(leaf):
            return (
                "Such keys are those of a layer within a model: {k.removeprefix("
                f"{key.removesuffix(leaf)!r}): v for k, v in state.items()}} takes the prefix off"
            )
    return (
        "Layers with other affine or track_running_stats settings have other keys; strict=False "
        "loads the keys that fit and ignores the rest"
    )


def array(name: str, value: Any, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return a copy of `value` as an array of this shape and dtype."""
    given = _arguments.array(name, value)
    if given.dtype.kind != "f":
        what = "None" if value is None else given.dtype
        raise ValueError(f"{name} is {what}; it must be a float array")
    if given.shape != shape:
        raise ValueError(f"{name} has shape {given.shape}; it must have shape {shape}")
    with np.errstate(all="ignore"):
        own = given.astype(dtype)
    beyond = np.isinf(own) & np.isfinite(given)
    if beyond.any():
        raise ValueError(f"{name} has the value {given[beyond][0]}, which {own.dtype} cannot hold")
    return own


def fitting(own: Sequence[NDArray[Any]], values: Sequence[Any]) -> list[NDArray[Any]]:
    """Return a value for each array, in the dtype of the array.

    Writing the values to the arrays then cannot raise an error, whatever NumPy's error state and
    Python's warning filters are. A conversion that overflows could raise one between two arrays.
    """
    fitted = []
    for array, value in zip(own, values, strict=False):
        if not (isinstance(value, np.ndarray) and value.dtype == array.dtype):  # which is rare
            with np.errstate(all="ignore"):
                value = np.asarray(value).astype(array.dtype)
        fitted.append(value)
    return fitted


def finite(name: str, array: NDArray[Any], eps: float | None = None) -> NDArray[Any]:
    """Return `array`; raise ValueError if it is not finite or, as a variance, is at most -eps.

    `eps` is given for a variance alone. Other libraries' variances may lie slightly below 0, by
    rounding; inference accepts them, because they are positive with eps added.
    """
    good, need = np.isfinite(array), "finite"
    if eps is not None:
        good &= (array >= 0) | (array > -eps)
        need += f", and at least 0 or above -eps, which is {-eps:g}"
    wrong = np.flatnonzero(~good)
    if wrong.size:
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
    count = int(array.item())
    if not 0 <= count <= _MOST_BATCHES:
        raise ValueError(f"num_batches_tracked is {count}; it must be in 0..{_MOST_BATCHES}")
    return count
