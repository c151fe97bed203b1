"""What is measured: an operation on a batch, the arrays it needs, and the right result."""

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
THREADS = min(2, usable_cpus())  # the speed targets are for two
FIRST, LAST = "channels-first", "channels-last"
FRESH, REUSED = "fresh", "reused"  # the output: a new array, or the same one every time
ROWS = ("layer", "rms")  # norms of the last axis, which have no channels-last

# Largest error of a peer that is timed, relative to the largest right value. It allows for a plain
# float sum over millions of values, which some peers use.
TOLERANCE = {"float64": 2.0**-38, "float32": 2.0**-9, "float16": 0.01, "bfloat16": 0.04}
AT_THE_KINK = 1e-4  # share of values that may be so near a kink that either slope is right
_CHECKED = 1 << 21  # values that are checked, about


def aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """Return zeros that start on a cache line, like arrays that the peers create."""
    size = prod(shape) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


class Task(NamedTuple):
    """What every contestant of a case has to do."""

    operation: str  # forward (training), inference, backward
    shape: tuple[int, ...]  # (N, C, *spatial), or (..., C) for the norms of rows
    norm: str = "batch"  # layer, rms, group, instance
    dtype: str = "float32"
    threads: int = THREADS
    groups: int = 0
    activation: str = ""
    residual: bool = False
    masked: bool = False  # a third of the positions is masked
    module: bool = False  # through a layer that keeps running statistics

    @property
    def work(self) -> str:
        """The operation and its options, for example "backward, relu + residual"."""
        extra = [self.activation] * bool(self.activation) + ["residual"] * self.residual
        words = [" + ".join(extra), "masked" * self.masked, "through a layer" * self.module]
        return ", ".join(filter(None, [self.operation, *words]))

    @property
    def alone(self) -> bool:
        """Whether it is a norm without options."""
        return not (self.activation or self.residual or self.masked or self.module)

    @property
    def plain(self) -> bool:
        """Whether it is batch normalization in float32 or float64 without options."""
        return self.alone and self.norm == "batch" and self.dtype in ("float32", "float64")

    @property
    def layouts(self) -> list[str]:
        """The memory layouts that the shape can have."""
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
        """The least memory traffic: of x and y, or dy, x and dx, and of the residual."""
        arrays = 3 + 2 * self.residual if self.operation == "backward" else 2 + self.residual
        return self.nbytes * arrays


class Arrays(NamedTuple):
    """The arguments of a call, in one layout."""

    x: Array
    dy: Array
    residual: Array
    mask: Array | None
    gamma: Array
    beta: Array
    mean: Array
    var: Array


class Data:
    """The arrays of a shape, each created when it is first used.

    Contestants share them, also the outputs, so that many contestants fit in memory.
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
        """Return all arguments; for half types, gamma, beta and statistics are float32."""
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
        """Return a sample of the right result, in float64, from `cybn.reference`."""
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
        """Return an index of what is checked: some channels for batch norm, else some samples."""
        axis = 1 if task.norm == "batch" else 0
        size = self.shape[axis]
        count = min(size, max(2, _CHECKED * size // prod(self.shape)))
        chosen = sorted({round(i) for i in np.linspace(0, size - 1, count)})
        return (slice(None), chosen) if axis else (chosen,)


def first_of(result: Any) -> Any:
    """Return y or dx from the result of a call."""
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
    """A call that does a task and is ready to run: its arrays exist, its code is compiled."""

    layout: str
    output: str
    call: Callable[[], object]  # does the work once, and returns the output
    read: Callable[[Any], Any] = first_of  # that output as an array, in this layout
    note: str = ""
    many: Callable[[int], object] | None = None  # does it several times, if that is fairer
    before: Callable[[], object] = lambda: None  # called before a turn, for example to set threads
    answer: Callable[[Any], Array] | None = None  # a sample of the result, if it is not the norm's
    info: dict[str, Any] = field(default_factory=dict)  # fields of its record
    estimate: float = 0.0  # seconds of a call
    calls: int = 1  # timed calls in a turn
    turns: list[float] = field(default_factory=list)  # seconds
    stats: Any = None  # of pytest-benchmark


class Peer(ABC):
    """A library that can do some of the tasks; modules of `bench.peers` define them.

    The constructor raises ImportError or OSError if the library is not installed.
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
    everywhere = True  # whether it takes part in cases that do not name it

    @abstractmethod
    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield a contestant for every layout and output; none if the peer cannot do the task."""
