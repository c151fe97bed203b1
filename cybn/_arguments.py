"""Checks of arguments, with errors that say what to do instead."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from math import isfinite, prod
from operator import index
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _foreign

# How much work may be done to find out whether views overlap; beyond it, they are taken to overlap.
MOST_WORK: Any = 10_000

_MOST_AXES = 64  # the most axes of an array; lists that are nested deeper are not arrays

_OPTIONAL = ("gamma", "beta")

SCALE_THEM = "scale them all, which changes no result but the count"

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
EPS = {dtype: float(np.finfo(dtype).eps) for dtype in (F32, F64)}
_PLAIN: dict[int, np.dtype[Any]] = {2: np.dtype(np.float16), 4: F32, 8: F64}


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Return whether this is the bfloat16 of ml_dtypes, without importing that package."""
    return dtype.itemsize == 2 and dtype.name == "bfloat16"


def is_masked(value: Any) -> bool:
    """Return whether this is a masked array.

    The code does not refer to `np.ma`, because NumPy imports that module on first use. The import
    takes a while, and a process forked meanwhile would wait forever for its end.
    """
    masked: Any = getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())
    return isinstance(value, masked)


def array(name: str, value: Any) -> NDArray[Any]:
    """Return `value` as an array, without a copy if it is one or supports `__array__` or DLPack."""
    refuse_masked(name, value)
    try:
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        given = np.asarray(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(_foreign.unread(name, value, error)) from error
    if given.dtype.kind == "O" and given is not value:
        _foreign.refuse_objects(name, value)
    return given


def refuse_masked(name: str, value: Any, depth: int = 0) -> None:
    """Raise TypeError if NumPy would silently drop a mask, also for lists of masked arrays."""
    if is_masked(value):
        raise TypeError(
            f"{name} is a masked array, and its mask would be ignored; "
            f"give a plain array, such as {name}.filled(0.0)"
        )
    if type(value) in (list, tuple) and depth < _MOST_AXES:
        for part in value:
            if type(part) is not float:
                refuse_masked(name, part, depth + 1)


def tensor(name: str, value: ArrayLike, half: bool = True) -> NDArray[Any]:
    """Return `value` as an aligned array of native float32 or float64, or a half type."""
    if type(value) is not np.ndarray:
        value = array(name, value)
    dtype = value.dtype
    if dtype is not F32 and dtype is not F64:
        value = _converted(name, value, half)
    if not value.flags.aligned:
        value = value.copy(order="K")
    return value


def _converted(name: str, value: NDArray[Any], half: bool) -> NDArray[Any]:
    """Return an array of another dtype as native floats or bfloat16, or raise TypeError."""
    dtype = value.dtype
    if half and is_bfloat16(dtype):
        return value
    if dtype.kind != "f" or dtype.itemsize not in ((2, 4, 8) if half else (4, 8)):
        need = "float32 or float64" + (", or float16 or bfloat16" if half else "")
        raise TypeError(f"{name} is {dtype}; it must be {need}. {_foreign.advice(name, value)}")
    plain = _PLAIN[dtype.itemsize]
    # Foreign byte order is converted. An unpickled dtype equals the plain one, but is another
    # object.
    return value.astype(plain, copy=False).view(plain)


def number(name: str, value: Any) -> float:
    """Return `value` as a float; text and bools are not converted."""
    if not isinstance(value, (str, bytes, bytearray, bool, np.bool_)):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
        except OverflowError:
            raise ValueError(f"{name} is an int beyond the largest float") from None
    raise TypeError(f"{name} is {value!r}; it must be a number")


def integer(name: str, value: Any) -> int:
    """Return `value` as an int; a bool is not an int."""
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} is {value!r}; it must be an int")


def integer_from(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int of at least `least`."""
    given = integer(name, value)
    if given < least:
        raise ValueError(f"{name} is {given}; it must be at least {least}")
    return given


def check_mapping(state: Any) -> None:
    """Raise TypeError if a state is not a mapping."""
    if not isinstance(state, Mapping):
        raise TypeError(f"the state is of type {type(state).__name__}; it must be a dict")


def check_eps(eps: SupportsFloat, least: float | None = None) -> float:
    """Return a finite eps as a float; it must be positive, or at least `least` if that is given."""
    eps = number("eps", eps)
    if least is None and not (eps > 0 and isfinite(eps)):
        raise ValueError(f"eps is {eps}; it must be positive and finite")
    if least is not None and not (eps >= least and isfinite(eps)):
        raise ValueError(f"eps is {eps}; it must be finite and not negative")
    return eps


def channel_axis(x: NDArray[Any], axis: int) -> int:
    """Return `axis` counted from the front; `x` must have at least 2 axes."""
    return channel_axis_of(x.shape, axis)


def channel_axis_of(shape: tuple[int, ...], axis: int) -> int:
    """Return `axis` counted from the front, for an x of this shape."""
    ndim = len(shape)
    if ndim < 2:
        raise ValueError(f"x has shape {shape}; it must have at least 2 axes, such as (N, C)")
    if isinstance(axis, bool):
        raise TypeError(f"axis is {axis}; it must be an int")
    axis = integer("axis", axis)
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis is {axis}; x has {ndim} axes, so it must be in {-ndim}..{ndim - 1}")
    return axis + ndim if axis < 0 else axis


def activation(name: Any, slope: Any, known: Mapping[str, int]) -> tuple[int, float]:
    """Return the number of an activation, or 0 if `name` is None, and the slope of leaky_relu."""
    if name is None:
        return 0, 0.0
    number_of = known.get(name) if isinstance(name, str) else None
    if number_of is None:
        raise ValueError(f"activation is {name!r}; it must be None or one of {', '.join(known)}")
    slope = number("slope", slope)
    if not isfinite(slope):
        raise ValueError(f"slope is {slope}; it must be finite")
    return number_of, slope


def companion(name: str, value: ArrayLike, x: NDArray[Any]) -> NDArray[Any]:
    """Return an array that must have the shape and dtype of `x`."""
    array = tensor(name, value)
    if array.shape != x.shape:
        raise ValueError(f"{name} has shape {array.shape}; it must have the shape of x, {x.shape}")
    if array.dtype != x.dtype:
        raise ValueError(f"{name} is {array.dtype}; it must have the dtype of x, {x.dtype}")
    return array


def parameters(channels: int, **given: ArrayLike | None) -> tuple[list[Any], str]:
    """Return per-channel vectors as contiguous arrays of one float type, and that type's char.

    The type is float32 if all given vectors are float32. Otherwise it is float64, because widening
    is exact. Only gamma and beta may be None.
    """
    char = "f"
    arrays: list[Any] = []
    for name, value in given.items():
        if value is None and name not in _OPTIONAL:
            raise TypeError(
                f"{name} is None; it must have shape ({channels},), one value a channel"
            )
        if value is not None:
            value = tensor(name, value, half=False)
            if value.shape != (channels,):
                raise ValueError(
                    f"{name} has shape {value.shape}; it must have shape ({channels},), "
                    "one value a channel"
                )
            if value.dtype is F64:
                char = "d"
        arrays.append(value)
    dtype = F32 if char == "f" else F64
    for i, value in enumerate(arrays):
        if value is not None and (value.dtype is not dtype or value.strides != (dtype.itemsize,)):
            arrays[i] = np.ascontiguousarray(value, dtype)
    return arrays, char


def check_invertible(
    gamma: NDArray[Any] | None, activation: str | None, slope: float, residual: Any
) -> None:
    """Raise ValueError if xhat cannot be computed from y."""
    if residual is not None:
        raise ValueError("residual is given; from_output works without one")
    if activation is not None and not (activation == "leaky_relu" and slope > 0):
        raise ValueError(
            "from_output needs an activation with an inverse: None, or leaky_relu with a positive "
            "slope. Keep x, and give that"
        )
    if gamma is not None and not np.all(gamma):
        raise ValueError(
            f"gamma is 0 in channel {np.flatnonzero(gamma == 0)[0]}: x cannot be computed from y. "
            "Keep x, and give that"
        )


def check_places(name: str, out: NDArray[Any]) -> None:
    """Raise ValueError if several values of `out` share memory, or may do so."""
    span = out.itemsize
    for stride, size in sorted((abs(t), n) for t, n in zip(out.strides, out.shape, strict=True)):
        if size > 1:
            if stride < span:
                break
            span += stride * (size - 1)
    else:
        return
    if out.size <= MOST_WORK:  # to check more would take longer than to copy
        steps = [np.arange(n) * t for n, t in zip(out.shape, out.strides, strict=True)]
        places = np.sort(sum(np.ix_(*steps)), axis=None)
        if (np.diff(places) >= out.itemsize).all():
            return
    raise ValueError(
        f"{name} has strides {out.strides}, with several of its values at one place in memory; "
        "give an array whose values lie apart, such as np.empty_like(x)"
    )


def check_batch(shape: tuple[int, ...], axis: int, number: int | None, least: int) -> None:
    """Raise ValueError if fewer than `least` values per channel are used; None means all."""
    count = prod(shape) // shape[axis] if shape[axis] else least
    if number is not None and number < least:
        raise ValueError(
            f"mask, weights or lengths leave {number} of {count} values "
            f"a channel; at least {least} must count, as one value has no variance. Train with "
            "more values a channel, or normalize with running statistics: eval() on a layer that "
            "has them, or batch_norm_inference"
        )
    if count == 0:
        raise ValueError(f"x has shape {shape}: it has no values to take statistics of")
    if count < least:
        raise ValueError(
            f"x has shape {shape}: one value a channel has no variance, and would be "
            "normalized to beta whatever it is. Train with more values a channel, or normalize "
            "with running statistics: eval() on a layer that has them, or batch_norm_inference"
        )


def check_count(count: Any, need: Any) -> None:
    """Raise ValueError if the count of moments is not that of x."""
    if isinstance(count, np.ndarray) or count != need:
        raise ValueError(
            f"moments has count {count}; a channel of x has {need} values. "
            "Give the Moments that batch_norm returned for this x, and the same mask, weights "
            "and lengths"
        )


def finite_weights(weights: NDArray[Any]) -> NDArray[np.float64]:
    """Return weights as float64; raise ValueError if one is negative or not finite."""
    wide = weights.astype(np.float64, copy=False)
    good = np.isfinite(wide) & (wide >= 0)
    if not good.all():
        raise ValueError(
            f"weights has the value {wide[~good][0]}; all must be finite and not negative"
        )
    return wide


def finite_sum(total: float) -> float:
    """Return the sum of weights; raise ValueError if it is infinite."""
    if not isfinite(total):
        raise ValueError(f"weights sum to {total}; {SCALE_THEM}")
    return total


def check_degrees(total: Any, ddof: int) -> None:
    """Raise ValueError if the divisor of the running variance, `total - ddof`, is not positive."""
    if not total > ddof:
        raise ValueError(
            f"weights sum to {total}; the sum must be more than running_ddof="
            f"{ddof}, as the running variance is m2 / (sum - running_ddof). "
            "Scale the weights so that each says how often its value counts, or make the layer "
            "with running_ddof=0"
        )
