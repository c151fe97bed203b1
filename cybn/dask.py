"""Exact moments of dask arrays with any chunks, computed lazily and in bounded memory.

>>> import dask.array as da, cybn.dask
>>> x = da.ones((1000, 8, 32), chunks=(100, 8, 32))
>>> cybn.dask.moments(x).compute().count
32000

Each chunk is measured by itself, and the moments of the chunks are merged as a tree that depends on
the chunks alone. So results are bitwise identical for any scheduler and any number of workers.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import numpy as np

try:
    import dask.array as da
    from dask.delayed import Delayed, delayed
except ImportError as error:
    raise ImportError(
        "cybn.dask needs dask with its arrays, which is not installed. Install it: "
        "pip install 'cybn[dask]'"
    ) from error

from ._arguments import channel_axis, integer_from
from ._moments import Moments

__all__ = ["moments"]


def moments(
    x: Any,
    *,
    axis: int = 1,
    mask: Any = None,
    weights: Any = None,
    split_every: int = 8,
) -> Delayed:
    """Return the moments of a dask array as a delayed value.

    Parameters
    ----------
    x : dask.array.Array of float32, float64, float16 or bfloat16, at least 2 axes
        It may have any chunks, also along the channel axis.
    axis : int, default 1
        The channel axis. Negative numbers count from the end.
    mask : array_like of bool, optional
        True for values that are used. It is a dask array or any other array. With as many axes as
        `x` it must be broadcastable to `x`. With fewer it applies to all channels, and must be
        broadcastable to the shape of `x` without the channel axis.
    weights : array_like, optional
        How often each value counts, with a shape as for `mask`.
    split_every : int, default 8
        How many moments are merged at a time, at least 2. It may change the last bits of the
        result.

    Returns
    -------
    dask.delayed.Delayed
        The `Moments`. Compute them with ``moments(x).compute()`` or, with others, `dask.compute`.

    Raises
    ------
    TypeError
        If `x` is not a dask array. When the result is computed, also as in `Moments.update`.
    ValueError
        If a shape does not fit, or `split_every` is less than 2. When the result is computed, also
        as in `Moments.update`.

    Notes
    -----
    A chunk is measured by one thread, with the memory of that chunk and its mask. Of the other
    chunks only the moments are in memory, 32 bytes per channel. Chunks of 10 to 100 MB are a good
    size.

    Examples
    --------
    >>> import dask.array as da
    >>> import cybn.dask
    >>> x = da.from_array([[0.0], [2.0], [4.0], [6.0]], chunks=(2, 1))
    >>> cybn.dask.moments(x).compute()
    Moments(count=4, mean=[3.], var=[5.])
    """
    if not isinstance(x, da.Array):
        raise TypeError(
            f"x is of type {type(x).__name__}; it must be a dask.array.Array, such as "
            "dask.array.from_array(x); for other arrays there is Moments.update"
        )
    axis = channel_axis(x, axis)
    split_every = integer_from("split_every", split_every, 2)
    given = {"mask": mask, "weights": weights}
    chosen = {name: _spread(name, v, x, axis) for name, v in given.items() if v is not None}
    blocks = np.moveaxis(_blocks(x, x.numblocks), axis, 0)
    selections = {name: np.moveaxis(_blocks(v, x.numblocks), axis, 0) for name, v in chosen.items()}
    of_channels = []
    for c, channel_blocks in enumerate(blocks):
        parts = []
        for place in np.ndindex(channel_blocks.shape):
            options = {name: v[(c, *place)] for name, v in selections.items()}
            parts.append(_measure(channel_blocks[place], axis, **options))
        while len(parts) > 1:
            starts = range(0, len(parts), split_every)
            parts = [_merge(parts[start : start + split_every]) for start in starts]
        of_channels.append(parts[0])
    return of_channels[0] if len(of_channels) == 1 else _beside(of_channels)


def _spread(name: str, values: Any, x: Any, axis: int) -> Any:
    """Return a mask or weights with the axes and chunks of `x`; an axis may have size 1."""
    if not isinstance(values, da.Array):
        values = da.from_array(np.asarray(values), chunks=-1)
    if values.ndim < x.ndim:
        rest = x.ndim - 1 - values.ndim
        values = values[(np.newaxis,) * rest + (...,)]
        values = values[(slice(None),) * axis + (np.newaxis, ...)]  # expand_dims needs known sizes
    sizes = zip(values.shape, x.shape, strict=False)
    if values.ndim != x.ndim or any(a not in (1, b) for a, b in sizes if b == b):
        without = x.shape[:axis] + x.shape[axis + 1 :]
        raise ValueError(
            f"{name} has shape {values.shape}; it must be broadcastable to {x.shape}, the shape of "
            f"x, or to {without}, that without its channel axis"
        )
    chunks = [(1,) if n == 1 else c for n, c in zip(values.shape, x.chunks, strict=True)]
    if not any(math.isnan(size) for axis in (*values.chunks, *chunks) for size in axis):
        return values.rechunk(tuple(chunks))
    if list(map(len, values.chunks)) != list(map(len, chunks)):  # sizes are compared when computed
        raise ValueError(
            f"{name} has {values.numblocks} chunks, and x has {x.numblocks}, of unknown sizes, so "
            "that they cannot be cut anew. Call compute_chunk_sizes() on both first"
        )
    return values


def _blocks(array: Any, shape: tuple[int, ...]) -> Any:
    """Return the chunks of an array as delayed values, repeated along axes of size 1."""
    return np.broadcast_to(array.to_delayed(), shape)


@delayed(pure=True)
def _measure(block: Any, axis: int, mask: Any = None, weights: Any = None) -> Moments:
    """Return the moments of a chunk."""
    nothing = Moments.empty(block.shape[axis])
    return nothing.update(block, axis=axis, mask=mask, weights=weights, num_threads=1)


@delayed(pure=True)
def _merge(parts: list[Moments]) -> Moments:
    """Return the moments of several parts, in their order."""
    return reduce(Moments.merge, parts)


@delayed(pure=True)
def _beside(parts: list[Moments]) -> Moments:
    """Return the moments of all channels, given parts with some channels each."""
    counts = [np.broadcast_to(np.asarray(part.count), len(part)) for part in parts]
    states = [part.state_dict() for part in parts]
    state = {name: np.concatenate([s[name] for s in states]) for name in ("mean", "m2", "rest")}
    if any("std" in s for s in states):  # present if an m2 overflows float64
        state["std"] = np.concatenate([part.std() for part in parts])
    count = np.concatenate(counts)
    alike = not any(isinstance(part.count, np.ndarray) for part in parts)
    one = parts[0].count if alike and (count == count[0]).all() else count
    return Moments.from_state_dict(state | {"count": one})
