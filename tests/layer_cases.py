"""What the tests of layers share: all that a layer remembers, and the bounds of its gradients."""

import numpy as np
from bounds import ULP32, ULP64, column, wide
from cases import backward_bound

from cybn import reference


def snapshot(bn):
    """Return all that a layer remembers, to the bit, for comparing."""
    arrays = bn.parameters() + bn.gradients() + list(bn.state_dict().values())
    return repr(bn), bn.training, [(a.dtype.str, a.shape, a.tobytes()) for a in arrays]


def gradient_bounds(dy, x, gamma, axis=1, eps=1e-5, mean=None, var=None):
    """Return the exact (dx, dgamma, dbeta) and their bounds, through the batch or (mean, var).

    With a fixed mean and variance, and sizes as in `backward_bound`: dbeta: ulp * sum |dy|;
    dgamma: ulp * sum (|dy| * size); dx: ulp * |gamma| * r * |dy|.
    """
    if mean is None:
        return backward_bound(dy, x, gamma, axis, eps)
    dy, wx, mean, var, gamma = wide(dy, x, mean, var, gamma)
    exact = reference.batch_norm_inference_backward(dy, wx, mean, var, gamma, axis=axis, eps=eps)
    axis = axis % x.ndim
    others = tuple(i for i in range(x.ndim) if i != axis)
    g = np.ones(x.shape[axis]) if gamma is None else gamma
    mean, var, g = (column(v, x.ndim, axis) for v in (mean, var, g))
    r = 1 / np.sqrt(var + eps)
    size = np.abs(wx - mean) * r + 1
    if x.dtype == np.float64:
        size += np.abs(mean) * r
    ulp, dy = ULP32 if x.dtype == np.float32 else ULP64, np.abs(dy)
    return exact, (
        ulp * np.abs(g) * r * dy,
        ulp * (dy * size).sum(others),
        ulp * dy.sum(others),
    )
