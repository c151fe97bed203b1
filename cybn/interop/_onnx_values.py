"""Values in ONNX's protocol buffers: tensors become arrays, attributes become numbers."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

__all__ = ["number", "package", "tensor_array"]

_FLOAT, _INT = 1, 2  # the types of onnx.AttributeProto


def package() -> Any:
    """Return the module onnx, with its numpy_helper."""
    try:
        importlib.import_module("onnx.numpy_helper")
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError("this needs the package onnx: pip install 'cybn[interop]'") from error


def tensor_array(value: Any, name: str) -> Any:
    """Return an initializer, as an array if it is a TensorProto. No file is opened."""
    if not (hasattr(value, "data_type") and hasattr(value, "raw_data")):
        return value
    if value.data_location:
        raise ValueError(
            f"{name} has its data in another file; load the model with onnx.load(path), which "
            "reads it, or save it with all data in one file"
        )
    if min(value.dims, default=0) < 0:
        raise ValueError(f"{name} has the shape {tuple(value.dims)}; the model is broken")
    try:
        return package().numpy_helper.to_array(value)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as an array: {error}") from error


def number(attribute: Any) -> float | int:
    """Return the value of an attribute. Raise ValueError if it is not a number."""
    if attribute.type not in (_FLOAT, _INT):
        raise ValueError(f"the attribute {attribute.name!r} of the node is not a number")
    return _shortest(attribute.f) if attribute.type == _FLOAT else int(attribute.i)


def _shortest(value: float) -> float:
    """Return the shortest decimal that rounds to this float32."""
    return float(str(np.float32(value)))
