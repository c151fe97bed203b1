"""bfloat16 and float8, converted from their bits to float32, which represents them exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


def from_bfloat16(bits: NDArray[np.uint16]) -> Float:
    """Return bfloat16 values, whose bits are the upper half of those of float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_float8_e5m2(bits: NDArray[np.uint8]) -> Float:
    """Return float8 values with 5 exponent bits: their bits are the upper half of float16's."""
    return (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32)


def from_float8_e4m3(bits: NDArray[np.uint8]) -> Float:
    """Return float8 values with 4 exponent bits and bias 7.

    There is no infinity. A value is NaN if all bits except the sign are 1.
    """
    exponent, fraction = (bits.astype(np.int32) >> 3) & 15, bits.astype(np.int32) & 7
    size = np.where(exponent > 0, fraction + 8, fraction)
    value = np.ldexp(size.astype(np.float32), np.maximum(exponent, 1) - 10)
    value = np.where(bits & 127 == 127, np.float32(np.nan), value)
    return np.where(bits & 128, -value, value).astype(np.float32)


class Narrow(NamedTuple):
    """The integer type with the bits of a narrow type, and the function that converts it."""

    bits: type[np.unsignedinteger[Any]]
    read: Callable[[Any], Float]


# The keys are the names of the types in safetensors files.
NARROW = {
    "BF16": Narrow(np.uint16, from_bfloat16),
    "F8_E4M3": Narrow(np.uint8, from_float8_e4m3),
    "F8_E5M2": Narrow(np.uint8, from_float8_e5m2),
}
