"""Types narrower than NumPy's, from their bits: all become float32, which holds them exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


def from_bfloat16(bits: NDArray[np.uint16]) -> Float:
    """Return bfloat16, which is the upper half of float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_float8_e5m2(bits: NDArray[np.uint8]) -> Float:
    """Return float8 with 5 bits of exponent, which is the upper half of float16."""
    return (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32)


def from_float8_e4m3(bits: NDArray[np.uint8]) -> Float:
    """Return float8 with 4 bits of exponent: bias 7, no infinity, NaN where all bits are 1."""
    exponent, fraction = (bits.astype(np.int32) >> 3) & 15, bits.astype(np.int32) & 7
    size = np.where(exponent > 0, fraction + 8, fraction)
    value = np.ldexp(size.astype(np.float32), np.maximum(exponent, 1) - 10)
    value = np.where(bits & 127 == 127, np.float32(np.nan), value)
    return np.where(bits & 128, -value, value).astype(np.float32)


class Narrow(NamedTuple):
    """How one type is read."""

    bits: type[np.unsignedinteger[Any]]
    read: Callable[[Any], Float]


# By the names that safetensors files give them.
NARROW = {
    "BF16": Narrow(np.uint16, from_bfloat16),
    "F8_E4M3": Narrow(np.uint8, from_float8_e4m3),
    "F8_E5M2": Narrow(np.uint8, from_float8_e5m2),
}
