"""What is measured: an operation on a batch, the arrays it needs, and the right answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import ml_dtypes  # noqa: F401 - np.dtype("bfloat16")
import numpy as np
from numpy.typing import NDArray

from cybn import reference

from .machine import usable_cpus

Array = NDArray[Any]

EPS = 1e-5
THREADS = min(2, usable_cpus())  # the bars are for two
FIRST, LAST = "channels-first", "channels-last"
FRESH, REUSED = "fresh", "reused"  # the output: a new array, or the same one every time
ROWS = ("layer", "rms")  # normalize the last axis, and have no channels-last

# Largest error, against the largest right value, of a peer that is timed: wide enough for a plain
# float sum over millions of values, which some of them use.
TOLERANCE = {"float64": 2.0**-38, "float32": 2.0**-9, "float16": 0.01, "bfloat16": 0.04}
AT_THE_KINK = 1e-4  # share of values whose z is so near 0 that its slope may be either
_CHECKED = 1 << 21  # values that are checked, about


def aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """Return zeros that start on a cache line, as the peers' own arrays do."""
    size = prod(shape) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


class Task(NamedTuple):
    """What every contestant of a row has to do."""

    operation: str  # forward (training), inference, backward
    shape: tuple[int, ...]  # (N, C, *spatial), or (..., C) for the norms of rows
    norm: str = "batch"  # layer, rms, group, instance
    dtype: str = "float32"
    threads: int = THREADS
    groups: int = 0
    activation: str = ""
    residual: bool = False
    masked: bool = False  # a third of the positions does not count
    module: bool = False  # through a layer that keeps running statistics

    @property
    def work(self) -> str:
        """The operation and all that is not plain about it: "backward, relu + residual"."""
        extra = [self.activation] * bool(self.activation) + ["residual"] * self.residual
        words = [" + ".join(extra), "masked" * self.masked, "through a layer" * self.module]
        return ", ".join(filter(None, [self.operation, *words]))

    @property
    def alone(self) -> bool:
        """Whether it is a norm, and no more than that."""
        return not (self.activation or self.residual or self.masked or self.module)

    @property
    def plain(self) -> bool:
        """Whether it is batch normalization in float32 or float64, and no more than that."""
        return self.alone and self.norm == "batch" and self.dtype in ("float32", "float64")

    @property
    def layouts(self) -> list[str]:
        """The orders of memory that the shape can have."""
        return [FIRST] if self.norm in ROWS or len(self.shape) == 2 else [FIRST, LAST]

    @property
    def channels(self) -> int:
        """The length of gamma."""
        return self.shape[-1 if self.norm in ROWS else 1]

    @property
    def nbytes(self) -> int:
        """The size of x."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def least_bytes(self) -> int:
        """What memory moves at least: x and y, or dy, x and dx; and the residual's."""
        arrays = 3 + 2 * self.residual if self.operation == "backward" else 2 + self.residual
        return self.nbytes * arrays


class Arrays(NamedTuple):
    """What a call is given, in one layout."""

    x: Array
    dy: Array
    residual: Array
    mask: Array | None
    gamma: Array
    beta: Array
    mean: Array
    var: Array


class Data:
    """The arrays of a shape, made and arranged as they are asked for.

    Contestants share them, outputs included, so that many of them fit in memory.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._kept: dict[tuple[str, ...], Any] = {}

    def get(self, name: str, dtype: str = "float32", layout: str = FIRST) -> Array:
        """Return ``x``, ``dy``, ``residual``, ``out`` or ``out_residual`` in a layout."""
        key, sizes, kind = (name, dtype, layout), self.shape, np.dtype(dtype)
        if key in self._kept:
            return self._kept[key]
        values = aligned((sizes[0], *sizes[2:], sizes[1]) if layout == LAST else sizes, kind)
        self._kept[key] = values
        if name.startswith("out"):
            return values
        if layout == LAST:
            np.copyto(np.moveaxis(values, -1, 1), self.get(name, dtype))
        elif dtype in ("float32", "float64"):
            seed = ("x", "dy", "residual").index(name)
            np.random.default_rng(seed).standard_normal(out=values, dtype=kind.type)
        else:
            np.copyto(values, self.get(name), casting="unsafe")
        return values

    def arrays(self, task: Task, layout: str = FIRST) -> Arrays:
        """Return all arguments; gamma, beta and statistics in float32 for half types."""
        wide = "float64" if task.dtype == "float64" else "float32"
        rng = np.random.default_rng(3)
        gamma, var = rng.uniform(0.5, 1.5, (2, task.channels)).astype(wide)
        beta, mean = rng.uniform(-1, 1, (2, task.channels)).astype(wide)
        positions = (self.shape[0], *self.shape[2:])
        mask = rng.random(positions) < 2 / 3 if task.masked else None
        if mask is not None:
            mask[0] = True
        tensors = (self.get(name, task.dtype, layout) for name in ("x", "dy"))
        residual = self.get("residual", task.dtype, layout) if task.residual else np.empty(0)
        return Arrays(*tensors, residual, mask, gamma, beta, mean, var)

    def expected(self, task: Task) -> Array:
        """Return a sample of the right answer, in float64, from `cybn.reference`."""
        plain = task._replace(threads=1, module=False)
        key = ("expected", str(plain))
        if key not in self._kept:
            every, cut = self.arrays(plain), self.sample(task)
            tensors = [v[cut].astype(np.float64) if v.size else v for v in every[:3]]
            parameters = [v[cut[1]] if cut[1:] else v for v in every[4:]]
            chosen = Arrays(*tensors, every.mask, *(v.astype(np.float64) for v in parameters))
            self._kept[key] = first_of(bind(reference, plain, chosen)())
        return self._kept[key]

    def sample(self, task: Task) -> tuple[Any, ...]:
        """Return an index of what is checked: some channels, or some samples (rows) otherwise."""
        axis = 1 if task.norm == "batch" else 0
        size = self.shape[axis]
        count = min(size, max(2, _CHECKED * size // prod(self.shape)))
        chosen = sorted({round(i) for i in np.linspace(0, size - 1, count)})
        return (slice(None), chosen) if axis else (chosen,)


def first_of(result: Any) -> Any:
    """Return y or dx out of what a call returns."""
    return result[0] if isinstance(result, (tuple, list)) else result


def bind(norms: ModuleType, task: Task, a: Arrays, **options: Any) -> Callable[[], Any]:
    """Bind a call of cybn, or of its reference, which has the same signatures."""
    options |= {"eps": EPS}
    if task.groups:
        options["num_groups"] = task.groups
    if task.activation:
        options["activation"] = task.activation
    if task.residual:
        options["residual"] = a.residual
    if task.masked:
        options["mask"] = a.mask
    if task.operation == "inference":
        return partial(norms.batch_norm_inference, a.x, a.mean, a.var, a.gamma, a.beta, **options)
    parameters = (a.gamma,) if task.norm == "rms" else (a.gamma, a.beta)
    forward = getattr(norms, f"{task.norm}_norm")
    if task.operation == "forward":
        return partial(forward, a.x, *parameters, **options)
    outputs = ("out", "out_residual")
    given = {name: value for name, value in options.items() if name not in outputs}
    _, statistics = forward(a.x, *parameters, **given)
    if task.activation:
        options["beta"] = a.beta
    backward = getattr(norms, f"{task.norm}_norm_backward")
    return partial(backward, a.dy, a.x, statistics, a.gamma, **options)


@dataclass
class Contestant:
    """A task made ready to run: arrays arranged, code compiled."""

    layout: str
    output: str
    call: Callable[[], object]  # does the work once, and returns the output
    read: Callable[[Any], Any] = first_of  # that output as an array, in this layout
    note: str = ""
    many: Callable[[int], object] | None = None  # does it several times, where that is fairer
    before: Callable[[], object] = lambda: None  # before a turn, such as setting threads
    answer: Callable[[Any], Array] | None = None  # a sample of it, where the norm's is not
    info: dict[str, Any] = field(default_factory=dict)  # what the record says of it
    estimate: float = 0.0  # seconds of a call
    calls: int = 1  # timed calls in a turn
    turns: list[float] = field(default_factory=list)  # seconds
    stats: Any = None  # of pytest-benchmark


class Peer(ABC):
    """Somebody who can do some of the tasks: a module of `bench.peers` has one.

    Making one raises ImportError or OSError where it is not installed.
    """

    kinds: ClassVar[list[type[Peer]]] = []

    def __init_subclass__(cls) -> None:
        Peer.kinds.append(cls)

    name = ""
    install = ""  # how to get it
    order = 50  # of columns and rows; cybn is 0
    version = ""
    note = ""  # how it is called
    quick = True  # whether it takes part in a quick run
    everywhere = True  # or only in cases that name it

    @abstractmethod
    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield a contestant for every layout and output; nothing for what it cannot do."""
