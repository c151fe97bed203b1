"""One fuzz case as plain data, drawn from a random.Random, which a seed or hypothesis provides.

`draw(dice)` chooses a case, `fuzz_arrays.build` makes its arrays. All memory around a view is NaN.
"""

from dataclasses import dataclass, field
from math import prod

import ml_dtypes
import numpy as np

from cybn import _runtime

LEVELS = _runtime.usable_levels()
THREADS = (1, 2, 3, 4, 7, 16)
BATCH = ("forward", "inference", "backward", "inference_backward", "moments")
FAMILY = tuple(m + b for m in ("layer", "rms", "group", "instance") for b in ("", "_backward"))
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "hardswish", "sigmoid", "tanh", "silu", "gelu")
DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
KINDS = (
    *("normal", "normal", "normal", "offset", "constant", "tiny", "huge", "poison", "subnormal"),
    *("integers", "mixed", "outlier"),
)
SMALL = (1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 13, 17)
EDGES = (15, 16, 31, 32, 64, 128, 256, 512, 1024)  # `near` also draws one less or one more
HUGE_EDGES = (2048, 4096, 16384, 32768, 65536)


def near(dice, edges):
    return dice.choice(edges) + dice.choice((-1, 0, 0, 1))


def draw_shape(dice, ndim):
    """Return a shape: mostly small, some at the borders of tiles, a few of many blocks."""
    style = dice.random()
    if style < 0.88:
        shape, most = [dice.choice(SMALL) for _ in range(ndim)], 3000
    elif style < 0.985:
        shape, most = [dice.choice((1, 2, 3, 5)) for _ in range(ndim)], 20_000
        for _ in range(dice.choice((1, 1, 2))):
            shape[dice.randrange(ndim)] = near(dice, EDGES)
    else:  # enough for threads, chunks and segments
        shape, most = [dice.choice((1, 2, 3, 8)) for _ in range(ndim)], 130_000
        shape[dice.randrange(ndim)] = near(dice, EDGES + HUGE_EDGES)
        longest = dice.randrange(ndim)
        rest = prod(shape) // shape[longest]
        shape[longest] = max(1, dice.randint(66_000, most) // rest)
    while prod(shape) > most:
        shape[shape.index(max(shape))] //= 2
    return tuple(shape)


@dataclass(frozen=True)
class View:
    """The layout of an array in its buffer."""

    order: tuple  # order of the axes in memory
    steps: tuple  # step of each axis
    margins: tuple  # elements before and after, along each axis
    shift: int = 0  # bytes before the first element
    stretched: tuple = ()  # axes of stride 0
    swapped: bool = False  # whether the byte order is not native
    read_only: bool = False

    @property
    def may_be_out(self):
        return not (self.stretched or self.swapped or self.read_only)

    def empty(self, shape, dtype):
        """Return a buffer of NaN and a view of it that has one value on each stretched axis."""
        shape = [1 if i in self.stretched else n for i, n in enumerate(shape)]
        sizes = [
            abs(k) * n + 2 * m for n, k, m in zip(shape, self.steps, self.margins, strict=True)
        ]
        space = prod(sizes) * dtype.itemsize
        buffer = np.full(space + 72, 255, np.uint8)  # in every type, all bits set is a NaN
        start = -buffer.ctypes.data % 64 + self.shift
        if start + space > buffer.size:
            start -= 64
        start = max(start, self.shift % 8)
        base = buffer[start : start + space].view(dtype)
        base = base.reshape([sizes[i] for i in self.order]).transpose(np.argsort(self.order))
        return buffer, base

    def cut(self, base, shape, by=0):
        """Return the view of `base`, moved `by` elements along the first axis that has room."""
        index = []
        for i, (k, m) in enumerate(zip(self.steps, self.margins, strict=True)):
            n = 1 if i in self.stretched else shape[i]
            go = 0
            if by and m and n > 1:
                go, by = by, 0
            first = m + go if k > 0 else m + go + abs(k) * n - 1
            last = first + k * n
            index.append(slice(first, last if last >= 0 else None, k))
        return base[tuple(index)]

    def lay(self, values):
        """Return (array, buffer, base) with these values; a stretched axis repeats its first."""
        dtype = values.dtype.newbyteorder() if self.swapped else values.dtype
        buffer, base = self.empty(values.shape, values.dtype)
        base = base.view(dtype) if self.swapped else base
        view = self.cut(base, values.shape)
        some = values[
            tuple(slice(1) if i in self.stretched else slice(None) for i in range(values.ndim))
        ]
        view[...] = some
        array = np.broadcast_to(view, values.shape) if self.stretched else view
        if self.read_only:
            array.setflags(write=False)
        return array, buffer, base


def draw_view(dice, ndim, dtype, writable=False):
    """Return a layout: plain, or unusual in one way or several."""
    plain = tuple(range(ndim))
    ones, zeros = (1,) * ndim, (0,) * ndim
    kind = dice.choice(
        ("C", "C", "F", "order", "slice", "step", "negative", "unaligned", "offset", "mixed")
        + (() if writable else ("broadcast", "read-only", "swapped"))
    )
    if kind == "F":
        return View(plain[::-1], ones, zeros)
    if kind == "order":
        return View(tuple(dice.sample(plain, ndim)), ones, zeros)
    if kind == "slice":
        return View(plain, ones, tuple(dice.choice((0, 0, 1, 3)) for _ in plain))
    if kind == "step":
        return View(plain, tuple(dice.choice((1, 1, 2, 3)) for _ in plain), zeros)
    if kind == "negative":
        return View(plain, tuple(dice.choice((1, -1)) for _ in plain), zeros)
    if kind == "unaligned":
        return View(plain, ones, zeros, shift=dice.randrange(1, dtype.itemsize))
    if kind == "offset":
        return View(plain, ones, zeros, shift=dtype.itemsize * dice.randint(1, 8 // dtype.itemsize))
    if kind == "mixed":
        steps = tuple(dice.choice((-2, -1, 1, 1, 1, 2)) for _ in plain)
        margins = tuple(dice.choice((0, 0, 1, 2)) for _ in plain)
        return View(tuple(dice.sample(plain, ndim)), steps, margins)
    stretched = tuple(i for i in plain if dice.random() < 0.5) if kind == "broadcast" else ()
    swapped = kind == "swapped" and dtype.name != "bfloat16"
    order = tuple(dice.sample(plain, ndim)) if dice.random() < 0.3 else plain
    return View(order, ones, zeros, 0, stretched, swapped, kind == "read-only")


# ---- values ------------------------------------------------------------------------------


def powers(dtype):
    """Return the largest powers of ten for a type: of scales, and of offsets in units of scale."""
    return {"float32": (15, 5), "float64": (120, 9), "float16": (2, 2), "bfloat16": (15, 2)}[
        dtype.name
    ]


def values(kind, shape, axis, dtype, rng):
    """Return an array with values of the given kind."""
    most, far = powers(dtype)
    x = rng.standard_normal(shape)
    per_channel = [1] * len(shape)
    per_channel[axis] = shape[axis]
    if kind == "offset":
        x += rng.choice([-1, 1], per_channel) * 10 ** rng.uniform(0, far, per_channel)
    elif kind == "constant":
        x[...] = rng.choice([0, 0.1, 1, -7, 3e-5, 1e4], per_channel)
    elif kind == "tiny":
        x *= 10.0 ** -rng.uniform(0, most)
    elif kind == "huge":
        x *= 10.0 ** rng.uniform(0, most)
    elif kind == "subnormal":
        info = ml_dtypes.finfo(dtype)
        x = np.round(4 * x) * float(info.smallest_subnormal)
    elif kind == "integers":
        x = np.round(2 * x)
    elif kind == "mixed":
        x *= 10.0 ** rng.uniform(-far, far, per_channel)
    elif kind == "outlier" and x.size:
        x.flat[rng.integers(x.size)] *= 10.0**far
    elif kind == "poison" and x.size:
        x.flat[rng.integers(x.size)] = rng.choice([np.nan, np.inf, -np.inf])
    return x.astype(dtype)


# ---- cases -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """All choices of a case. `views` are the layouts of x, dy, residual and out."""

    op: str  # an operation of BATCH or FAMILY
    shape: tuple
    axis: int
    dtype: str
    kind: str  # kind of the values
    views: dict
    seed: int  # seed of the values
    eps: float | None
    gamma: str | None  # its dtype, None if it is not given
    beta: str | None
    threads: int
    level: str
    small: bool  # whether kernels assume small caches, so that results are written past them
    out: str  # new, given, overlap, or the name of an input to overwrite
    flags: dict = field(default_factory=dict)
    groups: int = 0


def draw(dice, op=None):
    """Choose a case."""
    op = op or dice.choice(BATCH + BATCH + FAMILY)
    if op in FAMILY:
        return draw_family(dice, op)
    ndim = dice.choice((2, 3, 3, 4, 4, 5))
    shape = draw_shape(dice, ndim)
    dtype = dice.choice(("float32", "float32", "float32", "float64", "float64", *DTYPES))
    axis = dice.randrange(-ndim, ndim)
    flags = draw_flags(dice, op, shape, axis % ndim)
    return Case(
        op=op,
        shape=shape,
        axis=axis,
        kind=dice.choice(KINDS),
        eps=dice.choice((1e-5, 1e-5, 1e-3, 0.5, 1e-10, *((0.0,) if "inference" in op else ()))),
        flags=flags,
        **draw_common(dice, op, ndim, dtype, flags),
    )


def draw_common(dice, op, ndim, dtype, flags):
    """Choose what batch normalization and the other norms have in common."""
    names = ["x", *(["dy"] if "backward" in op else [])]
    names += ["residual"] if flags.get("residual") == "own" else []
    views = {name: draw_view(dice, ndim, DTYPES[dtype]) for name in names}
    if dice.random() < 0.4:  # the same layout for all, as in a network
        views = dict.fromkeys(names, views["x"])
    inputs = [name for name in names if views[name].may_be_out]
    out = dice.choice(("new", "new", "given", "given", "overlap", *inputs))
    if out in ("given", "overlap"):
        views["out"] = draw_view(dice, ndim, DTYPES[dtype], writable=True)
    if flags.get("out_residual"):
        views["out_residual"] = draw_view(dice, ndim, DTYPES[dtype], writable=True)
    kinds = (None, "float32", "float32", "float64")
    return {
        "dtype": dtype,
        "views": views,
        "out": out,
        "seed": dice.getrandbits(32),
        "gamma": dice.choice(kinds),
        "beta": dice.choice(kinds),
        "threads": dice.choice(THREADS),
        "level": dice.choice(LEVELS),
        "small": dice.random() < 0.4,
    }


def draw_flags(dice, op, shape, axis):
    """Choose an activation, a residual, and a selection of positions."""
    flags = {}
    if op != "moments":
        if dice.random() < 0.45:
            flags["activation"] = dice.choice(ACTIVATIONS)
            if dice.random() < 0.5:
                flags["slope"] = dice.choice((0.2, 0.01, 1.5, 0.0, -0.3))
        if dice.random() < 0.3:
            flags["residual"] = dice.choice(("own", "own", "own", "x"))
            if "backward" in op:
                flags["out_residual"] = dice.random() < 0.5
        if "backward" in op and dice.random() < 0.05:
            flags["dy_is_x"] = True
        invertible = flags.get("activation") in (None, "leaky_relu") and flags.get("slope", 1) > 0
        if "backward" in op and invertible and "residual" not in flags and dice.random() < 0.15:
            flags["from_output"] = True
        if op in ("forward", "inference") and dice.random() < 0.4:
            flags["masked"] = dice.choice(("zero", "normalize"))
    if dice.random() < 0.35:
        flags["select"] = dice.choice(
            ("mask", "weights", "lengths", "mask weights", "mask lengths")
        )
        if len(shape) < 3:
            flags["select"] = flags["select"].replace("lengths", "mask")
        rest = [n for i, n in enumerate(shape) if i != axis]
        flags["select_shape"] = tuple(1 if dice.random() < 0.2 else n for n in rest)
        flags["select_axes"] = dice.choice(("rest", "rest", "all", "fewer"))
        flags["hidden"] = dice.choice((None, "nan"))  # the content of masked values
    return flags


def draw_family(dice, op):
    ndim = dice.choice((1, 2, 3, 4) if op.startswith(("layer", "rms")) else (3, 3, 4, 5))
    shape = draw_shape(dice, ndim)
    groups = 0
    axis = dice.randrange(-ndim, ndim)
    if op.startswith(("group", "instance")):
        axis = dice.choice([i for i in range(-ndim, ndim) if i % ndim])
        channels = shape[axis]
        groups = dice.choice([g for g in range(1, channels + 1) if channels % g == 0])
    dtype = dice.choice(("float32", "float32", "float64", "float64", "float16", "bfloat16"))
    own = (None, None) if op.startswith("rms") else ()  # the machine epsilon of the type
    return Case(
        op=op,
        shape=shape,
        axis=axis,
        kind=dice.choice(KINDS),
        eps=dice.choice((1e-5, 1e-5, 1e-3, 0.5, 1e-8, *own)),
        groups=groups,
        **draw_common(dice, op, ndim, dtype, {}),
    )
