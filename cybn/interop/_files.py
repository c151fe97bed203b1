"""Arrays and layers in npz or safetensors files. The ending of the name decides which."""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from ..layers import Renorm
from . import _npz, _safetensors
from ._arrays import as_array, as_floats
from ._saved import LAYERS, called, layer_from, settings_of

_File = str | os.PathLike[str] | IO[bytes]

FORMATS = ("npz", "safetensors")
SETTINGS = "__cybn__"  # the name of the settings of layers in an npz file
METADATA = "__metadata__"  # the name of the metadata in the header of a safetensors file
VERSION = 1
MOST_BYTES = 1 << 32
MOST_NAME = 65000  # bytes of a name; a zip archive allows 65535, with the ending


def save_arrays(path: _File, arrays: Mapping[str, Any], *, format: str | None = None) -> None:
    """Write a dict of arrays to a file.

    The file is written beside `path` and then moved there, so `path` never has an incomplete file.
    If `path` is a symbolic link, the file that it points to is replaced.

    Parameters
    ----------
    path : path or binary file
        A path must end in ".npz" or ".safetensors", unless `format` is given. An open file, such as
        an `io.BytesIO`, is written by one call of its ``write``.
    arrays : mapping of str to array_like
        Arrays of bool, int, float or complex, if the format has the type. bfloat16 is stored as
        bfloat16 in a safetensors file and as float32 in an npz file.
    format : {"npz", "safetensors"}, optional
        None means the format of the path's ending, or npz for an open file.

    Raises
    ------
    TypeError
        If `arrays` is not a mapping of str, or an array does not consist of numbers.
    ValueError
        If `path` has another ending, or a name has NUL in it, is not valid Unicode or takes more
        than 65000 bytes.
    OSError
        If the file cannot be written.
    ImportError
        If the format is safetensors and that package is not installed.

    Examples
    --------
    >>> import io
    >>> import numpy as np
    >>> from cybn import interop
    >>> file = io.BytesIO()
    >>> interop.save_arrays(file, {"weight": np.ones(2)})
    >>> _ = file.seek(0)
    >>> interop.load_arrays(file)
    {'weight': array([1., 1.])}
    """
    _save(path, arrays, {}, format)


def load_arrays(path: _File, *, most_bytes: int = MOST_BYTES) -> dict[str, NDArray[Any]]:
    """Return the arrays in a file that `save_arrays` or another program has written.

    Nothing is unpickled, and no more memory is allocated than the file actually contains.

    Parameters
    ----------
    path : path or binary file
        A path must end in ".npz" or ".safetensors". An open file is read from its position to its
        end.
    most_bytes : int, default 4 GiB
        The largest size of an unpacked npz file. Uncompressed files have no limit.

    Returns
    -------
    dict of str to ndarray
        New arrays. bfloat16 and float8 become float32, which represents their values exactly.

    Raises
    ------
    ValueError
        If the file is broken or contains something other than plain arrays of numbers, or `path`
        has another ending.
    OSError
        If the file cannot be opened.
    ImportError
        If the format is safetensors and that package is not installed.

    Examples
    --------
    >>> import io
    >>> import numpy as np
    >>> from cybn import interop
    >>> file = io.BytesIO()
    >>> interop.save_arrays(file, {"weight": np.ones(2)})
    >>> _ = file.seek(0)
    >>> interop.load_arrays(file)
    {'weight': array([1., 1.])}
    """
    return _load(path, most_bytes)[0]


def save_layers(path: _File, layers: Any, *, format: str | None = None) -> None:
    """Write a layer, or a dict of layers, to a file, with all settings, modes and switches.

    Parameters
    ----------
    path, format
        As in `save_arrays`.
    layers : layer or mapping of str to layers
        Layers of cybn of any kind. Names must not be empty.

    Raises
    ------
    TypeError
        If `layers` is or has an object of another class.
    ValueError
        If a name is empty, two names make the same key, or a layer could not be loaded again, such
        as one with NaN in its running statistics; and as in `save_arrays`.

    Examples
    --------
    >>> import io
    >>> import cybn
    >>> from cybn import interop
    >>> file = io.BytesIO()
    >>> interop.save_layers(file, {"bn1": cybn.BatchNorm2d(2)})
    >>> _ = file.seek(0)
    >>> list(interop.load_layers(file))
    ['bn1']
    """
    named: Any = {"": layers} if isinstance(layers, tuple(LAYERS.values())) else layers
    if not isinstance(named, Mapping):
        advice = ""
        if isinstance(layers, list | tuple):
            advice = ", such as {str(i): layer for i, layer in enumerate(layers)}"
        raise TypeError(
            f"layers is of type {type(layers).__name__}; it must be a layer or a dict{advice}"
        )
    arrays: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    limits: dict[int, int] = {}  # a number for each Renorm, because layers may share one
    for name, layer in named.items():
        if LAYERS.get(type(layer).__name__) is not type(layer):
            raise TypeError(
                f"{called(name)} is of type {type(layer).__name__}; it must be one of "
                f"{', '.join(LAYERS)}"
            )
        if not isinstance(name, str) or (not name and named is layers):
            raise ValueError(f"a layer has the name {name!r}; it must be a str, and not empty")
        start = f"{name}." if name else ""
        state = {start + key: array for key, array in layer.state_dict().items()}
        if both := sorted(set(state) & set(arrays)):
            raise ValueError(f"two layers have the key {both[0]!r}")
        given = {"class": type(layer).__name__} | settings_of(layer, limits)
        _check_loadable(name, given, state)
        arrays |= state
        settings[name] = given
    outer = {"version": VERSION, "single": named is not layers, "layers": settings}
    _save(path, arrays, outer, format)


def _check_loadable(name: str, settings: dict[str, Any], state: Mapping[str, Any]) -> None:
    """Raise ValueError for a layer with which `load_layers` could not load the file."""
    try:
        layer_from(name, json.loads(json.dumps(settings)), dict(state), {})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{called(name)} could not be loaded again: {error}. Save the others without it, or "
            "fix it first, such as by reset_running_stats()"
        ) from error


def load_layers(path: _File, *, most_bytes: int = MOST_BYTES) -> Any:
    """Return the layer, or the dict of layers, in a file that `save_layers` wrote.

    Parameters
    ----------
    path, most_bytes
        As in `load_arrays`.

    Returns
    -------
    layer or dict of str to layers
        New layers with the classes, modes and switches that were saved. They are in training mode
        if the file has no mode.

    Raises
    ------
    ValueError
        As in `load_arrays`, and if the file has no settings of layers, the settings and arrays do
        not fit together, or a layer rejects them.
    OSError, ImportError
        As in `load_arrays`.

    Examples
    --------
    >>> import io
    >>> import cybn
    >>> from cybn import interop
    >>> file = io.BytesIO()
    >>> interop.save_layers(file, {"bn1": cybn.BatchNorm2d(2)})
    >>> _ = file.seek(0)
    >>> list(interop.load_layers(file))
    ['bn1']
    """
    arrays, text = _load(path, most_bytes)
    try:
        settings = json.loads(text)
        if not isinstance(settings, dict) or settings.get("version") != VERSION:
            raise ValueError("it has no settings of layers of this version")
        limits: dict[Any, Renorm] = {}
        layers = {n: _named_layer(n, s, arrays, limits) for n, s in settings["layers"].items()}
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


def _named_layer(name: str, settings: Any, arrays: dict[str, Any], limits: Any) -> Any:
    """Return a layer as `layer_from` does. Errors name it, and say how to load the arrays."""
    try:
        return layer_from(name, settings, arrays, limits)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}; load_arrays reads the arrays alone") from error


def _is_open(place: Any, method: str) -> bool:
    """Return whether this is an open file. Raise TypeError if it is not a path either."""
    if isinstance(place, str | os.PathLike):
        return False
    if isinstance(place, io.TextIOBase) or not hasattr(place, method):
        raise TypeError(
            f"path is of type {type(place).__name__}; it must be a path, or a file that was opened "
            "in binary mode, such as an io.BytesIO"
        )
    return True


def _format(place: _File, format: str | None) -> str:
    """Return `format`. If it is None, return that of a path's ending, or npz for a file."""
    if format is not None:
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
        return format
    if not isinstance(place, str | os.PathLike):
        return "npz"
    ending = Path(place).suffix
    if ending[1:] not in FORMATS:
        raise ValueError(f"path is {os.fspath(place)!r}; it must end in .npz or .safetensors")
    return ending[1:]


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise an OSError with the path that the caller gave, not with that of another file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _save(
    place: _File, arrays: Mapping[str, Any], settings: dict[str, Any], format: str | None = None
) -> None:
    """Write arrays and settings to an open file, or to a new file that is moved to a path."""
    to_open, kind = _is_open(place, "write"), _format(place, format)
    if not isinstance(arrays, Mapping) or not all(isinstance(name, str) for name in arrays):
        raise TypeError("arrays must be a dict of str to arrays")
    for name in arrays:
        _check_name(name)
    read = as_floats if kind == "npz" else as_array
    plain = {name: read(array, name) for name, array in arrays.items()}
    for name, array in plain.items():
        if array.dtype.kind not in _npz.KINDS and array.dtype.name != "bfloat16":
            raise TypeError(f"{name} is {array.dtype}; it must consist of numbers")
    text = json.dumps(settings) if settings else ""
    note = {SETTINGS: np.frombuffer(text.encode(), np.uint8)} if text else {}
    metadata = {"cybn": text} if text else {}
    if to_open:
        buffer = io.BytesIO()
        if kind == "npz":
            _npz.write(buffer, plain | note)
        else:
            buffer.write(_safetensors.packed(plain, metadata))
        written = cast("IO[bytes]", place).write(buffer.getvalue())
        # A file without a buffer may write less than it was given.
        if isinstance(written, int) and written < buffer.tell():
            raise OSError(
                f"the file took {written} of {buffer.tell()} bytes; open it with a buffer"
            )
        return
    path = cast("str | os.PathLike[str]", place)
    target = os.path.realpath(path) if os.path.islink(path) else path  # a link stays a link
    # A random name, which no other process uses. The file gets the permissions of the file that it
    # replaces, or else of any new file. They are set last, because safetensors replaces `partial`
    # by a file that only its owner can read.
    partial = Path(target).with_name(f".{secrets.token_hex(8)}.partial")
    with _naming(path):
        partial.touch(exist_ok=False)
        try:
            mode = os.stat(target if os.path.exists(target) else partial).st_mode
            if kind == "npz":
                with partial.open("wb") as file:
                    _npz.write(file, plain | note)
            else:
                _safetensors.write(partial, plain, metadata)
            partial.chmod(mode)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def _check_name(name: str) -> None:
    """Raise ValueError for a name that could not be loaded again."""
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


def _load(place: _File, most_bytes: int) -> tuple[dict[str, NDArray[Any]], str]:
    """Return the arrays, and the text of the layers' settings, which may be empty."""
    if _is_open(place, "read"):
        data = cast("IO[bytes]", place).read()
        if not data:
            raise ValueError(
                "not a readable file of arrays: it is empty, or was read to its end: file.seek(0)"
            )
        if not data.startswith(b"PK"):
            return _noted(*_safetensors.unpacked(data))
        return _untied(_npz.read(io.BytesIO(data), most_bytes))
    path = cast("str | os.PathLike[str]", place)
    kind = _format(path, None)
    with open(path, "rb") as file:  # raises OSError if it cannot be opened
        try:
            if kind == "npz":
                return _untied(_npz.read(file, most_bytes))
            return _noted(*_safetensors.read(path))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is {error}") from error


def _untied(arrays: dict[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], str]:
    note = arrays.pop(SETTINGS, np.zeros(0, np.uint8))
    return arrays, note.tobytes().decode("utf-8", "replace")


def _noted(
    arrays: dict[str, NDArray[Any]], metadata: dict[str, str]
) -> tuple[dict[str, NDArray[Any]], str]:
    return arrays, metadata.get("cybn", "")
