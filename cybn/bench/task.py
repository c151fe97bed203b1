"""What is measured: one operation on one batch, and the batch with its right answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import reference
from .shapes import Shape

__all__ = [
    "EPS",
    "FIRST",
    "FRESH",
    "LAST",
    "LAYOUTS",
    "OPERATIONS",
    "REUSED",
    "Contestant",
    "Data",
    "Peer",
    "Task",
    "aligned",
]

Array = NDArray[Any]

EPS = 1e-5

FIRST, LAST = "channels-first", "channels-last"
LAYOUTS = [FIRST, LAST, "nChw8c", "nChw16c"]  # the last two are oneDNN's: blocks of channels
FRESH, REUSED = "fresh", "reused"

# Operation: arrays of the size of x that memory moves at least (x and y; dy, x and dx).
OPERATIONS = {"forward": 2, "inference": 2, "backward": 3, "layer": 2}

_CHECKED_IN_FULL = 1 << 18  # elements; of larger batches a sample of channels is checked
_SAMPLE = 1 << 21  # elements of that sample, about


def aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """Return an uninitialized array that starts on a cache line, as the peers' own arrays do."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


class Data:
    """A batch: x, dy and parameters, arranged on demand, and the right answers.

    Contestants share the arrays, outputs included, so that many of them fit in memory.

    Parameters
    ----------
    shape : Shape
        Sizes of the batch.
    dtype : dtype
        float32 or float64.
    seed : int, default 0
        Of the random numbers.
    """

    def __init__(self, shape: Shape, dtype: np.dtype[Any], seed: int = 0) -> None:
        self.shape, self.dtype = shape, dtype
        rng = np.random.default_rng(seed)
        self.gamma = rng.uniform(0.5, 1.5, shape.c).astype(dtype)
        self.beta = rng.uniform(-1, 1, shape.c).astype(dtype)
        self.mean = rng.uniform(-1, 1, shape.c).astype(dtype)
        self.var = rng.uniform(0.5, 1.5, shape.c).astype(dtype)
        self._x, self._dy = self._normal(rng), self._normal(rng)
        self._cache: dict[tuple[str, str], Array] = {}

    def _normal(self, rng: np.random.Generator) -> Array:
        values = aligned(self.shape.channels_first, self.dtype)
        rng.standard_normal(out=values, dtype=self.dtype.type)
        return values

    def x(self, layout: str = FIRST) -> Array:
        """Return x in a layout."""
        return self._get("x", layout)

    def dy(self, layout: str = FIRST) -> Array:
        """Return dy in a layout."""
        return self._get("dy", layout)

    def out(self, layout: str = FIRST) -> Array:
        """Return the output that all contestants of a layout share."""
        return self._get("out", layout)

    def _get(self, name: str, layout: str) -> Array:
        if (name, layout) not in self._cache:
            first = self._dy if name == "dy" else self._x
            if layout != FIRST:
                self._cache[name, layout] = arrange(first, layout)
            elif name == "out":
                self._cache[name, layout] = aligned(first.shape, first.dtype)
            else:
                return first
        return self._cache[name, layout]

    # ---- the right answers -------------------------------------------------------------------

    @cached_property
    def channels(self) -> list[int]:
        """Channels that are checked: all of a small batch, else some, first and last included."""
        c, size = self.shape.c, self.shape.size
        if size <= _CHECKED_IN_FULL:
            return list(range(c))
        count = min(c, max(2, min(8, _SAMPLE * c // size)))
        return sorted({round(i) for i in np.linspace(0, c - 1, count)})

    @cached_property
    def _expected(self) -> dict[str, Array]:
        return {}

    def expected(self, operation: str) -> Array:
        """Return `channels` of y, or of dx, in float64, from `cybn.reference`."""
        if operation not in self._expected:
            self._expected[operation] = self._reference(operation)
        return self._expected[operation]

    def _reference(self, operation: str) -> Array:
        k = self.channels
        x, gamma, beta = self._x[:, k], self.gamma[k], self.beta[k]
        if operation == "inference":
            return reference.batch_norm_inference(
                x, self.mean[k], self.var[k], gamma, beta, eps=EPS
            )
        y, moments = reference.batch_norm(x, gamma, beta, eps=EPS)
        if operation in ("forward", "layer"):
            return y
        return reference.batch_norm_backward(self._dy[:, k], x, moments, gamma, eps=EPS)[0]

    @property
    def tolerance(self) -> float:
        """Largest error, against the largest right value, of a peer that is timed.

        Wide enough for a plain float sum over millions of values, which some of them use.
        """
        return 2.0**14 * float(np.finfo(self.dtype).eps)


def arrange(first: Array, layout: str) -> Array:
    """Copy a channels-first array to another layout; blocks are padded with zeros."""
    if layout == LAST:
        last = aligned((first.shape[0], *first.shape[2:], first.shape[1]), first.dtype)
        np.copyto(np.moveaxis(last, -1, 1), first)
        return last
    block = block_size(layout)
    n, c, *spatial = first.shape
    blocks = -(-c // block)
    blocked = aligned((n, blocks, *spatial, block), first.dtype)
    whole, rest = divmod(c, block)
    lanes = np.moveaxis(blocked, -1, 2)  # (N, blocks, block, *spatial)
    lanes[:, :whole] = first[:, : whole * block].reshape(n, whole, block, *spatial)
    if rest:
        lanes[:, whole, :rest] = first[:, whole * block :]
        lanes[:, whole, rest:] = 0
    return blocked


def pick(array: Array, layout: str, channels: Sequence[int]) -> Array:
    """Return some channels of an array that lies in `layout`, channels-first."""
    if layout == FIRST:
        return array[:, channels]
    if layout == LAST:
        return np.moveaxis(array[..., channels], -1, 1)
    block = block_size(layout)
    return np.stack([array[:, c // block, ..., c % block] for c in channels], axis=1)


def block_size(layout: str) -> int:
    """Return b of a layout named ``nChw<b>c``: blocks of b channels, innermost."""
    return int(layout.removeprefix("nChw").removesuffix("c"))


class Task(NamedTuple):
    """What one contestant has to do."""

    operation: str
    layout: str
    output: str
    threads: int
    data: Data


@dataclass
class Contestant:
    """A task made ready to run: arrays arranged, code compiled."""

    peer: str
    layout: str
    output: str
    call: Callable[[], object]  # does the work once and returns the output
    read: Callable[[Any, Sequence[int]], Array]  # channels of that output, channels-first
    note: str = ""
    many: Callable[[int], object] | None = None  # does it several times, where that is quicker
    first: float = 0.0  # seconds of the call that was checked

    @property
    def name(self) -> str:
        """Peer, layout and output in few words."""
        return " ".join(filter(None, (self.peer, self.layout, self.output)))


class Peer(Protocol):
    """Somebody who can do batch normalization.

    Making one raises ImportError or OSError where it is not installed.
    """

    name: str
    install: str  # how to get it
    version: str
    note: str  # how it is called

    def variants(self, operation: str, dtype: np.dtype[Any], threads: int) -> list[tuple[str, str]]:
        """Return the (layout, output) pairs it can do; none where it cannot do the operation."""
        ...

    def prepare(self, task: Task) -> Contestant:
        """Arrange everything that is not to be timed."""
        ...
