"""Masks, weights and lengths to select with, and the values that they select."""

import numpy as np

# One shape for each path through the kernels, as (N, C, S): rows, channels of one column, several
# rows of few columns taken as one, runs, tails of runs, and chunks.
FAMILIES = [(9, 6, 7), (200, 33, 1), (61, 5, 1), (3, 5, 512), (3, 2, 1071), (4097, 33, 1)]
KINDS = ["mask", "weights", "lengths", "both"]


def batch(rng, nsc, dtype):
    """Return x, dy, a residual, gamma and beta, channels-first."""
    x, dy, residual = rng.standard_normal((3, *nsc)).astype(dtype)
    gamma, beta = rng.uniform(0.5, 2.0, (2, nsc[1])).astype(dtype)
    return x * 2 + 3, dy, residual, gamma, beta


def selection(rng, nsc, kind):
    """Return keywords that select positions of (N, S), and the weight that each position gets."""
    n, _, s = nsc
    mask = rng.random((n, s)) < 0.6
    mask.flat[:2] = True
    weights = rng.integers(0, 9, (n, s)) / 4.0  # exact in every type
    weights.flat[:2] = 1.0
    if kind == "lengths":
        ends = rng.integers(0, s + 1, n)
        ends[:2] = s
        return {"lengths": ends}, (np.arange(s) < ends[:, np.newaxis]).astype(float)
    if kind == "mask":
        return {"mask": mask}, mask.astype(float)
    if kind == "weights":
        return {"weights": weights}, weights
    return {"mask": mask, "weights": weights}, mask * weights


def gathered(array, shares):
    """Return the selected values, shape (K, C)."""
    return np.moveaxis(array, 1, -1)[shares > 0]
