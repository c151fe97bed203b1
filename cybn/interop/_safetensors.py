"""safetensors files, through the package of that name."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What the format calls the types that NumPy has.
_KINDS = (
    {"BOOL", "C64"} | {f"{k}{n}" for k in "IU" for n in (8, 16, 32, 64)} | {"F16", "F32", "F64"}
)


def _package() -> Any:
    try:
        importlib.import_module("safetensors.numpy")
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            "safetensors files need the package safetensors: pip install 'cybn[interop]'"
        ) from error


def write(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], metadata: dict[str, str]
) -> None:
    """Write arrays and metadata to a file; TypeError for a dtype that the format does not have."""
    package = _package()
    plain = {
        name: np.asarray(array, array.dtype.newbyteorder("="), order="C")
        for name, array in arrays.items()
    }
    try:
        package.numpy.save_file(plain, path, metadata or None)
    except (KeyError, TypeError, package.SafetensorError) as error:
        dtypes = ", ".join(sorted({str(array.dtype) for array in plain.values()}))
        raise TypeError(f"safetensors cannot hold one of {dtypes}: {error}") from error


def _tensor(file: Any, name: str) -> NDArray[Any]:
    kind = file.get_slice(name).get_dtype()
    if kind not in _KINDS:
        raise ValueError(
            f"the tensor {name!r} is {kind}, which NumPy does not have; convert it to float32 in "
            "the program that wrote it"
        )
    array: NDArray[Any] = file.get_tensor(name)
    return array


def read(path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return arrays and metadata; ValueError where the file is broken or has other types."""
    package = _package()
    broken = (
        *(package.SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError),
        *(MemoryError, OverflowError),
    )
    try:
        with package.safe_open(path, framework="numpy") as file:
            arrays = {name: _tensor(file, name) for name in list(file.keys())}
            return arrays, dict(file.metadata() or {})
    except broken as error:
        raise ValueError(f"not a readable safetensors file of NumPy's types: {error}") from error
