"""npz files, read as untrusted input: nothing is unpickled, and the memory is limited.

An npz file is a zip archive of npy files. NumPy's own reader allocates as many bytes as a header
asks for before it checks that the file has them, and it decompresses any amount of data.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ._narrow import from_bfloat16

KINDS = "biufc"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_BROKEN = (  # the errors that zipfile and NumPy raise for damaged files; zipfile raises
    # NotImplementedError for an unknown compression
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, NotImplementedError),
    *(KeyError, IndexError, OverflowError, RecursionError, MemoryError, RuntimeError),
    *(SyntaxError, tokenize.TokenError, TypeError, ValueError),
)


def write(file: IO[bytes], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to an open file; the same arrays give the same bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")  # with a date in 1980, not today's
            with archive.open(info, "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)


def read(file: IO[bytes], most_bytes: int) -> dict[str, NDArray[Any]]:
    """Return the arrays of an open file. Raise ValueError if it has anything else."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            size = file.seek(0, 2)
            total = sum(member.file_size for member in members)
            if total > max(size, most_bytes):
                raise ValueError(f"it unpacks to {total} bytes; most_bytes is {most_bytes}")
            arrays: dict[str, NDArray[Any]] = {}
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name == member.filename or name in arrays:
                    raise ValueError(f"{member.filename!r} is not an npy file, or occurs twice")
                arrays[name] = _member(archive, member)
            return arrays
    except _BROKEN as error:
        raise ValueError(f"not a readable npz file of plain arrays: {error}") from error


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """Return one array, with no more bytes than the archive states."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename!r} is packed by method {member.compress_type}")
    with archive.open(member) as stream:
        version = npy.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"{member.filename!r} has npy version {version}")
        shape, fortran, dtype = _HEADERS[version](stream)
        half = dtype == np.dtype("V2")  # how NumPy saves bfloat16, for which npy has no name
        if dtype.kind not in KINDS and not half:
            raise ValueError(f"{member.filename!r} is {dtype}, not numbers")
        need = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or need != member.file_size - stream.tell():
            raise ValueError(f"the size of {member.filename!r} does not fit its shape {shape}")
        data = bytearray(stream.read())
    if half:
        flat = from_bfloat16(np.frombuffer(data, np.uint16))
    else:
        flat = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="), copy=False)
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
