"""Arrays and layers in files: npz or safetensors, by the ending of the name."""

from __future__ import annotations

import inspect
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, Renorm
from . import _npz, _safetensors
from ._arrays import as_array
from ._forms import write

_Path = str | os.PathLike[str]

LAYERS = {kind.__name__: kind for kind in (BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d)}
SETTINGS = "__cybn__"  # the member of an npz file that holds the settings of layers
METADATA = "__metadata__"  # what a safetensors file keeps beside the arrays
VERSION = 1
MOST_BYTES = 1 << 32
MOST_NAME = 65000  # bytes of a name; a zip archive has room for 65535, ending and all
MOST_STATELESS = 1 << 24  # channels of a layer without arrays, whose number no array confirms


def save_arrays(path: _Path, arrays: Mapping[str, Any]) -> None:
    """Write a dict of arrays to a file.

    The file appears whole or not at all: it is written beside `path` and then moved there.

    Parameters
    ----------
    path : path
        Ends in ".npz" or ".safetensors", which needs the package of that name.
    arrays : mapping of str to array_like
        Of numbers: bool, int, float or complex; as far as the format has them.

    Raises
    ------
    TypeError
        If `arrays` is no mapping of str, or an array is not of numbers.
    ValueError
        If `path` has another ending, or a name has NUL in it, is not valid Unicode or takes more
        than 65000 bytes.
    ImportError
        If safetensors is not installed.
    """
    _save(path, arrays, {})


def load_arrays(path: _Path, *, most_bytes: int = MOST_BYTES) -> dict[str, NDArray[Any]]:
    """Return the arrays in a file that `save_arrays` or any other program has written.

    Nothing is unpickled, and nothing is allocated that the file has not got.

    Parameters
    ----------
    path : path
        Ends in ".npz" or ".safetensors".
    most_bytes : int, default 4 GiB
        What a compressed npz file may unpack to. Uncompressed ones have no limit.

    Returns
    -------
    dict of str to ndarray
        New arrays.

    Raises
    ------
    ValueError
        If the file is broken, or holds anything but plain arrays of numbers, or `path` has another
        ending.
    OSError
        If it cannot be opened.
    ImportError
        If safetensors is not installed.
    """
    return _load(path, most_bytes)[0]


def save_layers(path: _Path, layers: BatchNorm | Mapping[str, BatchNorm]) -> None:
    """Write a layer, or layers by name, with all their settings to a file.

    Parameters
    ----------
    path : path
        As in `save_arrays`.
    layers : BatchNorm or mapping of str to BatchNorm
        Names must not be empty. The mode, training or eval, is not saved.

    Raises
    ------
    TypeError
        If there is anything else in `layers`, or a class that is not cybn's own.
    ValueError
        If a name is empty, or two names make the same key; and as in `save_arrays`.
    """
    named = {"": layers} if isinstance(layers, BatchNorm) else layers
    if not isinstance(named, Mapping):
        raise TypeError(f"layers is of type {type(layers).__name__}; it must be a layer or a dict")
    arrays: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, bn in named.items():
        if LAYERS.get(type(bn).__name__) is not type(bn):
            raise TypeError(
                f"layer {name!r} is of type {type(bn).__name__}; it must be one of "
                f"{', '.join(LAYERS)}"
            )
        if not isinstance(name, str) or (not name and named is layers):
            raise ValueError(f"a layer has the name {name!r}; it must be a str, and not empty")
        state = write(dict(bn.state_dict()), "cybn", name)
        if both := sorted(set(state) & set(arrays)):
            raise ValueError(f"two layers have the key {both[0]!r}")
        arrays |= state
        settings[name] = {"class": type(bn).__name__} | _settings(bn)
    _save(path, arrays, {"version": VERSION, "single": named is not layers, "layers": settings})


def load_layers(path: _Path, *, most_bytes: int = MOST_BYTES) -> BatchNorm | dict[str, BatchNorm]:
    """Return what `save_layers` wrote: a layer, or layers by name; all of them or none.

    Parameters
    ----------
    path, most_bytes
        As in `load_arrays`.

    Returns
    -------
    BatchNorm or dict of str to BatchNorm
        New layers, in training mode.

    Raises
    ------
    ValueError
        As in `load_arrays`, and if the file has no settings of layers, or settings and arrays do
        not fit each other or do not pass the checks of the layers.
    OSError, ImportError
        As in `load_arrays`.
    """
    arrays, text = _load(path, most_bytes)
    try:
        settings = json.loads(text)
        if not isinstance(settings, dict) or settings.get("version") != VERSION:
            raise ValueError("it has no settings of layers of this version")
        layers = {name: _layer(name, s, arrays) for name, s in settings["layers"].items()}
        if arrays:
            raise ValueError(f"it has arrays of no layer: {sorted(arrays)[:3]}")
        return layers[""] if settings["single"] else layers
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(f"{path} is not a file of layers: {error}") from error


def _settings(bn: BatchNorm) -> dict[str, Any]:
    """Return what the layer was made with."""
    values = {name: getattr(bn, name) for name in inspect.signature(type(bn)).parameters}
    values["dtype"] = str(bn.dtype)
    if bn.renorm is not None:
        values["renorm"] = {"r_max": bn.renorm.r_max, "d_max": bn.renorm.d_max}
    return values


def _layer(name: str, settings: dict[str, Any], arrays: dict[str, Any]) -> BatchNorm:
    """Return a new layer with its arrays, which are taken out of `arrays`."""
    settings = dict(settings)
    kind, channels = LAYERS[settings.pop("class")], settings["num_features"]
    start = f"{name}." if name else ""
    roles = [role for role in BatchNorm(1).state_dict() if start + role in arrays]
    state = {role: arrays.pop(start + role) for role in roles}
    sizes = {array.shape for role, array in state.items() if array.ndim}
    if sizes != {(channels,)} and not (not sizes and channels <= MOST_STATELESS):
        raise ValueError(f"layer {name!r} has {channels} channels, and arrays of shapes {sizes}")
    if settings.get("renorm") is not None:
        settings["renorm"] = Renorm(**settings["renorm"])
    bn = kind(**settings)
    bn.load_state_dict(state)
    return bn


def _ending(path: _Path) -> str:
    ending = Path(path).suffix
    if ending not in (".npz", ".safetensors"):
        raise ValueError(f"path is {os.fspath(path)!r}; it must end in .npz or .safetensors")
    return ending


def _save(path: _Path, arrays: Mapping[str, Any], settings: dict[str, Any]) -> None:
    """Write arrays and settings to a file of another name, then move it to `path`."""
    ending = _ending(path)
    if not isinstance(arrays, Mapping) or not all(isinstance(name, str) for name in arrays):
        raise TypeError("arrays must be a dict of str to arrays")
    for name in arrays:
        _check_name(name)
    plain = {name: as_array(array, name) for name, array in arrays.items()}
    for name, array in plain.items():
        if array.dtype.kind not in _npz.KINDS:
            raise TypeError(f"{name} is {array.dtype}; it must be of numbers")
    text = json.dumps(settings) if settings else ""
    # A name that nobody else has. Permissions are those of any new file, also where safetensors
    # puts a private file of its own in its place.
    partial = Path(path).with_name(f".{secrets.token_hex(8)}.partial")
    partial.touch(exist_ok=False)
    mode = partial.stat().st_mode
    try:
        if ending == ".npz":
            note = {SETTINGS: np.frombuffer(text.encode(), np.uint8)} if text else {}
            with partial.open("wb") as file:
                _npz.write(file, plain | note)
        else:
            _safetensors.write(partial, plain, {"cybn": text} if text else {})
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _check_name(name: str) -> None:
    """Refuse what a file could not give back."""
    if name in (SETTINGS, METADATA):
        raise ValueError(f"the name {name!r} is taken, by cybn or by safetensors; choose another")
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"the name {name!r} is not valid Unicode: {error.reason}") from error
    if "\0" in name:
        raise ValueError(f"the name {name!r} has NUL in it; choose another")
    if size > MOST_NAME:
        raise ValueError(f"the name {name[:40]!r}... has {size} bytes; {MOST_NAME} is the most")


def _load(path: _Path, most_bytes: int) -> tuple[dict[str, NDArray[Any]], str]:
    """Return arrays and the text of the settings of layers, empty where there are none."""
    ending = _ending(path)
    with Path(path).open("rb") as file:  # OSError where it cannot be opened
        if ending == ".npz":
            arrays = _npz.read(file, most_bytes)
            note = arrays.pop(SETTINGS, np.zeros(0, np.uint8))
            return arrays, note.tobytes().decode("utf-8", "replace")
    arrays, metadata = _safetensors.read(path)
    return arrays, metadata.get("cybn", "")
