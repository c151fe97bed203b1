"""safetensors files, through the package of that name."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._narrow import NARROW

Arrays = dict[str, NDArray[Any]]

# NumPy's types by the names that the format gives them.
_KINDS: dict[str, Any] = {f"{k.upper()}{8 * n}": f"<{k}{n}" for k in "iu" for n in (1, 2, 4, 8)}
_KINDS |= {f"F{8 * n}": f"<f{n}" for n in (2, 4, 8)} | {"BOOL": np.bool_, "C64": "<c8"}


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
    """Write arrays and metadata to a file. Raise TypeError if the format lacks a dtype."""
    _run(_package().numpy.save_file, arrays, path, metadata or None)


def packed(arrays: Mapping[str, NDArray[Any]], metadata: dict[str, str]) -> bytes:
    """Return the bytes of the file that `write` writes."""
    data: bytes = _run(_package().numpy.save, arrays, metadata or None)
    return data


def _run(save: Any, arrays: Mapping[str, NDArray[Any]], *rest: Any) -> Any:
    plain = {
        name: np.asarray(array, array.dtype.newbyteorder("="), order="C")
        for name, array in arrays.items()
    }
    try:
        return save(plain, *rest)
    except (KeyError, TypeError, _package().SafetensorError) as error:
        if "I/O error" in str(error):
            raise OSError(str(error)) from error
        dtypes = ", ".join(sorted({str(array.dtype) for array in plain.values()}))
        raise TypeError(f"safetensors cannot hold one of {dtypes}: {error}") from error


def _check_kind(kind: str, name: str) -> None:
    if kind not in _KINDS and kind not in NARROW:
        raise ValueError(
            f"the tensor {name!r} is {kind}, which NumPy does not have; convert it to float32 in "
            "the program that wrote it"
        )


def _decoded(name: str, entry: Mapping[str, Any], data: bytes) -> NDArray[Any]:
    """Return an array from its entry in the header and its bytes."""
    kind, shape = entry["dtype"], entry["shape"]
    _check_kind(kind, name)
    if kind in NARROW:
        return NARROW[kind].read(np.frombuffer(data, NARROW[kind].bits)).reshape(shape)
    return np.frombuffer(data, _KINDS[kind]).reshape(shape).copy()


def _tensor(file: Any, name: str, path: str | os.PathLike[str]) -> NDArray[Any]:
    kind = file.get_slice(name).get_dtype()
    _check_kind(kind, name)
    if kind in NARROW:  # the package cannot read these types as NumPy arrays
        with open(path, "rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            entry = json.loads(raw.read(size))[name]
            begin, end = entry["data_offsets"]
            raw.seek(8 + size + begin)
            return _decoded(name, entry, raw.read(end - begin))
    array: NDArray[Any] = file.get_tensor(name)
    return array


def read(path: str | os.PathLike[str]) -> tuple[Arrays, dict[str, str]]:
    """Return arrays and metadata. Raise ValueError if the file is broken or has other types."""
    package = _package()
    try:
        with package.safe_open(path, framework="numpy") as file:
            arrays = {name: _tensor(file, name, path) for name in list(file.keys())}
            return arrays, dict(file.metadata() or {})
    except (package.SafetensorError, *_BROKEN) as error:
        raise _unreadable(error) from error


def unpacked(data: bytes) -> tuple[Arrays, dict[str, str]]:
    """Return arrays and metadata from the bytes of a file. Raise the errors of `read`."""
    package = _package()
    try:
        entries = package.deserialize(data)  # raises an error if the data is malformed
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        arrays = {name: _decoded(name, entry, entry["data"]) for name, entry in entries}
        return arrays, dict(header.get("__metadata__") or {})
    except (package.SafetensorError, *_BROKEN) as error:
        raise _unreadable(error) from error


_BROKEN = (
    *(OSError, AttributeError, KeyError, TypeError, ValueError),
    *(MemoryError, OverflowError, RecursionError),
)


def _unreadable(error: Exception) -> ValueError:
    return ValueError(f"not a readable safetensors file of NumPy's types: {error}")
