"""The weight layouts by name, and their views in one common layout: (G, I, O, *taps).

There are G groups, each with I inputs and O outputs. Output o of group g is output channel
g * O + o, and its input i is input channel g * I + i. A linear layer is a convolution without taps.

===================  ==========================  =======================  ======================
layout               convolution                 transposed convolution   linear
===================  ==========================  =======================  ======================
torch                (out, in / groups, *taps)   (in, out / groups, ...)  (out, in)
onnx                 (out, in / groups, *taps)   (in, out / groups, ...)  (out, in): Gemm, transB=1
onnx-matmul                                                               (in, out): MatMul; Gemm
keras                (*taps, in / groups, out)   (*taps, out, in)         (in, out)
keras-depthwise      (*taps, in, multiplier)
flax                 (*taps, in / groups, out)   (*taps, in, out)         (in, out)
===================  ==========================  =======================  ======================

Every function here returns a view, so writing to it changes the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._arguments import integer_from

Array = NDArray[Any]
Grouped = Callable[[Array, int], Array]


def _split(weight: Array, axis: int, groups: int) -> Array:
    """Return `weight` with one axis split into two: groups, and channels of a group."""
    axis %= weight.ndim
    size = weight.shape[axis]
    if size % groups:
        raise ValueError(
            f"weight has shape {weight.shape}, with {size} channels on axis {axis}, "
            f"which groups={groups} does not divide"
        )
    before, after = weight.shape[:axis], weight.shape[axis + 1 :]
    return weight.reshape(*before, groups, size // groups, *after)  # a view, as no axes are merged


def _out_in_taps(weight: Array, groups: int) -> Array:
    return _split(weight, 0, groups).swapaxes(1, 2)


def _in_out_taps(weight: Array, groups: int) -> Array:
    return _split(weight, 0, groups)


def _taps_in_out(weight: Array, groups: int) -> Array:
    return np.moveaxis(_split(weight, -1, groups), (-2, -3, -1), (0, 1, 2))


def _taps_in_multiplier(weight: Array, groups: int) -> Array:
    channels = weight.shape[-2]
    if groups not in (1, channels):
        raise ValueError(
            f"groups is {groups}; a depthwise weight of shape {weight.shape} has "
            f"{channels} groups, one per channel: leave groups out"
        )
    return np.moveaxis(weight[..., np.newaxis, :], (-3, -2, -1), (0, 1, 2))


def _one_group(seen: Grouped) -> Grouped:
    """Return a function like `seen` for a layout without groups: `groups` must be 1."""

    def alone(weight: Array, groups: int) -> Array:
        if groups != 1:
            raise ValueError(f"groups is {groups}; this layout has no groups, so it must be 1")
        return seen(weight, 1)

    return alone


def _taps_in_out_alone(weight: Array, groups: int) -> Array:
    return np.moveaxis(weight[np.newaxis], (0, -2, -1), (0, 1, 2))


def _taps_out_in_alone(weight: Array, groups: int) -> Array:
    return np.moveaxis(weight[np.newaxis], (0, -1, -2), (0, 1, 2))


CONV: dict[str, Grouped] = {
    "torch": _out_in_taps,
    "onnx": _out_in_taps,
    "keras": _taps_in_out,
    "keras-depthwise": _taps_in_multiplier,
    "flax": _taps_in_out,
}
CONV_TRANSPOSE: dict[str, Grouped] = {
    "torch": _in_out_taps,
    "onnx": _in_out_taps,
    "keras": _one_group(_taps_out_in_alone),
    "flax": _one_group(_taps_in_out_alone),
}
LINEAR: dict[str, Grouped] = {
    "torch": _out_in_taps,
    "onnx": _out_in_taps,
    "onnx-matmul": _taps_in_out,
    "keras": _taps_in_out,
    "flax": _taps_in_out,
}


def seen(weight: Array, layouts: dict[str, Grouped], layout: str, groups: int) -> Array:
    """Return a view of `weight` as (G, I, O, *taps)."""
    if layout not in layouts:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(layouts)}")
    groups = integer_from("groups", groups)
    least = 2 if layouts is LINEAR else 3
    if weight.ndim < least or (layouts is LINEAR and weight.ndim > 2):
        need = "2 axes" if layouts is LINEAR else "at least 3: two of channels, then taps"
        raise ValueError(f"weight has shape {weight.shape}; it must have {need}")
    if weight.size == 0:
        raise ValueError(f"weight has shape {weight.shape}; it must not be empty")
    return layouts[layout](weight, groups)
