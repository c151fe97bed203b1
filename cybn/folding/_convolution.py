"""Convolution in plain NumPy: slow and short, in the precision of the input.

For G groups, each with I inputs and O outputs, x has shape (N, G * I, *lengths), a kernel has shape
(G, I, O, *taps), and the result has shape (N, G * O, *lengths). Without taps it is a linear layer.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[Any]


def convolve(
    x: Array, kernel: Array, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Array:
    """Return the convolution as in neural networks, without flipping the kernel."""
    g, i, o, *taps = kernel.shape
    axes = tuple(range(2, 2 + len(taps)))
    x = np.pad(x, [(0, 0), (0, 0)] + [(padding, padding)] * len(taps))
    windows = x
    if taps:
        windows = sliding_window_view(x, [_reach(k, dilation) for k in taps], axes)
    steps = [slice(None, None, stride)] * len(taps)
    holes = [slice(None, None, dilation)] * len(taps)
    windows = windows[:, :, *steps, *holes]
    n, _, *rest = windows.shape
    m = rest[: len(taps)]
    # (N, G, I, *m, *taps) -> (G, N * m, I * taps), and the kernel likewise
    windows = windows.reshape(n, g, i, prod(m), prod(taps)).transpose(1, 0, 3, 2, 4)
    columns = kernel.reshape(g, i, o, prod(taps)).swapaxes(2, 3).reshape(g, -1, o)
    y = windows.reshape(g, n * prod(m), -1) @ columns
    return y.reshape(g, n, prod(m), o).transpose(1, 0, 3, 2).reshape(n, g * o, *m)


def convolve_transposed(
    x: Array, kernel: Array, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Array:
    """Return the transposed convolution: each input adds its multiple of the kernel to y."""
    taps = kernel.shape[3:]
    axes = tuple(range(2, 2 + len(taps)))
    apart = np.zeros((*x.shape[:2], *((size - 1) * stride + 1 for size in x.shape[2:])), x.dtype)
    apart[:, :, *(slice(None, None, stride) for _ in taps)] = x
    edges = [_reach(k, dilation) - 1 for k in taps]
    apart = np.pad(apart, [(0, 0), (0, 0)] + [(edge, edge) for edge in edges])
    y = convolve(apart, np.flip(kernel, tuple(a + 1 for a in axes)), dilation=dilation)
    return y[:, :, *(slice(padding, y.shape[a] - padding) for a in axes)]


def _reach(taps: int, dilation: int) -> int:
    """Return how many neighbouring values a row of taps spans."""
    return (taps - 1) * dilation + 1
