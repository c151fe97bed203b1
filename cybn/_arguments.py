"""What a caller may hand in: the checks at the door, and the errors that name the way out."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# How hard to look for a shared element before calling two views overlapping.
_MOST_WORK: Any = 10_000

_OPTIONAL = ("gamma", "beta")

_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)


def tensor(name: str, value: ArrayLike) -> NDArray[Any]:
    """Return `value` as an aligned array of native float32 or float64."""
    if type(value) is not np.ndarray:
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(
                f"{name} is a masked array, and its mask would be ignored; "
                f"give a plain array, such as {name}.filled(0.0)"
            )
        value = np.asarray(value)
    dtype = value.dtype
    if dtype is not _F32 and dtype is not _F64:
        if dtype.kind != "f" or dtype.itemsize not in (4, 8):
            raise TypeError(
                f"{name} is {dtype}; it must be float32 or float64. "
                f"Convert it: np.asarray({name}, np.float32)"
            )
        plain = _F32 if dtype.itemsize == 4 else _F64
        # Foreign byte order is copied; an unpickled dtype is equal to the plain one, but not it.
        value = value.astype(plain, copy=False).view(plain)
    if not value.flags.aligned:
        value = value.copy(order="K")
    return value


def gradient_pair(dy: ArrayLike, x: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return dy and x as arrays of one shape and dtype."""
    x = tensor("x", x)
    dy = tensor("dy", dy)
    if dy.shape != x.shape:
        raise ValueError(f"dy has shape {dy.shape}; it must have the shape of x, {x.shape}")
    if dy.dtype != x.dtype:
        raise ValueError(f"dy is {dy.dtype}; it must have the dtype of x, {x.dtype}")
    return dy, x


def number(name: str, value: Any) -> float:
    """Return `value` as a float."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; it must be a number") from None


def check_eps(eps: float, least: float | None = None) -> None:
    """Refuse an eps that is not positive, or not at least `least` where given, or not finite."""
    eps = number("eps", eps)
    if least is None and not (eps > 0 and isfinite(eps)):
        raise ValueError(f"eps is {eps}; it must be positive and finite")
    if least is not None and not (eps >= least and isfinite(eps)):
        raise ValueError(f"eps is {eps}; it must be finite and not negative")


def channel_axis(x: NDArray[Any], axis: int) -> int:
    """Return `axis` counted from the front; `x` must have at least 2 axes."""
    ndim = x.ndim
    if ndim < 2:
        raise ValueError(f"x has shape {x.shape}; it must have at least 2 axes, such as (N, C)")
    if not hasattr(axis, "__index__"):
        raise TypeError(f"axis is {axis!r}; it must be an int")
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis is {axis}; x has {ndim} axes, so it must be in {-ndim}..{ndim - 1}")
    return axis + ndim if axis < 0 else axis


def parameters(channels: int, **given: ArrayLike | None) -> tuple[list[Any], str]:
    """Return per-channel vectors as contiguous arrays of one float type, and that type's char.

    The type is float32 where all that are given are, else float64: widening is exact. Only gamma
    and beta may be None.
    """
    char = "f"
    arrays: list[Any] = []
    for name, value in given.items():
        if value is None and name not in _OPTIONAL:
            raise TypeError(
                f"{name} is None; it must have shape ({channels},), one value a channel"
            )
        if value is not None:
            value = tensor(name, value)
            if value.shape != (channels,):
                raise ValueError(
                    f"{name} has shape {value.shape}; it must have shape ({channels},), "
                    "one value a channel"
                )
            if value.dtype is _F64:
                char = "d"
        arrays.append(value)
    dtype = _F32 if char == "f" else _F64
    for i, value in enumerate(arrays):
        if value is not None and (value.dtype is not dtype or value.strides != (dtype.itemsize,)):
            arrays[i] = np.ascontiguousarray(value, dtype)
    return arrays, char


def destination(
    out: NDArray[Any] | None, x: NDArray[Any], inputs: tuple[NDArray[Any] | None, ...]
) -> NDArray[Any]:
    """Return the array that the result goes to: `out` if it will do, a new one if it is None."""
    if out is None:
        return np.empty_like(x, subok=False)
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out is of type {type(out).__name__}; it must be a plain NumPy array")
    if out.shape != x.shape:
        raise ValueError(f"out has shape {out.shape}; it must have the shape of x, {x.shape}")
    if out.dtype != x.dtype:
        raise ValueError(f"out is {out.dtype}; it must have the dtype of x, {x.dtype}")
    if not out.flags.writeable:
        raise ValueError("out is read-only; give an array that may be written to")
    for array in inputs:
        if array is not None and array is not out and _overlap_in_part(out, array):
            raise ValueError(
                "out overlaps an input in part, and would overwrite values not yet read; "
                "give the input itself, or memory of its own"
            )
    return out


def _overlap_in_part(out: NDArray[Any], array: NDArray[Any]) -> bool:
    """Whether the two share memory without being the same view of it."""
    if out.flags.owndata and array.flags.owndata:
        return False  # they are not one object
    if not np.may_share_memory(out, array):
        return False
    same = (
        out.__array_interface__["data"] == array.__array_interface__["data"]
        and out.shape == array.shape
        and all(
            a == b or size == 1
            for a, b, size in zip(out.strides, array.strides, out.shape, strict=True)
        )
    )
    try:
        return not same and np.shares_memory(out, array, _MOST_WORK)
    except np.exceptions.TooHardError:
        return True
