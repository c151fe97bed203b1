"""safetensors files, through the package of that name."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._npz import KINDS


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


def read(path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return arrays and metadata; ValueError where the file is broken or has other types."""
    package = _package()
    broken = (
        *(package.SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError),
        *(MemoryError, OverflowError),
    )
    try:
        with package.safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in list(file.keys())}
            for name, array in arrays.items():
                if array.dtype.kind not in KINDS:
                    raise ValueError(f"{name!r} is {array.dtype}, which NumPy does not have")
            return arrays, dict(file.metadata() or {})
    except broken as error:
        raise ValueError(f"not a readable safetensors file of NumPy's types: {error}") from error
