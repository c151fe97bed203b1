"""Errors for values that are not arrays of numbers, with a conversion that works.

This code runs only after an error, so it need not be fast.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["advice", "conversion", "is_tensor", "refuse_objects", "unread", "widened"]

# Arguments for `to_numpy` of pandas, for the two arguments of cybn that are not floats.
_PANDAS = {"mask": '"bool", na_value=False', "lengths": '"int64", na_value=0'}


def is_tensor(value: Any) -> bool:
    """Return whether this is a tensor of PyTorch, without importing PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def widened(tensor: Any) -> Any:
    """Return a tensor of PyTorch, as float32 if NumPy lacks its type (bfloat16 or float8)."""
    return tensor.float() if _lacks_numpy_type(tensor) else tensor


def _lacks_numpy_type(tensor: Any) -> bool:
    return str(tensor.dtype).startswith(("torch.bfloat16", "torch.float8"))


def conversion(name: str, value: Any) -> str | None:
    """Return code that makes an array of numbers from another library's array; None if unknown.

    `value` may also be a list or tuple of such arrays.
    """
    if not isinstance(value, list | tuple):
        return _of_one(name, value)
    part = next((way for way in (_of_one("part", part) for part in value) if way), None)
    return None if part is None else f"np.stack([np.asarray({part}) for part in {name}])"


def _of_one(name: str, value: Any) -> str | None:
    if is_tensor(value):
        return _of_tensor(name, value)
    for method in ("toarray", "todense"):  # sparse arrays of SciPy and of the package sparse
        if callable(getattr(value, method, None)):
            return f"{name}.{method}()"
    if callable(getattr(value, "to_numpy", None)) and callable(getattr(value, "isna", None)):
        return _of_pandas(name, value)
    return None


def _of_tensor(name: str, value: Any) -> str | None:
    if value.device.type == "meta":
        return None  # it has no data
    steps = {
        ".detach()": value.requires_grad,
        ".cpu()": value.device.type != "cpu",
        ".to_dense()": str(value.layout) != "torch.strided",
        ".dequantize()": value.is_quantized,
        ".resolve_conj()": value.is_conj(),
        ".resolve_neg()": value.is_neg(),
        ".float()": _lacks_numpy_type(value),
    }
    return name + "".join(step for step, needed in steps.items() if needed)


def _of_pandas(name: str, value: Any) -> str | None:
    """Return code that converts a DataFrame, Series or array of pandas; None if it would fail."""
    if name in _PANDAS:
        return f"{name}.to_numpy({_PANDAS[name]})"
    dtypes = value.dtypes if hasattr(value, "dtypes") else value.dtype
    kinds = {str(kind).lower() for kind in np.atleast_1d(dtypes)}
    to = "float32" if kinds <= {"float32", "float[pyarrow]"} else "float64"
    try:
        value.to_numpy(to, na_value=np.nan)
    except (TypeError, ValueError):
        return None
    return f'{name}.to_numpy("{to}", na_value=np.nan)'


def unread(name: str, value: Any, error: Exception) -> str:
    """Return the message for an `error` that NumPy raised for `value`, with a solution if known."""
    if isinstance(value, list | tuple) and "inhomogeneous" in str(error):
        end = f"it is ragged, of an inhomogeneous shape: {_of_ragged(name, value)}"
    else:
        way = conversion(name, value)
        end = f"{error}" if way is None else f"convert it first: {way}"
    return f"{name}, of type {type(value).__name__}, cannot be read as a NumPy array: {end}"


def refuse_objects(name: str, value: Any) -> None:
    """Raise TypeError for a `value` that NumPy reads as objects, if a conversion is known."""
    if (way := conversion(name, value)) is not None:
        kind = type(value).__name__
        raise TypeError(f"{name}, of type {kind}, is read as objects; convert it first: {way}")


def _of_ragged(name: str, value: Any) -> str:
    """Return the shapes of the parts of a ragged sequence, and code to pad them if possible."""
    try:
        shapes = [np.shape(part) for part in value]
    except (RuntimeError, TypeError, ValueError):
        return "its parts are ragged themselves. Pad them to one shape"
    shown = f"its parts have shapes such as {', '.join(map(str, sorted(set(shapes))[:3]))}"
    if not all(shapes) or len({shape[1:] for shape in shapes}) > 1:
        return f"{shown}. Give parts of one shape"
    ends = f"(0, max(map(len, {name})) - len(part))"
    if len(shapes[0]) > 1:
        ends = f"[{ends}] + [(0, 0)] * {len(shapes[0]) - 1}"
    count = ", and mask the padding with lengths= or mask=" if name == "x" else ""
    return f"{shown}. Pad them{count}: np.stack([np.pad(part, {ends}) for part in {name}])"


def advice(name: str, array: NDArray[Any]) -> str:
    """Return a sentence on how to convert an array of another type to floats."""
    if array.dtype.kind == "c":
        return f"Take the real part or the magnitude: np.real({name}), np.abs({name})"
    if array.dtype == object and array.ndim == 0 and array[()] is None:
        return "None is not an array"
    if array.dtype.names:
        return f"Convert it: np.array({name}.tolist(), np.float32)"
    if array.dtype.kind in "OSU" and (wrong := _no_number(array)):
        parts = array.tolist() if array.ndim == 1 else []
        if any(isinstance(part, np.ndarray | list | tuple) for part in parts):
            return f"It is ragged: {_of_ragged(name, parts)}"
        return f"It holds {wrong}, which is not a number"
    return f"Convert it: np.asarray({name}, np.float32)"


def _no_number(array: NDArray[Any]) -> str | None:
    """Return the first element that is not a number, and its type; None if all are numbers."""
    for element in array.flat:
        try:
            np.asarray(element).astype(np.float32)
        except (TypeError, ValueError):
            return f"{str(element)[:40]!r}, of type {type(element).__name__}"
        if np.ndim(element):
            return f"an array of shape {np.shape(element)}"
    return None
