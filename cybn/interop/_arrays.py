"""Arrays of other libraries as NumPy arrays, without a copy if possible."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _arguments, _foreign

_HOST = (1, 3)  # DLPack's device types that the CPU can read: CPU, and CUDA's pinned memory


def as_array(value: Any, name: str = "x") -> NDArray[Any]:
    """Return an array of another library as a NumPy array, without a copy if possible.

    DLPack is tried first, then ``__array__``. PyTorch tensors, JAX arrays and other arrays with
    DLPack share their memory with the result if they are on the CPU. Their library decides whether
    the result is writable.

    Parameters
    ----------
    value : array_like
        An array of NumPy, PyTorch, JAX, TensorFlow, Keras or any library that supports DLPack or
        ``__array__``; or a number, or nested sequences of numbers. A tensor that requires gradients
        is detached first. bfloat16 and float8 tensors of PyTorch become float32, which represents
        their values exactly. bfloat16 arrays of JAX and of the package ml_dtypes stay bfloat16.
    name : str, default "x"
        The name of the argument in error messages.

    Returns
    -------
    ndarray
        `value` itself if it is a NumPy array.

    Raises
    ------
    ValueError
        If `value` is on a device whose memory the CPU cannot read.
    TypeError
        If `value` is masked, sparse, of a type that NumPy does not have, or not an array.

    Examples
    --------
    >>> from cybn.interop import as_array
    >>> as_array([1.0, 2.0])
    array([1., 2.])
    """
    if type(value) is np.ndarray:
        return _known(value, name)
    detach = getattr(value, "detach", None)
    if callable(detach) and getattr(value, "requires_grad", False):
        value = detach()
    if _foreign.is_tensor(value):
        value = _foreign.widened(value)
    if not isinstance(value, np.ndarray | np.generic) and hasattr(value, "__dlpack__"):
        _check_device(value, name)
        try:
            return _known(np.from_dlpack(value), name)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            if not hasattr(value, "__array__"):
                raise TypeError(_foreign.unread(name, value, error)) from error
    if _arguments.is_masked(value):
        return _arguments.array(name, value)  # raises
    try:
        array = np.asarray(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(_foreign.unread(name, value, error)) from error
    if array.dtype.kind == "O" and array is not value:
        _foreign.refuse_objects(name, value)
    return _known(array, name)


def as_floats(value: Any, name: str) -> NDArray[Any]:
    """Return the result of `as_array`, converted to float32 if it is bfloat16."""
    array = as_array(value, name)
    return array.astype(np.float32) if _arguments.is_bfloat16(array.dtype) else array


def _check_device(value: Any, name: str) -> None:
    try:
        kind = int(value.__dlpack_device__()[0])
    except (AttributeError, BufferError, TypeError, ValueError):
        kind = 0  # DLPack does not know the device
    if kind not in _HOST:
        device = getattr(value, "device", f"of DLPack type {kind}")
        raise ValueError(
            f"{name} lies on the device {device}; copy it to the CPU first, as {name}.cpu() does"
        )


def _known(array: NDArray[Any], name: str) -> NDArray[Any]:
    if array.dtype.kind in "OV" and not _arguments.is_bfloat16(array.dtype):
        raise TypeError(
            f"{name} is {array.dtype}, which NumPy does not compute with; convert it to float32 "
            "first"
        )
    return array
