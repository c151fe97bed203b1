"""Cases of layer, RMS, group and instance normalization, and their error bounds.

All bounds are computed on rows: (N, G, D), where the D values of a row share mean and variance.
"""

from dataclasses import dataclass, field
from math import prod

import numpy as np
import pytest
from bounds import ULP32, ULP64, wide

import cybn
from cybn import reference


@dataclass(frozen=True)
class Case:
    """One norm on one shape."""

    member: str  # layer, rms, group, instance
    shape: tuple
    axis: int = 1
    groups: int = 0
    options: dict = field(default_factory=dict, compare=False)

    @property
    def centred(self):
        return self.member != "rms"

    @property
    def last_axes(self):
        return self.member in ("layer", "rms")

    @property
    def parameter_shape(self):
        return self.shape[self.axis :] if self.last_axes else (self.shape[self.axis],)

    def keywords(self):
        more = {"num_groups": self.groups} if self.member == "group" else {}
        return {"axis": self.axis, **more, **self.options}

    def forward(self, x, gamma=None, beta=None, module=cybn, **k):
        """Return y and the statistics."""
        function = getattr(module, f"{self.member}_norm")
        parameters = (gamma, beta) if self.centred else (gamma,)
        return function(x, *parameters, **self.keywords(), **k)

    def backward(self, dy, x, statistics, gamma=None, module=cybn, **k):
        """Return dx, dgamma and, if the norm has it, dbeta."""
        function = getattr(module, f"{self.member}_norm_backward")
        return function(dy, x, statistics, gamma, **self.keywords(), **k)

    def everything(self, x, dy, gamma, beta, module=cybn, **k):
        """Return all results by name."""
        y, statistics = self.forward(x, gamma, beta, module, **k)
        found = self.backward(dy, x, statistics, gamma, module, **k)
        results = {"y": y} | dict(zip(("dx", "dgamma", "dbeta"), found, strict=False))
        if self.centred:
            return results | {"mean": statistics.mean, "m2": statistics.m2}
        return results | {"mean_square": statistics}

    def rows(self, a):
        """Return an array of the case's shape as (N, G, D)."""
        if self.last_axes:
            return a.reshape(prod(self.shape[: self.axis]), 1, prod(self.parameter_shape))
        moved = np.moveaxis(a, self.axis, 1)
        groups = self.groups or moved.shape[1]
        return moved.reshape(len(moved), groups, prod(moved.shape[1:]) // groups)

    def put(self, a, index, values):
        """Set `values` at an index of the rows of an array."""
        rows = self.rows(a)  # a copy unless the channels come first
        rows[index] = values
        moved = a if self.last_axes else np.moveaxis(a, self.axis, 1)
        moved[...] = rows.reshape(moved.shape)

    def sample(self):
        """Return the index in a row of the first of the values whose mean is the pivot."""
        size = self.rows(np.empty(self.shape, bool)).shape[2]
        if self.axis == 1 or self.last_axes:
            return size // 16
        channels = self.shape[self.axis] // (self.groups or self.shape[self.axis])
        return size // 16 % channels * (size // channels) + size // 16 // channels

    def along(self, v):
        """Return gamma or beta as (G, D)."""
        if self.last_axes:
            return v.reshape(1, -1)
        groups = self.groups or v.size
        return np.repeat(v, prod(self.shape) // (self.shape[0] * v.size)).reshape(groups, -1)

    def data(self, rng, dtype, offset=0.0):
        """Return random x, dy, gamma and beta."""
        x = (rng.standard_normal(self.shape) + offset).astype(dtype)
        dy = rng.standard_normal(self.shape).astype(dtype)
        gamma = rng.uniform(0.5, 2, self.parameter_shape).astype(dtype)
        beta = rng.standard_normal(self.parameter_shape).astype(dtype)
        return x, dy, gamma, beta

    def __str__(self):
        axis = "" if self.axis == 1 or self.last_axes else f"-axis{self.axis}"
        groups = f"-g{self.groups}" if self.groups else ""
        return f"{self.member}-{'x'.join(map(str, self.shape))}{groups}{axis}"


def layer(*shape, axis=-1):
    return Case("layer", shape, axis)


def rms(*shape, axis=-1):
    return Case("rms", shape, axis)


def group(groups, *shape, axis=1):
    return Case("group", shape, axis, groups)


def instance(*shape, axis=1):
    return Case("instance", shape, axis)


# One shape for each path through the kernels: short rows; rows of several tiles; several blocks and
# chunks of rows; rows of several segments; then columns spread over channels; runs; runs in
# segments. Then channels-last: one or several positions as a row of the loops; several cuts;
# several blocks of channels, with a group across their border.
CASES = [
    layer(9, 7),
    layer(3000, 33),
    layer(67, 1025),
    layer(5, 3, 4, 6, axis=-3),
    layer(2, 70001),
    rms(9, 7),
    rms(700, 130),
    rms(2, 3, 70001),
    group(2, 5, 8),
    group(3, 4, 12, 7, 7),
    group(4, 300, 8, 5, 5),
    group(1, 2, 140, 511),
    group(2, 3, 6, 515),
    group(1, 2, 3, 70001),
    group(2, 3, 5, 7, 8, axis=-1),
    instance(3, 5, 11),
    instance(40, 3, 4, 4, 4),
    instance(2, 3, 25, 25),
    instance(1, 2, 131073),
    instance(3, 9, 8, 4, axis=-1),
    instance(5, 70, 3, axis=-1),
    instance(2, 63, 70, 30, axis=-1),
    group(11, 1, 4000, 33, axis=-1),
    group(3, 2, 9, 2058, axis=-1),
]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def forward_bound(case, x, gamma, beta):
    """Return the exact y and the allowed error of each element, as rows.

    The bound is that of batch normalization, with the mean and standard deviation of the row. For
    RMS normalization it is 2**-21 * |y| in float32 and 2**-48 * |y| in float64.
    """
    wx, g, b = wide(x, gamma, beta)
    exact, _ = case.forward(wx, g, b, module=reference, **eps_of(case, x))
    exact, wx = case.rows(exact), case.rows(wx)
    ulp = ULP32 if x.dtype == np.float32 else ULP64
    if not case.centred:
        return exact, ulp * np.abs(exact)
    mean, std = row_statistics(case, wx)
    g, b = np.abs(case.along(g)), np.abs(case.along(b))
    offset = 0 if x.dtype == np.float32 else np.abs(mean) / std
    return exact, ulp * (g * np.abs(wx - mean) / std + g * (1 + offset) + b)


def row_statistics(case, wx):
    """Return the mean and standard deviation of each row, shape (N, G, 1)."""
    eps = case.options.get("eps", 1e-5 if case.centred else np.finfo(np.float32).eps)
    if not case.centred:
        return 0, np.sqrt((wx * wx).mean(2, keepdims=True) + eps)
    return wx.mean(2, keepdims=True), np.sqrt(wx.var(2, keepdims=True) + eps)


def backward_bound(case, dy, x, gamma):
    """Return the exact gradients and the allowed error of each, with dx as rows.

    With dz = dy * gamma and size = |xhat| + 1, to which float64 adds |mean| / std:
    dbeta: ulp * sum |dy|;  dgamma: ulp * sum (|dy| * size);
    dx: ulp * r * (|dz| + mean |dz| + size * mean (|dz| * size)).
    """
    wdy, wx, g = wide(dy, x, gamma)
    _, statistics = case.forward(wx, module=reference, **eps_of(case, x))
    exact = list(case.backward(wdy, wx, statistics, g, module=reference, **eps_of(case, x)))
    exact[0] = case.rows(exact[0])
    wdy, wx = np.abs(case.rows(wdy)), case.rows(wx)
    mean, std = row_statistics(case, wx)
    size = np.abs(wx - mean) / std + 1
    if x.dtype == np.float64:
        size = size + np.abs(mean) / std
    ulp = ULP32 if x.dtype == np.float32 else ULP64
    dz = wdy * np.abs(case.along(g))
    dx = dz + dz.mean(2, keepdims=True) + size * (dz * size).mean(2, keepdims=True)
    sums = [(wdy * size).sum(0), wdy.sum(0)]
    bounds = [v.reshape(*case.parameter_shape, -1).sum(-1) for v in sums]
    return exact, [ulp * dx / std, *(ulp * v for v in bounds)]


def eps_of(case, x):
    """Return the eps that RMS normalization uses by default for the dtype, for the reference."""
    given = case.centred or "eps" in case.options
    return {} if given else {"eps": float(np.finfo(x.dtype).eps)}


def laid_out(a):
    """Yield views equal to `a` with other strides."""
    yield "Fortran order", np.asfortranarray(a)
    order = np.roll(np.arange(a.ndim), 1)
    yield "axes turned", np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))
    yield (
        "reversed",
        np.ascontiguousarray(np.flip(a)).reshape(a.shape)[(slice(None, None, -1),) * a.ndim],
    )
    for axis in range(a.ndim):
        shape = list(a.shape)
        shape[axis] *= 2
        room = np.full(shape, np.nan, a.dtype)
        part = room[(slice(None),) * axis + (slice(None, None, 2),)]
        part[...] = a
        yield f"step 2 along axis {axis}", part
    if a.ndim > 2:
        turned = np.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1)
        yield "first axes swapped", turned
    room = np.zeros(a.nbytes + 1, np.uint8)
    off = room[1:].view(a.dtype).reshape(a.shape)
    off[...] = a
    yield "unaligned", off
    yield "byte-swapped", a.astype(a.dtype.newbyteorder())
    yield "read-only", np.broadcast_to(a, a.shape)


LAYOUTS = [layer(6, 5, 40), layer(6, 5, 8, 3, axis=-2), rms(6, 5, 40), group(2, 5, 6, 4, 3)]
LAYOUTS += [group(2, 5, 4, 3, 6, axis=-1), instance(5, 6, 4, 150), instance(5, 4, 6, axis=-1)]
