"""The error bounds that cybn promises, as formulas, and the exact values to compare with."""

import numpy as np

from cybn import reference

ULP32, ULP64 = 2.0**-21, 2.0**-48  # eight roundings of float32 and of float64
REPEATED = 4  # factor of the bound if x repeats a few values (docs/math.md, 6.5)


def wide(*arrays):
    """Return the arrays in float64 if all are float32, otherwise in long double.

    The reference computes in the type of its input, so that it has 29 or 11 bits more.
    """
    given = [None if a is None else np.asarray(a) for a in arrays]
    narrow = all(a is None or a.dtype == np.float32 for a in given)
    return [None if a is None else a.astype(np.float64 if narrow else np.longdouble) for a in given]


def column(v, ndim, axis):
    """Return the vector `v` with axes added, to broadcast along the channel axis `axis`."""
    shape = [1] * ndim
    shape[axis] = -1
    return np.reshape(v, shape)


def forward_bound(x, gamma, beta, axis, eps=1e-5, mean=None, var=None):
    """Return the exact y and the allowed error of each element.

    float32: 2**-21 * (|gamma * xhat| + |gamma| + |beta|);
    float64: 2**-48 * (|gamma * xhat| + |gamma| * (1 + |mean| / std) + |beta|).
    """
    axis = axis % x.ndim
    wx, g, b = wide(x, gamma, beta)
    if mean is None:
        exact, _ = reference.batch_norm(wx, g, b, axis=axis, eps=eps)
        others = tuple(i for i in range(x.ndim) if i != axis)
        mean = wx.mean(others)
        var = ((wx - column(mean, x.ndim, axis)) ** 2).mean(others)
    else:
        mean, var = wide(mean, var)
        exact = reference.batch_norm_inference(wx, mean, var, g, b, axis=axis, eps=eps)
    g = column(np.ones(x.shape[axis]) if gamma is None else gamma, x.ndim, axis)
    b = column(np.zeros(x.shape[axis]) if beta is None else beta, x.ndim, axis)
    std = np.sqrt(column(var, x.ndim, axis) + eps)
    offset = np.abs(column(mean, x.ndim, axis)) / std
    scaled = np.abs(g * (wx - column(mean, x.ndim, axis)) / std)
    if x.dtype == np.float32:
        return exact, ULP32 * (scaled + np.abs(g) + np.abs(b))
    return exact, ULP64 * (scaled + np.abs(g) * (1 + offset) + np.abs(b))


def worst(got, exact, bound):
    """Return the largest ratio of an element's error to its bound."""
    return float(np.max(np.abs(got - exact) / bound))
